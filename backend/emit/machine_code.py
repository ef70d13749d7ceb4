"""The instructions of many kernels at once: the disassembler takes longer to start than to read a kernel."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ARCHITECTURE = "SM90a"
INSTRUCTION = 16  # bytes
_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+\S.*$", re.M)


def disassemble(cubins: Sequence[bytes]) -> list[str]:
    """The instructions of each cubin, one a line; addresses and targets of jumps count from the first cubin on.

    ValueError where a cubin holds no code, or where the disassembler leaves instructions out.
    """
    codes = [code_of(cubin) for cubin in cubins]
    if not codes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "code"
        image.write_bytes(b"".join(codes))
        command = [str(_tool("nvdisasm")), "--binary", ARCHITECTURE, str(image)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = list(_LINE.finditer(said))
    if [int(found[1], 16) for found in lines] != [*range(0, sum(map(len, codes)), INSTRUCTION)]:
        raise ValueError("the disassembler has left out instructions")
    texts, at = [], 0
    for code in codes:
        end = at + len(code) // INSTRUCTION
        texts.append("\n".join(found[0] for found in lines[at:end]))
        at = end
    return texts


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, a 64-bit ELF file: what its ``.text`` sections hold."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no cubin: not an ELF file of 64 bits")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    # Of a section: its name's place, its type, flags, address, offset and size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * size) for n in range(count)]
    names = sections[names_at][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text", names + name)
    ]
    if not any(found):
        raise ValueError("no cubin: it has no code")
    return b"".join(found)


def _tool(name: str) -> Path:
    """A program of the CUDA toolkit that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
