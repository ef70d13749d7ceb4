"""The version oracle: which write every read saw, against what it must see.

Each element of memory carries the number of the write that made it and the call of that write. Two rules
hold for every program that is free of faults: a read sees writes of its own call only, since nothing
flows from one call into the next; and a read sees the same writes in every call and under every
schedule, since the graph has one producer for each element that is read (where tables of a call decide
who writes what, the calls are not compared with each other, only the schedules). So one run whose numbers are
right settles all others of the same program in which every read sees the same versions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilelink.backend.simulate.errors import VersionError
from tilelink.backend.simulate.geometry import Decl
from tilelink.backend.simulate.memory import Memory
from tilelink.backend.simulate.trace import Load, Place, Region, Traces, Transfer
from tilelink.ir import Op

FEW = 64  # elements up to which all versions are compared and kept
SMALL = 4096  # elements up to which what an output held is kept, by call
CALLS = 16  # bits of a version that hold the call
UNWRITTEN = -1


class Versions:
    """What each read saw; shared by the runs of one program that are to be compared."""

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        # All versions of a read, or, of a large one, that which all its elements have.
        self._seen: dict[tuple[int, int, int], bytes | int] = {}
        # Of small ones, what was held then, by call: most reads see it again.
        self._held: dict[tuple[int, int, int], bytes] = {}
        self._outputs: dict[tuple[int, str], int] = {}  # their numbers
        # What nobody or the user has written, to copy.
        self._blank: dict[tuple[str, int, int | None], NDArray[np.int64]] = {}

    def fresh(
        self, memory: Memory, decl: Decl, call: int | None = None, slot: str | None = None
    ) -> None:
        """Nobody has written ``decl``, or its slot of that name; with ``call``, the user has."""
        key = (decl.name, memory.rank, call)
        found = self._blank.get(key)
        if found is None:
            value = UNWRITTEN
            if call is not None:
                place = Place(memory.rank, "<host>")
                uid = self.traces.uid(("input", memory.rank, decl.name), decl.op, place)
                value = (uid << CALLS) + call
            found = self._blank[key] = np.full(decl.shape, value, dtype=np.int64)
        memory.versions[slot or decl.name] = found.copy()

    def written(self, memory: Memory, place: str, mask: Any, uid: int, call: int) -> None:
        """A write has reached memory, in the slot called ``place``."""
        memory.versions[place][mask] = (uid << CALLS) + call

    def emptied(self, memory: Memory, place: str, mask: Any) -> None:
        """Words have been emptied, in the slot called ``place``: what was there is nobody's any more."""
        memory.versions[place][mask] = UNWRITTEN

    def read(
        self,
        memory: Memory,
        place: str,
        ins: Load | Transfer,
        part: int,
        region: Region,
        call: int,
        who: Any,
    ) -> None:
        """Compare what a read sees with what it saw before; VersionError where it differs."""
        held = memory.versions[place][region.mask]
        few = held.size <= FEW
        same = held.tobytes() if few else b""
        if few and self._held.get((ins.uid, part, call)) == same:
            return
        key = (ins.uid, part, call if self.traces.dynamic else 0)
        # Most large reads see one write alone, and then its number says all.
        if not few and (held == held.flat[0]).all():
            seen: bytes | int = int(held.flat[0]) - call
        else:
            seen = (held - call).tobytes()
        known = self._seen.get(key)
        if seen == known:
            if few:
                self._held[ins.uid, part, call] = same
            return
        found = np.asarray(held - call)
        if known is None and not (found & ((1 << CALLS) - 1)).any():
            self._seen[key] = seen
            return
        self._fail(memory.rank, region.symbol, ins.op, ins.place, found, known, call, who)

    def output(self, memory: Memory, decl: Decl, call: int, who: Any) -> None:
        """The user reads an output: like :meth:`read`, but elements may be left unwritten."""
        uid = self._outputs.get((memory.rank, decl.name))
        if uid is None:
            place = Place(memory.rank, "<host>")
            uid = self.traces.uid(("output", memory.rank, decl.name), decl.op, place)
            self._outputs[memory.rank, decl.name] = uid
        held = memory.versions[decl.name]
        small = held.size <= SMALL
        same = held.tobytes() if small else b""
        if small and self._held.get((uid, 0, call)) == same:
            return
        found = held - call
        found[found == UNWRITTEN - call] = UNWRITTEN << CALLS
        seen = found.tobytes()
        known = self._seen.setdefault((uid, 0, call if self.traces.dynamic else 0), seen)
        if seen != known:
            place = Place(memory.rank, "<host>")
            self._fail(memory.rank, decl.name, decl.op, place, found, known, call, who)
        elif small:
            self._held[uid, 0, call] = same

    def _fail(
        self,
        rank: int,
        symbol: str,
        op: Op,
        place: Place,
        found: NDArray[np.int64],
        known: bytes | int | None,
        call: int,
        who: Any,
    ) -> None:
        flat = found.reshape(-1)
        if known is None:
            at = int(np.flatnonzero(flat & ((1 << CALLS) - 1))[0])
            expected = f"a write of call {call}"
        else:
            wanted = np.full(flat.shape, known)
            if isinstance(known, bytes):
                wanted = np.frombuffer(known, dtype=np.int64)
            at = int(np.flatnonzero(flat != wanted)[0])
            expected = self._writer(int(wanted[at]), call)
        raise VersionError(
            op.span,
            symbol=symbol,
            rank=rank,
            reader=f"`{op.name}` by {who.describe(place)}",
            found=self._writer(int(flat[at]), call),
            expected=expected,
        )

    def _writer(self, version: int, call: int) -> str:
        version += call
        if version < 0:
            return "what nobody has written"
        op, place = self.traces.sources[version >> CALLS]
        of = version & ((1 << CALLS) - 1)
        if place.agent == "<host>":
            return f"the input of call {of}"
        where = f" ({op.span})" if op.span is not None else ""
        agent = place.agent if place.agent == "head" else f"@{place.agent}"
        return f"`{op.name}`{where} by rank {place.rank} {agent}{place.text} (call {of})"
