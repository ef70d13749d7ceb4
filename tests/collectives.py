"""A process group of one process, whose backend hands collectives to functions of a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Move = Callable[[torch.Tensor, torch.Tensor], None]


class Group:
    """What the runtime asks a group for: a backend, whose collectives run on the current stream.

    ``gather`` and ``scatter`` take target and source, ``reduce`` the tensor that is summed in place.
    """

    def __init__(
        self,
        gather: Move | None = None,
        scatter: Move | None = None,
        reduce: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.gather, self.scatter, self.reduce = gather, scatter, reduce

    def _get_backend(self, device: torch.device) -> Group:
        return self

    def _allgather_base(self, target: torch.Tensor, source: torch.Tensor, options: Any) -> None:
        assert not options.asyncOp and self.gather is not None
        self.gather(target, source)

    def _reduce_scatter_base(
        self, target: torch.Tensor, source: torch.Tensor, options: Any
    ) -> None:
        assert not options.asyncOp and self.scatter is not None
        self.scatter(target, source)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
        assert not options.asyncOp and self.reduce is not None
        (tensor,) = tensors
        self.reduce(tensor)
