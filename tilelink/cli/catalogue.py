"""Writes docs/errors.md: every error of the package, read from the classes themselves.

``python -m tilelink.cli.catalogue > docs/errors.md``
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import tilelink
from tilelink.errors import TilelinkError

HEAD = """\
# Errors

Every error has a code, the place of the mistake and a hint; the shape is the same for Python source,
mapping text and IR text. The command line ends with exit code 2 where the command was wrong
(`tilelink.cli.errors`, and `schedule`), with 1 for all others.
[mistakes.md](mistakes.md) shows common ones in full.

| code | meaning | message | raised by |
|---|---|---|---|
"""


def classes() -> list[type[TilelinkError]]:
    """Every error class with a message of its own, in order of code, then module."""
    for module in pkgutil.walk_packages(tilelink.__path__, "tilelink."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {cls for cls in _below(TilelinkError) if cls.__module__.startswith("tilelink.")}
    owning = [cls for cls in found if "message" in vars(cls)]
    return sorted(owning, key=lambda cls: (cls.code, cls.__module__, cls.__qualname__))


def page() -> str:
    """The whole page."""
    rows = []
    for cls in classes():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        cells = (f"`{cls.code}`", summary, cls.message, f"`{cls.__module__}`")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n".join(rows) + "\n"


def _below(cls: type[TilelinkError]) -> Iterator[type[TilelinkError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _below(child)


if __name__ == "__main__":
    print(page(), end="")
