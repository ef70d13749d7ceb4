"""The command that makes a run again."""

from __future__ import annotations

import shlex

from tilelink.ir import FLOATS, Op, dynamic_extents


def reproduce(
    program: Op, seed: int, calls: int, workers: int | None = None, *, text: bool = False
) -> str:
    """The command that makes the same run of ``program`` again, on random inputs.

    It names the IR text that the program was read from, ``-`` where that was standard input, or else the kernel
    that it was compiled from; with ``text``, and where neither is known, ``NAME.ir``, which is to hold the
    program's text. Only a call from Python can override the number of workers.
    """
    if workers is not None:
        return f"simulate.run_calls(program, inputs, seed={seed}, workers={workers})"
    words = ["tilelink", "run", *_program(program, text)]
    words += ["--seed", str(seed), "--calls", str(calls)]
    return shlex.join(words)


def kernel_words(op: Op, file: str) -> list[str]:
    """``FILE::kernel`` and the options that say for what ``op``, a kernel or its program, was made of ``file``."""
    extents = ",".join(f"{e.symbol}={e['value']}" for e in op.find("extent"))
    dynamic = ",".join(e.symbol for e in dynamic_extents(op))
    dtypes = ",".join(
        f"{tensor.symbol}={tensor['dtype']}"
        for tensor in op.find("tensor")
        if tensor["role"] != "temp" and tensor["dtype"] in FLOATS
    )
    words = [f"{file}::{op.get('kernel', op.symbol)}", "--world", str(op["world"])]
    words += ["--set", extents] if extents else []
    words += ["--dynamic", dynamic] if dynamic else []
    # IR text has its element types.
    return [*words, "--dtype", dtypes] if dtypes and not _written(op) else words


def _written(op: Op) -> str:
    """What ``op`` is in the IR text that it was read from, ``kernel`` or ``program``; empty if there is none."""
    if op.span is None:
        return ""
    word, _, _ = op.span.source.line(op.span.line).partition(" @")
    return word if word in ("kernel", "program") else ""


def _program(program: Op, text: bool) -> list[str]:
    written, schedule = _written(program), program.get("schedule")
    file = program.get("file")
    if written:
        assert program.span is not None
        name = program.span.source.name
        file = "-" if name == "<stdin>" else name
        if written == "program":
            return [f"{file}::{program.symbol}"]
    elif text or not str(file).endswith(".py"):
        file = None
    if not (file and schedule):
        return [f"{program.symbol}.ir"]
    return [*kernel_words(program, str(file)), "--schedule", str(schedule)]
