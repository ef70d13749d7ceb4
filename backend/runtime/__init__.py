"""Launches emitted kernels over torch.distributed and symmetric memory, or over the interpreter.

Importing this needs neither a GPU nor a process group; the parts that do are loaded when called.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilelink import knobs
from tilelink.errors import TilelinkError
from tilelink.ir import parse_ir

if TYPE_CHECKING:
    from types import ModuleType

    import torch


def write_module(source: str, name: str) -> Path:
    """Writes emitted source to the cache folder, named by its hash; Triton needs a file to read it from."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = knobs.CACHE.get() / f"{name}_{digest}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another rank may write the same file at the same time; a rename is atomic.
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(source, encoding="utf-8")
        scratch.replace(path)
    return path


def load_module(path: str | Path) -> ModuleType:
    """The emitted module at ``path``, loaded once a process."""
    path = Path(path)
    name = f"tilelink_emitted.{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
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
