"""Compiles one kernel of an emitted module: the subprocess of :mod:`tilelink.backend.emit.offline`.

Reads a JSON request on standard input: ``module``, ``kernel``, ``signature``, ``emitter``, ``warps``,
``stages``, ``out``. Writes each form of the kernel, and ``metadata.json``, into the folder ``out``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

SIXTEEN = [["tt.divisibility", 16]]


def main() -> None:
    """Compile what standard input asks for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    request: dict[str, Any] = json.load(sys.stdin)
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
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options=request["options"])
    out = Path(request["out"])
    out.mkdir()
    for form in ("ttir", "ttgir", "llir", "ptx"):
        if form in compiled.asm:  # Gluon begins with its TTGIR
            (out / form).write_text(str(compiled.asm[form]))
    (out / "cubin").write_bytes(compiled.asm["cubin"])
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
