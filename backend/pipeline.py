"""From Tile IR to the fused program: one straight run of named passes, the proof behind the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tilelink.backend.passes import PASSES, UnsupportedProgram
from tilelink.backend.verify import verify
from tilelink.errors import TilelinkError, choices
from tilelink.frontend.errors import StoreOutsideLoop
from tilelink.ir import Op, print_ir
from tilelink.schedules import Schedule, ScheduleError, default_schedule


class NoSuchPass(TilelinkError):
    """``--after`` names a pass that does not exist."""

    code = "no-such-pass"
    message = "there is no pass `{name}`"
    hint = "{advice}"


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did: its name, seconds, and the program behind it."""

    name: str
    seconds: float
    program: Op


def _check_names(kernel: Op, schedule: Schedule) -> None:
    """ScheduleError where a schedule is that of another kernel.

    Tile lengths may be shared by kernels with extents of different names, as long as one is of this one.
    """
    extents = [op.symbol for op in kernel.find("extent")]
    tensors = [op.symbol for op in kernel.find("tensor") if op["move"] not in ("local", "shard")]
    for field, what, names, known in (
        ("tiles", "extent", [name for name, _ in schedule.tiles], extents),
        ("moves", "moved tensor", [name for name, _ in schedule.moves], tensors),
    ):
        unknown = [name for name in names if name not in known]
        if field == "tiles" and len(unknown) < len(names):
            continue
        if unknown:
            raise ScheduleError(
                field=f"{field}.{unknown[0]}",
                detail=f"`{kernel.symbol}` has no {what} `{unknown[0]}`",
                help=choices(unknown[0], known),
            )


def _check_stores(kernel: Op) -> None:
    """StoreOutsideLoop where a store belongs to no task: the reference runs it, a launch has no place for it."""
    for op in kernel.body:
        if op.name == "store" and op.ref is not None:
            names = ("m", "n", "k", "l")[: len(op.ref.index)]
            raise StoreOutsideLoop(
                op.span,
                tensor=op.symbol,
                variables=", ".join(names),
                extents=", ".join(names).upper(),
            )
        if op.name == "for_tiles" and op.get("bounds"):
            raise UnsupportedProgram(
                op.span,
                detail="an outermost loop over bounds has no extent, so its tiles are no tasks",
                help="loop over the extent with `tk.tiles(M)`, and over the bounds inside it",
            )


def run_passes(
    kernel: Op,
    schedule: Schedule | None = None,
    after: str | None = None,
    trace: Callable[[Step], None] | None = None,
) -> Op:
    """``kernel`` (Tile IR) lowered by every pass, or up to and with the pass ``after``; not proven.

    ``trace`` is called with a :class:`Step` behind each pass. Raises TilelinkError subclasses for what
    cannot be fused.
    """
    known = [name for name, _ in PASSES]
    if after is not None and after not in known:
        raise NoSuchPass(name=after, advice=choices(after, known, "passes"))
    chosen = schedule or default_schedule(kernel)
    _check_names(kernel, chosen)
    _check_stores(kernel)
    program = replace(kernel, name="program").with_attrs(
        kernel=kernel.symbol, kernel_text=print_ir(kernel), schedule=chosen.to_json()
    )
    for name, function in PASSES:
        start = time.perf_counter()
        program = function(program)
        if trace is not None:
            trace(Step(name, time.perf_counter() - start, program))
        if name == after:
            break
    return program


def compile_kernel(kernel: Op, schedule: Schedule | None = None) -> Op:
    """The fused program of ``kernel`` under ``schedule`` (default: :func:`default_schedule`), proven.

    Raises what the passes refuse and what :func:`tilelink.backend.verify.verify` refuses.
    """
    program = run_passes(kernel, schedule)
    verify(program, kernel)
    return program


__all__ = ["PASSES", "Step", "compile_kernel", "run_passes"]
