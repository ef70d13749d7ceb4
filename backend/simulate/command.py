"""The command that makes a run again."""

from __future__ import annotations

import shlex

from tilelink.ir import FLOATS, Op


def reproduce(
    program: Op, seed: int, calls: int, workers: int | None = None, *, text: bool = False
) -> str:
    """The command that makes the same run of ``program`` again, on random inputs.

    It names the IR file that the program was read from, or else the kernel that it was compiled from; with
    ``text``, and where neither is known, ``NAME.ir``, which is to hold the program's text. Only a call
    from Python can override the number of workers.
    """
    if workers is not None:
        return f"simulate.run_calls(program, inputs, seed={seed}, workers={workers})"
    words = ["tilelink", "run", *_program(program, text)]
    words += ["--seed", str(seed), "--calls", str(calls)]
    return shlex.join(words)


def _program(program: Op, text: bool) -> list[str]:
    name = program.span.source.name if program.span is not None else ""
    if name.endswith(".ir"):
        return [name]
    file, schedule = program.get("file"), program.get("schedule")
    if text or not (file and schedule and str(file).endswith(".py")):
        return [f"{program.symbol}.ir"]
    extents = ",".join(f"{op.symbol}={op['value']}" for op in program.find("extent"))
    dtypes = ",".join(
        f"{op.symbol}={op['dtype']}"
        for op in program.find("tensor")
        if op["role"] != "temp" and op["dtype"] in FLOATS
    )
    words = [f"{file}::{program.get('kernel', program.symbol)}", "--world", str(program["world"])]
    words += ["--set", extents] if extents else []
    words += ["--dtype", dtypes] if dtypes else []
    return [*words, "--schedule", str(schedule)]
