"""Where the kernel's program puts things: words and bytes of the arena back to symbols and elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilelink.backend.expand import bytes_of, dims_of, environment
from tilelink.backend.validate.values import Ints
from tilelink.ir import DTYPES, Expr, Op, dynamic_extents, parse_ir
from tilelink.ir.layout import ENCODINGS, SLOT_BYTES, SLOT_FLAGS, WORD

TL_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "int32": "int32",
    "int64": "int64",
    "bool": "int1",
}


class Misfit(Exception):
    """A place that is no element or no box of what lies there; the text says why."""


class Layout:
    """The declarations of a fused program, compiled from the kernel and not read from the module."""

    def __init__(self, program: Op) -> None:
        self.program = program
        self.env = environment(program)
        self.world = self.env["WORLD"]
        # The values of dynamic extents.
        self.varying = [self.env[op.symbol] for op in dynamic_extents(program)]
        self.declared = {
            op.symbol: op
            for op in program.body
            if op.name in ("tensor", "buffer", "flag", "counter", "scalar") and op.ref is not None
        }
        self.dims = {
            name: dims_of(op, self.env) for name, op in self.declared.items() if op.name != "scalar"
        }
        self.item = {
            name: DTYPES[op["dtype"]]
            for name, op in self.declared.items()
            if op.name in ("tensor", "buffer")
        }
        # What is read back on a device within a call: its stores must be complete when signalled.
        self.read_back = frozenset(
            ref.symbol
            for op in program.walk()
            if op.name in ("load", "load_sum", "transfer", "collective")
            for ref in (op.ref, op.get("own"))
            if ref is not None
        )

        # What is summed over ranks: the buffers of their parts, and of this rank's own part.
        sums = [op for op in program.walk() if op.name == "load_sum" and op.ref is not None]
        self.parts = frozenset(op.symbol for op in sums)
        # Those of which each part lies on the rank that made it, where others read it.
        self.remote = frozenset(op.symbol for op in sums if op.get("remote"))
        self.own = frozenset(op["own"].symbol for op in sums if op.get("own") is not None)
        # The sum that each of them is of, by the name of its parts.
        self.sum_of = {op.symbol: op.symbol for op in sums}
        self.sum_of |= {op["own"].symbol: op.symbol for op in sums if op.get("own") is not None}

        # The axis over which a tensor, or what holds it, is moved: places along it need not be those of the whole.
        self.moved: dict[str, int] = {}
        for name in self.item:
            tensor = self.declared.get(name.split(".")[0])
            over = tensor.get("over") if tensor is not None else None
            if (
                over is not None
                and tensor is not None
                and len(tensor["dims"]) == len(self.dims[name])
            ):
                self.moved[name] = int(over)

        # Of buffers that have the capacity of a dynamic extent: the axis of its rows, after how many of them those
        # of another rank begin, and how many of these are there. The others may hold anything.
        self.there: dict[str, tuple[int, int, int]] = {}
        if self.varying:
            self._rows(parse_ir(str(program["kernel_text"]), program.symbol))

    def _rows(self, kernel: Op) -> None:
        """Fills ``there``; ``kernel`` is what the program was made of."""
        dynamic = {op.symbol for op in dynamic_extents(kernel)}
        tensors = {op.symbol: op for op in kernel.find("tensor")}
        for name, op in self.declared.items():
            tensor = tensors.get(name.split(".")[0])
            if op.name != "buffer" or op.get("words") or tensor is None:
                continue
            rows = Expr.of(tensor["dims"][0])
            if any(Expr.of(d).names & dynamic for d in op["dims"]) or not rows.names & dynamic:
                continue
            axis = len(self.dims[name]) - len(tensor["dims"])
            period, live = self.dims[name][axis], int(rows.evaluate(self.env))
            if tensor["move"] in ("gather", "scatter"):
                period, live = period if axis else period // self.world, live // self.world
            self.there[name] = axis, period, live

    # The number that stands for the slot of a call while a kernel is read. It is none that a text could hold
    # in its place.
    SLOT = 7

    def first(self, op: Op) -> int:
        """The byte at which a flag array, counters or a symmetric buffer begin, in the slot of the call."""
        place = int(op["offset"])
        if self.program.get("slots") is None or op.name == "counter":
            return place
        if op.name == "flag":
            return place + self.SLOT * SLOT_FLAGS
        words = op.get("words")
        return place + self.SLOT * (ENCODINGS[words].slot if words else SLOT_BYTES)

    @property
    def counter_words(self) -> tuple[int, int]:
        """The words from the first counter of the program to the last."""
        found = [
            (int(op["offset"]) // WORD, int(np.prod(self.dims[name], dtype=np.int64)))
            for name, op in self.declared.items()
            if op.name == "counter"
        ]
        return min((a for a, _ in found), default=0), max((a + n for a, n in found), default=0)

    def strides(self, symbol: str) -> tuple[int, ...]:
        """Elements from one index to the next, an axis each: everything is row-major."""
        found = [1]
        for extent in reversed(self.dims[symbol][1:]):
            found.append(found[-1] * extent)
        return tuple(reversed(found))

    def word(self, words: Ints) -> tuple[str, Ints]:
        """The flag or counter that words of the arena belong to, and the flat elements."""
        for name, op in self.declared.items():
            if op.name not in ("flag", "counter"):
                continue
            first = self.first(op) // WORD
            size = int(np.prod(self.dims[name], dtype=np.int64))
            inside = (words >= first) & (words < first + size)
            if inside.all():
                return name, words - first
            if inside.any():
                break
        raise Misfit(f"word {int(words[0])} is of no flag or counter of the program, or of several")

    def buffer(self, offset: int, dtype: str) -> tuple[str, int]:
        """The symmetric buffer at byte ``offset`` of the arena, and the byte in it."""
        for name, op in self.declared.items():
            if op.name != "buffer" or op.get("space") == "local":
                continue
            first = self.first(op)
            size = bytes_of(op, self.env)
            if first <= offset < first + size:
                if op.get("words"):
                    bits = 8 * ENCODINGS[op["words"]].bytes
                    if dtype != f"int{bits}":
                        raise Misfit(f"@{name} is of words of {bits} bits")
                elif TL_NAMES[str(op["dtype"])] != dtype:
                    raise Misfit(f"@{name} holds {op['dtype']}, not {dtype}")
                return name, offset - first
        raise Misfit(f"byte {offset} of the arena is in no buffer of the program")

    def box(
        self, symbol: str, base: Ints, unit: int, extents: list[Ints], steps: list[Ints]
    ) -> tuple[Ints, Ints, tuple[int, ...]]:
        """The box of elements ``base + sum of steps * i``, ``i`` below ``extents``; an entry a lane.

        ``base`` is in bytes from the start of the symbol, steps in units of ``unit`` bytes. Returns lo
        and hi ``[n, axes]`` and, for each dimension, its axis (-1: none). Raises Misfit where it is no
        box inside the symbol.
        """
        dims, strides, item = self.dims[symbol], self.strides(symbol), self.item[symbol]
        n = len(base)
        live = np.ones(n, dtype=bool)
        for extent in extents:
            live &= extent > 0
        if np.any(base[live] % item) or np.any(base[live] < 0):
            raise Misfit(f"an address that is no element of @{symbol}")
        rest = np.where(live, base // item, 0)
        lo = np.zeros((n, len(dims)), dtype=np.int64)
        for axis, stride in enumerate(strides):
            lo[:, axis] = rest // stride
            rest = rest % stride
        hi = lo + 1
        used: list[int] = []
        for extent, step in zip(extents, steps, strict=True):
            some = live & (extent > 1)
            if not some.any():
                used.append(-1)
                continue
            first = int(step[np.flatnonzero(some)[0]])
            if np.any(step[some] != first):
                raise Misfit(f"a step through @{symbol} that differs between workers")
            width = first * unit
            if unit != item and width == unit:
                # A run of units: of so many elements.
                axis, many = len(dims) - 1, extent * unit // item
                if np.any(extent[some] * unit % item):
                    raise Misfit(f"words that do not end with an element of @{symbol}")
            else:
                fitting = [a for a, s in enumerate(strides) if s * item == width and a not in used]
                wide = [a for a in fitting if dims[a] > 1] or fitting
                if not wide:
                    raise Misfit(f"a step of {width} bytes, which is no axis of @{symbol}")
                axis, many = wide[-1], extent
            used.append(axis)
            hi[:, axis] = np.where(live, lo[:, axis] + many, lo[:, axis])
        # One element in each lane: its step still says which axis it is of; of several, they stand in order.
        single: dict[int, list[int]] = {}
        for number, (extent, step) in enumerate(zip(extents, steps, strict=True)):
            one = step[live & (extent == 1)]
            if used[number] < 0 and len(one) and np.all(one == one[0]):
                single.setdefault(int(one[0]) * unit, []).append(number)
        for width, numbers in single.items():
            fits = [a for a, s in enumerate(strides) if s * item == width and a not in used]
            if len(fits) == len(numbers):
                for number, axis in zip(numbers, fits, strict=True):
                    used[number] = axis
        hi = np.where(live[:, None], hi, lo)
        if np.any(hi > np.array(dims)):
            self._spill(symbol, lo, hi, used)
        return lo, hi, tuple(used)

    def _spill(self, symbol: str, lo: Ints, hi: Ints, used: list[int]) -> None:
        """A run along the last axis that goes on over whole rows is a box too; else Misfit."""
        dims = self.dims[symbol]
        for axis in range(len(dims) - 1, 0, -1):
            over = hi[:, axis] > dims[axis]
            if not over.any():
                continue
            length = hi[:, axis] - lo[:, axis]
            plain = (
                (lo[:, axis] == 0)
                & (length % dims[axis] == 0)
                & (hi[:, axis - 1] == lo[:, axis - 1] + 1)
            )
            if np.any(over & ~plain):
                break
            hi[over, axis - 1] = lo[over, axis - 1] + length[over] // dims[axis]
            hi[over, axis] = dims[axis]
        if np.any(hi > np.array(dims)):
            row = int(np.flatnonzero(np.any(hi > np.array(dims), axis=1))[0])
            region = ", ".join(
                f"{a}..{b}" for a, b in zip(lo[row].tolist(), hi[row].tolist(), strict=True)
            )
            raise Misfit(f"@{symbol}[{region}] is not inside {tuple(dims)}")


def constant(value: Any) -> int | None:
    """An integer that is the same in all lanes."""
    if isinstance(value, int):
        return value
    array = np.asarray(value)
    if array.size and np.all(array == array.flat[0]):
        return int(array.flat[0])
    return None
