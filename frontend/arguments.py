"""What the tensors of a call must be, before anything is compiled: errors name the argument."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tilelink.errors import TilelinkError
from tilelink.frontend.errors import BadCall, NeedsGradient, NoStorage, ShapeMismatch


def check_tensor(name: str, value: Any, stored: bool) -> None:
    """BadCall where an argument is no dense tensor with memory of its own, or asks for a gradient.

    ``stored``: the kernel writes to it.
    """
    torch = sys.modules.get("torch")
    if value is None or torch is None:
        return
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        place = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise BadCall(
            what=f"argument `{name}` is a {place}{kind.__qualname__}, not a tensor",
            advice="pass a torch.Tensor (of a NumPy array: torch.from_numpy)",
        )
    if value.layout != torch.strided:
        raise BadCall(
            what=f"argument `{name}` is sparse ({value.layout})",
            advice=f"pass `{name}.to_dense()`",
        )
    _check_storage(name, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise NeedsGradient(name=name)
    if stored and any(
        step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)
    ):
        raise BadCall(
            what=f"argument `{name}` is written to, but several of its elements share their memory",
            advice=f"pass `{name}.contiguous()`: an expanded tensor cannot be an output",
        )


def _check_storage(name: str, value: Any) -> None:
    """NoStorage where a tensor stands for another one, or for none, so that no memory is behind it."""
    if has_storage(value):
        return
    kind = type(value).__name__
    advice = f"pass the tensor that `{name}` wraps"
    if kind == "FakeTensor":
        what = "is a FakeTensor, which torch.compile or torch.export traces with"
        advice = (
            "`tilelink.ops` has operators that can be traced; a kernel of your own becomes one by "
            "torch.library.custom_op with register_fake"
        )
    elif value.is_meta:
        what, advice = "is on the meta device", "pass a tensor with data"
    elif kind in ("DTensor", "AsyncCollectiveTensor"):
        what = f"is a {kind}"
        advice = f"pass `{name}.{'to_local' if kind == 'DTensor' else 'wait'}()`"
    elif kind in ("Tensor", "Parameter"):
        what = "is inside a transform of torch.func"
        advice = "call the kernel outside of it: vmap, grad and others do not see into a kernel"
    else:
        what = f"is a {kind}"
    raise NoStorage(name=name, what=what, advice=advice)


def has_storage(value: Any) -> bool:
    """Whether a tensor has memory; one without elements has none to be read, and counts as if it had."""
    try:
        return bool(value.untyped_storage().data_ptr()) or not value.numel()
    except (RuntimeError, NotImplementedError):  # of wrappers
        return False


def check_apart(ranks: Sequence[Mapping[str, Any]], stored: Iterable[str]) -> None:
    """BadCall where a tensor that the kernel writes shares memory with another one of the call.

    ``ranks``: the tensors of each rank by name, None for those that are allocated. Tiles are read and
    written in no order, so what is read could already be overwritten.
    """
    spans = [
        (name, rank, value.device, *_span(value))
        for rank, tensors in enumerate(ranks)
        for name, value in tensors.items()
        if value is not None and value.numel()
    ]
    for name, rank, device, low, high in spans:
        if name not in stored:
            continue
        for other, where, place, start, stop in spans:
            if (other, where) == (name, rank) or place != device or low >= stop or start >= high:
                continue
            if other == name:
                raise BadCall(
                    what=f"argument `{name}` is the same memory on rank {rank} and rank {where}",
                    advice="pass a list of one tensor a rank, or leave the output out",
                )
            raise BadCall(
                what=f"argument `{name}` is written to, but shares memory with `{other}`",
                advice="pass a tensor of its own, or leave the output out to have it allocated",
            )


def _span(value: Any) -> tuple[int, int]:
    """The first byte of a tensor's elements, and one past the last."""
    last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    start = int(value.data_ptr())
    return start, start + (last + 1) * value.element_size()


def check_same(first: Mapping[str, Any], other: Mapping[str, Any], rank: int) -> None:
    """ShapeMismatch naming the first argument of rank ``rank`` that is not as that of rank 0."""
    for name, value in first.items():
        mine, theirs = _facts(other.get(name)), _facts(value)
        if mine != theirs:
            raise ShapeMismatch(
                left=f"argument `{name}` of rank {rank} ({mine})",
                right=f"that of rank 0 ({theirs})",
                advice="all ranks pass the same shapes, element types and numbers",
            )


def _facts(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value) if value is None or isinstance(value, int | float | str) else "an object"


def on_rank(error: TilelinkError, rank: int) -> TilelinkError:
    """``error`` with a note that says which rank's arguments it is about."""
    error.notes = (*error.notes, f"in the arguments of rank {rank}")
    error.args = (error.render(),)
    return error
