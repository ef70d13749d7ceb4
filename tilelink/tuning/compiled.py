"""What a kernel of a tuned schedule is compiled from, and the record of those that compiled well.

Triton's compiler takes a second or more a kernel. What it makes depends on nothing but the kernel's text, the
device library that the text calls, and the compiler itself, and whether it passes the lint on its program and on
the lint: a kernel whose digest of all these stands in the record needs no second look, while one that changed in
any of them does. Some of the recorded kernels are compiled in any case, others each day, and a record that
does not agree is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tilelink.errors import TilelinkError
from tilelink.ir import Op, print_ir
from tilelink.schedules import Schedule

if TYPE_CHECKING:
    from tilelink.backend.emit.kernel import Kernel
    from tilelink.backend.emit.offline import Compiled

# Recorded kernels are compiled again on one day of so many.
DAYS = 8


class BadRecord(TilelinkError):
    """A record of compiled kernels that cannot be read."""

    code: ClassVar[str] = "bad-record"
    message = "{place}: {detail}"
    hint = "`tilelink tune --check --record` writes it anew"


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel of a fused program, as the compiler sees it.

    ``skeleton`` is the same for kernels that differ in the numbers of their shapes alone, which change no
    register count: one stands for all. ``digest`` is of all that the compiler reads. Of longer texts, ``length``
    in characters, the compilation takes longer.
    """

    name: str
    skeleton: str
    digest: str
    length: int


@dataclass(frozen=True, slots=True)
class Use:
    """What a compiled kernel uses: registers and bytes of spills a thread, bytes of shared memory a CTA."""

    registers: int
    spills: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} registers, {self.spills} bytes of spills and {self.shared} of shared memory"

    @staticmethod
    def of(kernel: Compiled) -> Use:
        """That of ``kernel``."""
        return Use(kernel.registers, kernel.spills, kernel.shared)


def codes_of(program: Op, schedule: Schedule) -> tuple[Code, ...]:
    """The kernels of a fused program, those of the library left out."""
    from tilelink.backend.emit.triton import kernels_of

    # Files are named from the folder that the process runs in, here and in the kernel that the program carries.
    text = re.sub(r'file = \\?"[^"\\]*\\?"', "file", print_ir(program))
    return tuple(_code(program, text, schedule, kernel) for _, kernel in kernels_of(program))


def _code(program: Op, text: str, schedule: Schedule, kernel: Kernel) -> Code:
    from tilelink.backend.emit.offline import options_of, signature

    types, options = signature(program, kernel), options_of(program, kernel)
    skeleton = re.sub(r"\d+", "#", kernel.source)
    # Sizes of tiles are numbers in the text too, and change everything.
    dtypes = sorted({str(op["dtype"]) for op in program.find("tensor")})
    form = (skeleton, list(types.values()), dtypes, options, kernel.emitter, schedule.tiles)
    whole = (text, kernel.source, list(types.items()), options, kernel.emitter, compiler_digest())
    return Code(kernel.name, _digest(form), _digest(whole), len(kernel.source))


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


@cache
def compiler_digest() -> str:
    """Of Triton's version, of the device library, which emitted kernels call, and of the lint."""
    import triton

    library = files("tilelink.device")
    texts = {p.name: p.read_text("utf-8") for p in library.iterdir() if p.name.endswith(".py")}
    for judge in ("offline.py", "compile_worker.py", "machine_code.py"):
        texts[f"emit/{judge}"] = (files("tilelink.backend.emit") / judge).read_text("utf-8")
    return _digest((triton.__version__, sorted(texts.items())))


class Record:
    """Digests of kernels that compiled and passed the lint, and what each uses."""

    def __init__(self, kernels: dict[str, Use]) -> None:
        self.kernels = kernels

    @staticmethod
    def path() -> Path:
        """Where it lies: beside the tables."""
        return Path(str(files("tilelink.schedules") / "compiled.json"))

    @staticmethod
    def load() -> Record:
        """The record that comes with the package; empty where there is none, BadRecord where it is broken."""
        path = Record.path()
        return Record.parse(path.read_text("utf-8"), path.name) if path.exists() else Record({})

    @staticmethod
    def parse(text: str, name: str) -> Record:
        """The record that ``text`` holds; BadRecord where it holds none. ``name`` is its file's."""
        try:
            data: dict[str, Any] = json.loads(text)
            return Record({digest: Use(**use) for digest, use in data["kernels"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadRecord(place=name, detail=f"it is no record: {error}") from None

    def to_json(self) -> str:
        """One kernel a line, sorted."""
        lines = [f"  {json.dumps(d)}: {json.dumps(asdict(u))}" for d, u in self.kernels.items()]
        return '{"kernels": {\n' + ",\n".join(sorted(lines)) + "\n}}\n"

    def trusted(self, digest: str, day: date) -> bool:
        """Whether a kernel need not be compiled on ``day``."""
        due = int(digest, 16) % DAYS == day.toordinal() % DAYS
        return digest in self.kernels and not due
