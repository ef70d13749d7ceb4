"""From Tile IR to the fused program: one straight run of named passes, the proof behind the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from tilelink.backend.passes import PASSES
from tilelink.backend.verify import verify
from tilelink.errors import TilelinkError
from tilelink.ir import Op
from tilelink.schedules import Schedule, default_schedule


class NoSuchPass(TilelinkError):
    """``--after`` names a pass that does not exist."""

    code = "no-such-pass"
    message = "there is no pass `{name}`"
    hint = "passes: {known}"


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass did: its name, seconds, and the program behind it."""

    name: str
    seconds: float
    program: Op


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
        raise NoSuchPass(name=after, known=", ".join(known))
    chosen = schedule or default_schedule(kernel)
    program = replace(kernel, name="program").with_attrs(
        kernel=kernel.symbol, schedule=chosen.to_json()
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
    verify(program)
    return program


__all__ = ["PASSES", "Step", "compile_kernel", "run_passes"]
