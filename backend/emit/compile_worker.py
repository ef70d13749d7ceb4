"""The process that compiles kernels of emitted modules, for :mod:`tilelink.backend.emit.compiler`.

It imports Triton once, and forks for each request: MLIR ends the process where it finds a fault. Requests and
answers are lines of JSON on standard input and output.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

SIXTEEN = [["tt.divisibility", 16]]
TARGET = ("cuda", 90, 32)


def main() -> None:
    """Answer each request with what its compiler said if it failed, or null; until standard input ends.

    A request has ``module``, ``kernel``, ``signature``, ``emitter``, ``options``, ``out`` and ``sass``: see
    :func:`compile_kernel`; and ``environment``, the variables that it is compiled with.
    """
    answers = os.fdopen(os.dup(1), "w")
    # Whatever else is printed here is no answer.
    os.dup2(2, 1)
    _prepare()
    for line in sys.stdin:
        answers.write(json.dumps(_in_fork(json.loads(line))) + "\n")
        answers.flush()


def _prepare() -> None:
    """What every compilation does first, once for all: imports, and digests of Triton and its tools."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.experimental.gluon import language as _gluon  # noqa: F401
    from triton.experimental.gluon._runtime import GluonASTSource  # noqa: F401
    from triton.runtime.cache import triton_key

    import tilelink.device.boxes
    import tilelink.device.roles  # noqa: F401

    triton_key()
    make_backend(GPUTarget(*TARGET)).hash()


def _in_fork(request: dict[str, Any]) -> str | None:
    """Has a fork of this process, which has one thread, compile a kernel; its messages if that fails."""
    with tempfile.TemporaryFile("w+") as messages:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # It ends before garbage would count, and Triton's frontend makes much that is kept.
                gc.disable()
                for stream in (1, 2):
                    os.dup2(messages.fileno(), stream)
                os.environ.clear()
                os.environ.update(request["environment"])
                compile_kernel(request)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        messages.seek(0)
        return messages.read() or "the compiler crashed" if status != 0 else None


def compile_kernel(request: dict[str, Any]) -> None:
    """Write each form of a kernel, its machine code as text if ``sass``, and ``metadata.json``, into ``out``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    spec = importlib.util.spec_from_file_location("emitted", request["module"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emitted"] = module
    spec.loader.exec_module(module)
    types: dict[str, str] = request["signature"]
    # Torch allocates at multiples of 16 bytes and more: without saying so this is other code.
    aligned = {(n,): SIXTEEN for n, type_ in enumerate(types.values()) if type_.startswith("*")}
    gluon = request["emitter"] == "gluon"
    if gluon:
        types = {name: _laid_out(type_) for name, type_ in types.items()}
    maker = GluonASTSource if gluon else ASTSource
    source = maker(getattr(module, request["kernel"]), types, {}, aligned)
    compiled = triton.compile(source, target=GPUTarget(*TARGET), options=request["options"])
    out = Path(request["out"])
    out.mkdir()
    for form in ("ttir", "ttgir", "llir", "ptx"):
        if form in compiled.asm:  # Gluon begins with its TTGIR
            (out / form).write_text(str(compiled.asm[form]))
    (out / "cubin").write_bytes(compiled.asm["cubin"])
    if request.get("sass", True):
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        (out / "sass").write_text(_output(tools / "nvdisasm", "-c", str(out / "cubin")))
    numbers = resources(out / "cubin")
    warps = compiled.metadata.num_warps
    facts = {"shared": compiled.metadata.shared, "warps": warps, "usage": numbers}
    (out / "metadata.json").write_text(json.dumps(facts))


def resources(cubin: Path) -> dict[str, int]:
    """What a kernel uses: ``REG`` registers, ``STACK`` and ``LOCAL`` bytes of local memory, a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = _output(tool, "--dump-resource-usage", str(cubin))
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def _laid_out(type_: str) -> str:
    """The type of a descriptor in Gluon, which says how its box lies in shared memory."""
    from triton.language import str_to_ty

    from tilelink.device.roles import descriptor_layout

    found = re.fullmatch(r"tensordesc<(\w+)\[([\d,]+)\]>", type_)
    if found is None:
        return type_
    layout = descriptor_layout([int(n) for n in found[2].split(",")], str_to_ty(found[1], None))
    return f"{type_[:-1]},{layout!r}>"


def _output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
