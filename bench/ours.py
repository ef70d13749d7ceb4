"""Our kernels as candidates: which schedules, by what names.

``tuned`` is what a plain call chooses: no schedule is given. ``default`` is the schedule of a kernel
that nobody has tuned. A resource (``copy_engine``, ``sm:16``, ``epilogue``, ``collective``, ``none``) is
the default with that resource; ``library`` does not overlap and leaves products and collectives to the
library. A name of :data:`STRUCTURES` is a way to compute a product. ``FILE.json`` holds one schedule, or
a table: an object of one schedule for each case, by the case's name, or a table of `schedules/tuned`, of
which the entry with the case's extents is taken and no other.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import stats
from bench.cases import AG_GEMM, GEMM, GEMM_AR, GEMM_RS, Case

if TYPE_CHECKING:
    from bench.candidates import Candidate, Inputs
    from bench.cluster import Part
    from tilelink.tuning.timing import Run

# The moved tensor of each kernel.
MOVED = {AG_GEMM: "A", GEMM_RS: "C", GEMM_AR: "C"}
# A gathered tensor is no result of a tile, so no epilogue can send it.
NO_EPILOGUE = (AG_GEMM,)
TABLE_KINDS = (AG_GEMM, GEMM_RS, GEMM_AR, GEMM)

# How it begins what is said of a file without a schedule for a case.
NOT_IN_TABLE = "the table has no"

# Where a plain call chooses its schedule.
CHOOSE = "tilelink.backend.runtime.choose"

# Ways to compute a product on one GPU: emitter, tile of M, N and K, stages, and other fields. Of the
# kernels whose warps have roles, those with 64 x 256 or 128 x 128 tiles take turns at tiles, those with
# larger tiles halve each.
STRUCTURES: dict[str, dict[str, Any]] = {
    "flat 128x256x3": {"tiles": (128, 256, 64), "stages": 3},
    "flat 128x256x4": {"tiles": (128, 256, 64), "stages": 4},
    "flat 128x128x5": {"tiles": (128, 128, 64), "stages": 5},
    "nested 128x256x4": {"tiles": (128, 256, 64), "stages": 4, "flatten": False},
    "turns 128x128x5": {"tiles": (128, 128, 64), "stages": 5, "emitter": "gluon"},
    "turns 64x256x4": {"tiles": (64, 256, 64), "stages": 4, "emitter": "gluon"},
    "halves 128x256x4": {"tiles": (128, 256, 64), "stages": 4, "emitter": "gluon"},
    "halves 128x256x3": {"tiles": (128, 256, 64), "stages": 3, "emitter": "gluon"},
    "halves 256x128x4": {"tiles": (256, 128, 64), "stages": 4, "emitter": "gluon"},
}


def kernel_of(kind: str) -> Any:
    """The kernel that a case of ``kind`` measures."""
    import tilelink.kernels

    return getattr(tilelink.kernels, kind)


def ours(
    part: Part, case: Case, inputs: Inputs, specs: list[str], graphs: bool
) -> Iterator[Candidate]:
    """Our kernel with each schedule of ``specs``; what cannot be made fails when it is built."""
    from bench.candidates import Candidate, eager_and_graph

    kernel = kernel_of(case.kind)
    out = inputs.a(0).new_empty(case.rows_out(part.world), case.n)

    def builder(schedule: Any) -> Callable[[], Run]:
        def build() -> Run:
            call = kernel.on(group=part.group, schedule=schedule)

            def run(i: int) -> Any:
                call(inputs.a(i), inputs.b(i), out)
                return out

            return run

        return build

    for spec in specs:
        if spec == "epilogue" and case.kind in NO_EPILOGUE:
            continue
        name = f"{stats.OURS} {label_of(spec)}"
        try:
            schedule = schedule_of(kernel, case, part.world, spec)
            device = device_name(part.device)
            shown, origin = shown_schedule(kernel, case, part.world, schedule, device)
        except Exception as error:
            yield Candidate(name, stats.OURS, _raising(error))
            continue
        made = eager_and_graph(name, stats.OURS, builder(schedule), shown, origin)
        yield from made if graphs else [next(made)]


def label_of(spec: str) -> str:
    """The name of a schedule in tables: that of a file without folder and suffix."""
    return Path(spec).stem if spec.endswith(".json") else spec


def schedule_of(kernel: Any, case: Case, world: int, spec: str) -> Any:
    """The schedule that ``spec`` names for ``case``; None leaves the choice to a plain call.

    Raises ValueError for a table without the case and for a resource where nothing moves, ScheduleError
    for what is no schedule.
    """
    from tilelink.schedules import Schedule, default_schedule

    if spec == "tuned":
        return None
    if spec.endswith(".json"):
        return from_file(Path(spec).read_text(encoding="utf-8"), case, world)
    base = default_schedule(_built(kernel, case, world))
    if spec == "default":
        return base
    if spec in STRUCTURES:
        fields = dict(STRUCTURES[spec])
        tiles = fields.pop("tiles")
        data = json.loads(base.to_json()) | fields | {"tiles": dict(zip("MNK", tiles, strict=True))}
        return Schedule.from_json(json.dumps(data))
    resource, emitter = ("none", "library") if spec == "library" else (spec, base.emitter)
    if case.kind == GEMM:
        if spec != "library":
            raise ValueError(f"`{spec}` is no way to compute a product: nothing moves")
        return dataclasses.replace(base, emitter=emitter)
    tensor = MOVED[case.kind]
    move = base.move(tensor).by(resource)
    return dataclasses.replace(base, moves=((tensor, move),), emitter=emitter)


def from_file(text: str, case: Case, world: int) -> Any:
    """The schedule in ``text``: one for all, or that of ``case`` on ``world`` ranks in a table."""
    from tilelink.schedules import Schedule

    data = json.loads(text)
    if not isinstance(data, dict):
        return Schedule.from_json(text)
    if "entries" in data:
        extents = {"M": case.m, "K": case.k, "N": case.n}
        ranks = (data["kernel"], data["world"]) == (case.kind, world)
        found = [e["schedule"] for e in data["entries"] if ranks and e["extents"] == extents]
    elif any(key.split(" ")[0] in TABLE_KINDS for key in data):
        found = [data[case.name]] if case.name in data else []
    else:
        found = [data]
    if not found:
        raise ValueError(f"{NOT_IN_TABLE} {case.name} on {world}")
    return Schedule.from_json(json.dumps(found[0]))


def shown_schedule(
    kernel: Any, case: Case, world: int, schedule: Any, device: str
) -> tuple[dict[str, Any] | None, str]:
    """The schedule for the record, and where it is from; ``device`` is the name that CUDA has for the GPU.

    That of a plain call is found as the call itself finds it.
    """
    if schedule is not None:
        return dict(json.loads(schedule.to_json())), "given"
    op = _built(kernel, case, world)
    if importlib.util.find_spec(CHOOSE) is None:
        # Without tables and a model, a plain call takes the default.
        from tilelink.backend.pipeline import compile_kernel

        program, origin = compile_kernel(op, None), "default"
    else:
        choose = importlib.import_module(CHOOSE)
        chosen = choose.compile_chosen(op, None, device)
        program, origin = chosen.program, chosen.origin
    text = program.get("schedule")
    return None if text is None else dict(json.loads(str(text))), origin


def device_name(device: Any) -> str:
    """The name of a GPU by CUDA, of another device its kind."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def _built(kernel: Any, case: Case, world: int) -> Any:
    return kernel.build({"M": case.m, "K": case.k, "N": case.n}, {}, world)


def _raising(error: Exception) -> Callable[[], Run]:
    def build() -> Run:
        raise error

    return build
