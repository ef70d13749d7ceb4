"""Tuned schedules: small JSON files in ``schedules/tuned``, and how a kernel finds its own in them.

A table is of one kernel, number of ranks and device. It is keyed by the unscheduled computation and
mapping, so that neither a change of the compiler nor a kernel's name voids it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.ir import Op, Ref, print_ir
from tilelink.schedules.machine import Machine
from tilelink.schedules.schedule import Schedule, ScheduleError

# Octaves, summed over the extents, from a tuned shape to one that takes over its schedule.
NEAR = 2.0


class BadTable(TilelinkError):
    """A table of tuned schedules that is no JSON, or has a field that is missing, unknown or of another kind."""

    code = "bad-table"
    message = "{place}: {detail}"
    hint = "`tilelink tune` writes tables; docs/tuning.md has their form"


@dataclass(frozen=True, slots=True)
class Run:
    """Where times come from: the raw data, when, and the versions then, which are told but not compared."""

    source: str
    date: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One shape: extents by name, the schedule, its time and the baseline's, microseconds.

    ``baseline`` names what the library's best was; ``run`` is an index into the table's runs.
    """

    extents: Mapping[str, int]
    schedule: Schedule
    us: float
    baseline_us: float | None = None
    baseline: str | None = None
    run: int = 0

    def distance(self, extents: Mapping[str, int]) -> float:
        """Octaves between two shapes, summed over the extents; infinite where names differ."""
        if set(extents) != set(self.extents):
            return math.inf
        return sum(abs(math.log2(extents[n] / self.extents[n])) for n in sorted(extents))


