"""The process that compiles: what a kernel does to it is that kernel's matter alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tilelink.backend.emit import compiler
from tilelink.backend.emit.compiler import Compiler

KERNEL = """
import triton

@triton.jit(do_not_specialize=[])
def copy(X, Y):
    triton.language.store(Y, triton.language.load(X))
"""


@pytest.fixture
def process() -> Iterator[Compiler]:
    found = Compiler()
    yield found
    found.close()


def asked(folder: Path, text: str = KERNEL, name: str = "copy") -> dict[str, Any]:
    module = folder / f"{name}.py"
    module.write_text(text)
    return {
        "module": str(module),
        "kernel": "copy",
        "signature": {"X": "*fp32", "Y": "*fp32"},
        "options": {"num_warps": 4},
        "emitter": "triton",
        "out": str(folder / name),
    }


def test_one_process_compiles_what_comes_behind_mistakes_and_crashes(
    process: Compiler, tmp_path: Path
) -> None:
    broken = process.request(asked(tmp_path, "raise ValueError('no kernel')\n", "broken"))
    assert broken is not None and broken.strip().endswith("ValueError: no kernel")
    crash = "import os\nprint('so far', flush=True)\nos.abort()\n"
    said = process.request(asked(tmp_path, crash, "crash"))
    assert said == "so far\n"
    assert process.request(asked(tmp_path, "import os\nos.abort()\n")) == "the compiler crashed"
    assert process.request(asked(tmp_path)) is None
    assert "ld.global" in (tmp_path / "copy" / "ptx").read_text()


def test_a_kernel_is_compiled_with_todays_variables(
    process: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import os\nraise ValueError(os.environ.get('TILELINK_TEST_WORD'))\n"
    for word in ("one", "two"):
        monkeypatch.setenv("TILELINK_TEST_WORD", word)
        said = process.request(asked(tmp_path, text))
        assert said is not None and f"ValueError: {word}" in said


def test_a_process_that_has_ended_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Compiler()
    monkeypatch.setattr(compiler, "_compiler", first)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert compiler.compile_kernel(asked(tmp_path)) == "the compiler ended"
    assert compiler.compile_kernel(asked(tmp_path)) is None
    assert compiler._compiler is not first
    compiler.close()
    assert compiler._compiler is None


def test_a_fork_leaves_its_parents_compiler_alone(process: Compiler, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        mine = process.usable
        process.close()
        os._exit(int(mine))
    assert os.waitpid(child, 0)[1] == 0
    assert process.usable and process.request(asked(tmp_path)) is None
