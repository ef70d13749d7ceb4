"""Triton finds a compiled kernel again in its cache on disk, whatever a process compiled before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys
from dataclasses import replace
import tilelink.device, tilelink.kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import load_module, write_module
from tilelink.schedules import default_schedule
from triton.runtime.jit import JITCallable

extents = {"M": 2048, "K": 1024, "N": 2048}

def keys(order):
    found = {}
    for what in order:
        kind, emitter = what.split(":")
        op = getattr(tilelink.kernels, kind).build(extents, world=4, dtype="bf16")
        schedule = default_schedule(op)
        if emitter == "gluon":
            tiles = (("K", 64), ("M", 128), ("N", 128))
            moves = tuple((n, replace(m, slots=1, signal="flag")) for n, m in schedule.moves)
            schedule = replace(
                schedule, emitter=emitter, tiles=tiles, warps=8, stages=4, moves=moves
            )
        program = compile_kernel(op, schedule)
        module = load_module(write_module(emit(program), program.symbol))
        functions = {n: f for n, f in vars(module).items() if isinstance(f, JITCallable)}
        found[what] = {n: f.cache_key for n, f in functions.items()}
    return found

for order in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        print(json.dumps(keys(order)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
KERNELS = ("gemm_ar:triton", "gemm_rs:gluon", "gemm_rs:triton", "ag_gemm:gluon", "ag_gemm:triton")
Order = tuple[str, ...]


def keys(orders: list[Order], folder: Path) -> list[dict[str, dict[str, str]]]:
    """The names of compiled kernels in processes that meet them in these orders: forks of one that met none."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(orders)],
        env={"TILELINK_CACHE": str(folder), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def behind_others(what: str) -> Order:
    """The order in which a kernel is met last, behind four others."""
    return (*(other for other in KERNELS if other != what), what)


def test_keys_do_not_depend_on_what_a_process_met_before(tmp_path: Path) -> None:
    """Nor on its hash seed: the second process has another one."""
    last = keys([behind_others(what) for what in KERNELS], tmp_path)
    assert behind_others(KERNELS[-1]) == KERNELS
    back, *alone = keys([KERNELS[::-1], *((what,) for what in KERNELS)], tmp_path)
    for what, mine, own in zip(KERNELS, last, alone, strict=True):
        assert own[what], what
        assert own[what] == mine[what] == last[-1][what] == back[what], what


def test_keys_change_with_functions_that_make_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not look into them: a kernel keyed without them would be found after they have changed."""
    from tilelink import device
    from tilelink.device import keys as module_keys
    from tilelink.device import words

    found = []
    for text in ("one text", "another"):
        monkeypatch.setattr(module_keys, "sources", lambda text=text: text)
        monkeypatch.setattr(device.store_words, "hash", None)
        module_keys.settle(words)
        found.append(device.store_words.cache_key)
    assert found[0] != found[1]


def test_the_text_of_the_package_is_in_its_digest() -> None:
    from tilelink.device import keys as module_keys

    digest = module_keys.sources()
    assert digest == module_keys.sources.__wrapped__() and len(digest) == 64