@dataclass(frozen=True, slots=True)
class Table:
    """The tuned shapes of one kernel on ``world`` GPUs that CUDA calls ``device``.

    ``kernel`` is its name for humans and ``key`` what it is found by, see :func:`kernel_key`. ``present`` and
    ``constants`` are the optional tensors and the compile-time arguments that the kernel was built with.
    """

    kernel: str
    key: str
    dtype: str
    world: int
    device: str
    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    present: tuple[str, ...] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    name: str = "(table)"

    def with_entries(self, new: Iterable[Entry], run: Run) -> Table:
        """This table with entries measured in ``run``, in place of those of the same extents."""
        runs = [*self.runs, run]
        kept = {tuple(sorted(e.extents.items())): (e, self.runs[e.run]) for e in self.entries}
        kept |= {tuple(sorted(e.extents.items())): (e, run) for e in new}
        used = [
            r
            for r in dict.fromkeys(map(_run_key, runs))
            if any(_run_key(o) == r for _, o in kept.values())
        ]
        by_key = {_run_key(r): r for r in runs}
        entries = tuple(
            replace(entry, run=used.index(_run_key(origin)))
            for _, (entry, origin) in sorted(kept.items())
        )
        return replace(self, runs=tuple(by_key[k] for k in used), entries=entries)

    def to_json(self) -> str:
        """The file: an entry a line, that :func:`parse_table` reads back."""
        head: dict[str, Any] = {
            "kernel": self.kernel,
            "key": self.key,
            "dtype": self.dtype,
            "world": self.world,
            "device": self.device,
        }
        if self.present is not None:
            head["present"] = list(self.present)
        if self.constants:
            head["constants"] = dict(self.constants)
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        runs = [
            json.dumps({"source": r.source, "date": r.date, "versions": dict(r.versions)})
            for r in self.runs
        ]
        lines.append('  "runs": [\n    ' + ",\n    ".join(runs) + "\n  ]")
        entries = [json.dumps(_entry_data(e)) for e in self.entries]
        lines.append('  "entries": [\n    ' + ",\n    ".join(entries) + "\n  ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @property
    def file_name(self) -> str:
        """``ag_gemm.bf16.h200x4.json``, with the key where arguments are not the usual ones."""
        # Of a name such as `NVIDIA H100 80GB HBM3`, the model.
        words = self.device.removeprefix("NVIDIA ").split() or ["gpu"]
        device = words[0].lower()
        variant = f".{self.key[:6]}" if self.present is not None or self.constants else ""
        return f"{self.kernel}{variant}.{self.dtype}.{device}x{self.world}.json"


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule for a kernel and where it is from: the entry, and octaves from its shape."""

    schedule: Schedule
    table: Table
    entry: Entry
    distance: float

    @property
    def origin(self) -> str:
        """In words."""
        shape = " ".join(f"{n}={v}" for n, v in self.entry.extents.items())
        if self.distance == 0.0:
            return f"tuned ({self.table.name})"
        return f"tuned for {shape} on {self.table.world} ranks ({self.table.name})"


def kernel_key(kernel: Op) -> str:
    """16 hex digits of what ``kernel`` (Tile IR) computes and moves.

    Element types count; its name, its file, the values of extents, whether they vary from call to call, and the
    number of ranks do not.
    """
    plain = replace(kernel, ref=Ref("kernel")).with_attrs(file=None, world=None)
    any_value = {"value": 0, "dynamic": None, "least": None}
    body = tuple(op.with_attrs(**any_value) if op.name == "extent" else op for op in plain.body)
    return hashlib.sha256(print_ir(plain.with_ops(body)).encode()).hexdigest()[:16]


def world_of(kernel: Op) -> int:
    """The number of ranks that a table of ``kernel`` is for: 1 where nothing moves, whoever else runs it."""
    return int(kernel["world"]) if any(t["move"] != "local" for t in kernel.find("tensor")) else 1


def extents_of(kernel: Op) -> dict[str, int]:
    """The extents of a kernel by name, in order of declaration."""
    return {op.symbol: int(op["value"]) for op in kernel.find("extent")}


def dtype_of(kernel: Op) -> str:
    """The element type of the first tensor that moves, or of the first one."""
    tensors = kernel.find("tensor")
    moved = [t for t in tensors if t["move"] != "local"]
    return str((moved or tensors)[0]["dtype"])


def lookup(kernel: Op, device: str, tables: Iterable[Table] | None = None) -> Found | None:
    """The tuned schedule of ``kernel`` on GPUs that CUDA calls ``device``: of its shape, or the nearest one.

    Nearest is one within ``NEAR`` octaves on as many ranks; where there is none, on other numbers of ranks, of
    which an octave counts like one of an extent; where there is none of this device, on its kin. None where
    nothing of the same kernel is that near. The same tables give the same answer everywhere.
    """
    key, world, extents = kernel_key(kernel), world_of(kernel), extents_of(kernel)
    alike = (device, *Machine.kin_of(device))
    found = [
        Found(entry.schedule, table, entry, entry.distance(extents) + _apart(table.world, world))
        for table in (load_tables() if tables is None else tables)
        if table.key == key and table.device in alike
        for entry in table.entries
    ]
    near = [f for f in found if f.distance <= NEAR]

    def order(f: Found) -> tuple[object, ...]:
        place = alike.index(f.table.device), f.table.world != world
        return *place, f.distance, sorted(f.entry.extents.items()), f.table.name

    return min(near, key=order, default=None)


def _apart(world: int, other: int) -> float:
    """Octaves between two numbers of ranks; infinite where only one of them is 1, since nothing moves there."""
    return math.inf if (world == 1) != (other == 1) else abs(math.log2(world / other))


@cache
def load_tables() -> tuple[Table, ...]:
    """The tables that come with the package, in order of file name; BadTable where one is broken."""
    folder = files("tilelink.schedules") / "tuned"
    if not folder.is_dir():
        return ()
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return tuple(parse_table((folder / name).read_text(encoding="utf-8"), name) for name in names)


_TYPES: dict[str, tuple[type, ...]] = {
    "kernel": (str,),
    "key": (str,),
    "dtype": (str,),
    "world": (int,),
    "device": (str,),
    "runs": (list,),
    "entries": (list,),
    "present": (list,),
    "constants": (dict,),
    "source": (str,),
    "date": (str,),
    "versions": (dict,),
    "extents": (dict,),
    "schedule": (dict,),
    "us": (int, float),
    "baseline_us": (int, float),
    "baseline": (str,),
    "run": (int,),
}


def parse_table(text: str, name: str) -> Table:
    """The table that ``text`` holds; BadTable, with the entry, where it holds none. ``name`` is its file's."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadTable(place=name, detail=f"not JSON: {error}") from None
    optional = ("present", "constants", "name")
    head = _object(data, Table, optional, name)
    runs = tuple(
        Run(**_object(run, Run, (), f"{name}, run {number}"))
        for number, run in enumerate(head["runs"])
    )
    entries = tuple(
        _entry(entry, len(runs), f"{name}, entry {number}")
        for number, entry in enumerate(head["entries"])
    )
    seen: set[tuple[tuple[str, int], ...]] = set()
    for number, entry in enumerate(entries):
        shape = tuple(sorted(entry.extents.items()))
        if shape in seen:
            raise BadTable(place=f"{name}, entry {number}", detail="its shape is there twice")
        seen.add(shape)
    present = head.get("present")
    return Table(
        **{
            **head,
            "runs": runs,
            "entries": entries,
            "present": None if present is None else tuple(present),
            "name": name,
        }
    )


def _entry(data: Any, runs: int, place: str) -> Entry:
    found = _object(data, Entry, ("baseline_us", "baseline", "run"), place)
    for extent, value in found["extents"].items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadTable(place=place, detail=f"extent `{extent}` is {value!r}")
    if not 0 <= found.get("run", 0) < runs:
        raise BadTable(place=place, detail=f"there is no run {found.get('run', 0)}")
    if not found["us"] > 0:
        raise BadTable(place=place, detail=f"a time of {found['us']} us")
    try:
        found["schedule"] = Schedule.from_json(json.dumps(found["schedule"]))
    except ScheduleError as error:
        raise BadTable(place=place, detail=str(error).splitlines()[0]) from None
    return Entry(**found)


def _object(data: Any, cls: type[Any], optional: tuple[str, ...], place: str) -> dict[str, Any]:
    """The fields of ``cls`` in a JSON object; BadTable for one missing, unknown or of another kind."""
    if not isinstance(data, dict):
        raise BadTable(place=place, detail="not an object")
    known = [f.name for f in fields(cls) if f.name != "name"]
    for key, value in data.items():
        if key not in known:
            raise BadTable(place=place, detail=f"there is no field `{key}`")
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise BadTable(place=place, detail=f"`{key}` is {value!r:.60}")
    missing = [key for key in known if key not in data and key not in optional]
    if missing:
        raise BadTable(place=place, detail=f"`{missing[0]}` is missing")
    return dict(data)


def _entry_data(entry: Entry) -> dict[str, Any]:
    data: dict[str, Any] = {"extents": dict(entry.extents), "us": round(entry.us, 1)}
    if entry.baseline_us is not None:
        data |= {"baseline_us": round(entry.baseline_us, 1), "baseline": entry.baseline}
    data["schedule"] = entry.schedule.to_sparse()
    return data | ({"run": entry.run} if entry.run else {})


def _run_key(run: Run) -> str:
    return json.dumps([run.source, run.date, dict(run.versions)], sort_keys=True)
