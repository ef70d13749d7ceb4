"""Launches emitted kernels over torch.distributed and symmetric memory, or over the interpreter.

Importing this needs neither a GPU nor a process group; the parts that do are loaded when called.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from tilelink import knobs
from tilelink.errors import TilelinkError
from tilelink.ir import parse_ir

if TYPE_CHECKING:
    from types import ModuleType

    import torch


def write_module(source: str, name: str) -> Path:
    """Writes emitted source to the cache folder, named by its hash; Triton needs a file to read it from.

    A file that is there holds this source, or is replaced: what is loaded from it is executed.

    Errors: BadKnob where ``TILELINK_CACHE`` is a folder that cannot be written.
    """
    data = source.encode()
    file, folder = f"{name}_{hashlib.sha256(data).hexdigest()[:16]}.py", knobs.CACHE.get()
    if folder != knobs.CACHE.default:
        try:
            return _written(folder, file, data)
        except OSError as problem:
            raise knobs.BadKnob(
                name=knobs.CACHE.name,
                text=folder,
                what=f"a folder that can be written: {problem.strerror}",
                meaning=knobs.CACHE.meaning,
                default=knobs.CACHE.default,
            ) from problem
    try:
        _own(folder)
        return _written(folder, file, data)
    except OSError:
        return _written(_private(), file, data)


def _own(folder: Path) -> None:
    """Has ``folder`` be there and this user's alone; OSError where it cannot be."""
    if not folder.is_absolute():
        raise FileNotFoundError(folder)  # nobody knows a home
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(folder)
    if status.st_mode & 0o077:
        folder.chmod(0o700)


@functools.cache
def _private() -> Path:
    """A folder of this process alone, which goes with it."""
    folder, owner = tempfile.mkdtemp(prefix="tilelink-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _written(folder: Path, file: str, data: bytes) -> Path:
    """The file of this name that holds ``data``; OSError where there is none and it cannot be written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / file
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return path
    # Another rank may write the same file at the same time; a rename is atomic.
    handle, scratch = tempfile.mkstemp(prefix=f"{file}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    return path


class _Loader(SourceFileLoader):
    """Reads the text of a module, and no bytecode beside it, which would be executed in its place."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_module(path: str | Path) -> ModuleType:
    """The emitted module at ``path``, loaded once a process."""
    path = Path(path)
    name = f"tilelink_emitted.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, loader=_Loader(name, str(path)))
        if spec is None or spec.loader is None:
            raise ImportError(str(path))
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def run_module(
    text: str,
    host: Callable[[Any], None],
    tensors: dict[str, torch.Tensor],
    group: Any = None,
    scalars: dict[str, float] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Calls an emitted module on GPUs: its IR text and ``host`` function on this rank's tensors.

    Outputs that ``tensors`` does not hold are allocated; returns them in parameter order.
    """
    from tilelink.backend.runtime.cuda import run_program

    return run_program(text, host, tensors, scalars or {}, group)


def main(text: str, host: Callable[[Any], None]) -> None:
    """Runs an emitted module on random inputs under ``torchrun`` and prints its time: what
    ``python emitted.py`` does."""
    from tilelink.backend.runtime.standalone import run_standalone

    try:
        run_standalone(parse_ir(text), text, host)
    except TilelinkError as error:
        sys.exit(str(error))
