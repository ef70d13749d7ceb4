"""Triton finds a compiled kernel again in its cache on disk, whatever a process compiled before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from dataclasses import replace
import tilelink.kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import load_module, write_module
from tilelink.schedules import default_schedule
from triton.runtime.jit import JITCallable

extents, keys = {"M": 2048, "K": 1024, "N": 2048}, {}
for what in sys.argv[1:]:
    kind, emitter = what.split(":")
    op = getattr(tilelink.kernels, kind).build(extents, world=4, dtype="bf16")
    schedule = default_schedule(op)
    if emitter == "gluon":
        tiles = (("K", 64), ("M", 128), ("N", 128))
        moves = tuple((n, replace(m, slots=1, signal="flag")) for n, m in schedule.moves)
        schedule = replace(schedule, emitter=emitter, tiles=tiles, warps=8, stages=4, moves=moves)
    program = compile_kernel(op, schedule)
    module = load_module(write_module(emit(program), program.symbol))
    keys[what] = {n: f.cache_key for n, f in vars(module).items() if isinstance(f, JITCallable)}
print(json.dumps(keys))
"""
KERNELS = ("gemm_ar:triton", "gemm_rs:gluon", "gemm_rs:triton", "ag_gemm:gluon", "ag_gemm:triton")


def keys(order: tuple[str, ...], folder: Path) -> dict[str, dict[str, str]]:
    """The names of compiled kernels in a process that meets them in this order."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *order],
        env={"TILELINK_CACHE": str(folder), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


def test_keys_do_not_depend_on_the_order_of_kernels(tmp_path: Path) -> None:
    forth, back = keys(KERNELS, tmp_path), keys(KERNELS[::-1], tmp_path)
    for what in KERNELS:
        assert forth[what], what
        assert forth[what] == back[what], what


@pytest.mark.parametrize("what", KERNELS)
def test_a_key_is_the_same_in_a_process_of_its_own(what: str, tmp_path: Path) -> None:
    """That of a kernel which is met last, behind four others."""
    order = (*(other for other in KERNELS if other != what), what)
    assert keys((what,), tmp_path)[what] == keys(order, tmp_path)[what]


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
