"""``tilelink env``: versions, GPUs, links, and what each backend needs and lacks."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from tilelink import knobs
from tilelink.cli import table

PACKAGES = ("tilelink", "torch", "triton", "numpy", "lark", "networkx")


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "env",
        help="versions, GPUs, links, what each backend needs and lacks",
        description="Print the versions, GPUs and links of this machine, and what each backend needs "
        "and lacks here.",
    )
    parser.set_defaults(execute=execute)


def execute(_: argparse.Namespace) -> int:
    """Prints the report; never fails for something that is missing."""
    print("versions")
    print(table.pairs([("python", platform.python_version()), *versions()]))
    devices = gpus()
    print("\nGPUs")
    print("\n".join(f"  {line}" for line in devices) or "  none")
    links = peers()
    if links:
        print("\nlinks (row can read and write the memory of column)")
        print("\n".join(f"  {line}" for line in links))
    print("\nbackends")
    rows = [[name, needs, lacks or "nothing"] for name, needs, lacks in backends()]
    print(table.render(["", "needs", "lacks here"], rows, indent="  "))
    print("\nsettings")
    settings = [[knob.name, str(knob.get()), knob.meaning] for knob in knobs.KNOBS]
    print(table.render(["", "value", "meaning"], settings, indent="  "))
    return 0


def versions() -> list[tuple[str, str]]:
    """Each package with its installed version, read without importing it."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def gpus() -> list[str]:
    """One line a CUDA device."""
    cuda = _cuda()
    lines = []
    for number in range(cuda.device_count() if cuda else 0):
        known = cuda.get_device_properties(number)
        lines.append(
            f"{number}  {known.name}  sm_{known.major}{known.minor}  "
            f"{known.multi_processor_count} SMs  {table.size(known.total_memory)}"
        )
    return lines


def peers() -> list[str]:
    """The peer access matrix, a line a device; nothing below two devices."""
    cuda = _cuda()
    count = cuda.device_count() if cuda else 0
    if count < 2:
        return []
    access = [
        " ".join(
            "-" if a == b else "y" if cuda.can_device_access_peer(a, b) else "n"
            for b in range(count)
        )
        for a in range(count)
    ]
    return [f"{a}  {line}" for a, line in enumerate(access)]


def backends() -> list[tuple[str, str, str]]:
    """Name, needs and lacks (empty: nothing) of every backend and of the offline compiler."""
    torch = "" if find_spec("torch") else "torch"
    triton = "" if find_spec("triton") else "triton"
    return [
        ("reference", "torch", torch),
        ("simulate", "torch, numpy", torch),
        ("interpret", "torch, triton, numpy below 2.4", _join(torch, triton, _numpy_too_new())),
        ("emit --stage ttgir|ptx|sass", "triton with its ptxas; no GPU", triton),
        (
            "cuda",
            "torch, triton 3.6, two or more linked GPUs of sm_90, torchrun",
            _join(torch, triton, _triton_version(), _devices()),
        ),
    ]


def lacking(backend: str) -> str:
    """What ``backend`` lacks on this machine, or an empty string."""
    return next(lacks for name, _, lacks in backends() if name == backend)


def _cuda() -> Any:
    if not find_spec("torch"):
        return None
    import torch

    return torch.cuda if torch.cuda.is_available() else None


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _numpy_too_new() -> str:
    version = dict(versions())["numpy"]
    numbers = version.split(".")[:2]
    if len(numbers) == 2 and all(n.isdecimal() for n in numbers):
        return (
            f"numpy below 2.4 (have {version})"
            if (int(numbers[0]), int(numbers[1])) >= (2, 4)
            else ""
        )
    return "numpy"


def _triton_version() -> str:
    version = dict(versions())["triton"]
    return (
        ""
        if version.startswith("3.6") or version == "not installed"
        else f"triton 3.6 (have {version})"
    )


def _devices() -> str:
    cuda = _cuda()
    if cuda is None:
        return "a CUDA device"
    if cuda.device_count() < 2:
        return "a second GPU"
    capability = min(cuda.get_device_capability(n) for n in range(cuda.device_count()))
    return "" if capability[0] == 9 else f"sm_90 (have sm_{capability[0]}{capability[1]})"
