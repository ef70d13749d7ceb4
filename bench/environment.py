"""What a measurement ran on: hardware, versions, and the switches that change the figures."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from tilelink.tuning import NO_MULTICAST

# A rank that fails before it launches must end the wait of the others well before a run is given up.
ARRIVAL_SECONDS = "20"
NOTE = "NCCL without NVLink multicast"


def prepare() -> None:
    """Set the switches before torch is imported; exit where multicast would be on."""
    os.environ.setdefault("TILELINK_ARRIVAL_TIMEOUT", ARRIVAL_SECONDS)
    for name, value in NO_MULTICAST.items():
        if os.environ.setdefault(name, value) != value:
            sys.exit(f"{name}={os.environ[name]}: these figures are taken with {name}={value}")


def without_folder(argument: str) -> str:
    """An argument as it is, absolute paths (several by comma) without the folders of this machine."""
    parts = argument.split(",")
    return ",".join(os.path.basename(part) if os.path.isabs(part) else part for part in parts)


def describe(world: int) -> dict[str, Any]:
    """Hardware, versions and settings as JSON data. Needs a CUDA device."""
    import torch
    import triton

    nccl: Any = torch.cuda.nccl
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.executable), *map(without_folder, sys.argv)],
        "world": world,
        "note": NOTE,
        "hardware": {
            "gpu": properties.name,
            "gpus": world,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cpus": os.cpu_count(),
            "driver": _driver(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "nccl": ".".join(str(part) for part in nccl.version()),
            "tilelink": _tilelink(),
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "TORCH_SYMM", "TILELINK_", "CUDA_DEVICE_MAX", "NVSHMEM_"))
        },
    }


def hardware_line(run: dict[str, Any]) -> str:
    """One line of what :func:`describe` gave."""
    hardware, versions = run["hardware"], run["versions"]
    return (
        f"{hardware['gpus']} x {hardware['gpu']}, driver {hardware['driver']}, "
        f"torch {versions['torch']}, CUDA {versions['cuda']}, triton {versions['triton']}, "
        f"NCCL {versions['nccl']}; {run['note']}"
    )


def _driver() -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _tilelink() -> str:
    try:
        return metadata.version("tilelink")
    except metadata.PackageNotFoundError:
        return "source tree"
