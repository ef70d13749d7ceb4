"""What is tuned: a kernel at a shape, on a number of ranks; data that another process can be given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from tilelink.ir import Op
from tilelink.kernel import Kernel, load_kernels
from tilelink.schedules.tables import Table, dtype_of, kernel_key, world_of

READY_MADE = "tilelink.kernels"


@dataclass(frozen=True, slots=True)
class Problem:
    """A kernel of ``file`` (a path, or ``tilelink.kernels``) at ``extents`` by name, on ``world`` ranks.

    ``dtype``: of its floating-point arguments. ``present``: tensors that are given, None for those without
    a default. ``constants``: compile-time arguments by name.
    """

    file: str
    kernel: str
    extents: Mapping[str, int]
    world: int
    dtype: str = "bf16"
    present: tuple[str, ...] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cell(self) -> str:
        """A name: ``ag_gemm M=8192 K=8192 N=7168 bf16 x4``, and what is not usual."""
        shape = " ".join(f"{name}={value}" for name, value in self.extents.items())
        extra = [f"{n}={v}" for n, v in sorted(self.constants.items())]
        extra += [f"with {','.join(self.present)}"] if self.present is not None else []
        return " ".join([self.kernel, shape, self.dtype, f"x{self.world}", *extra])

    def decorated(self) -> Kernel:
        """The kernel object. KeyError where the file has none of this name."""
        return _kernels(self.file)[self.kernel]

    def build(self) -> Op:
        """The typed kernel (Tile IR)."""
        return self.decorated().build(
            self.extents,
            {},
            self.world,
            self.present,
            self.constants or None,
            self.dtype,
        )

    def table(self, device: str) -> Table:
        """An empty table for this kernel on GPUs that CUDA calls ``device``."""
        op = self.build()
        return Table(
            kernel=self.kernel,
            key=kernel_key(op),
            dtype=dtype_of(op),
            world=world_of(op),
            device=device,
            runs=(),
            entries=(),
            present=self.present,
            constants=self.constants,
        )

    def to_json(self) -> str:
        """One line that :meth:`from_json` reads back."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Problem:
        """The problem that ``text`` holds."""
        data = json.loads(text)
        present = data["present"]
        return Problem(**{**data, "present": None if present is None else tuple(present)})


def problem_of(table: Table, extents: Mapping[str, int]) -> Problem:
    """The ready-made kernel of a table at a shape."""
    return Problem(
        READY_MADE,
        table.kernel,
        dict(extents),
        table.world,
        table.dtype,
        table.present,
        table.constants,
    )


@lru_cache(maxsize=64)
def _kernels(file: str) -> Mapping[str, Kernel]:
    if file == READY_MADE:
        import tilelink.kernels

        found = {name: getattr(tilelink.kernels, name) for name in tilelink.kernels.__all__}
        return {name: value for name, value in found.items() if isinstance(value, Kernel)}
    return load_kernels(file)
