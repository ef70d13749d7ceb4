"""Torch views of user tensors and arena regions: what both kinds of call hand to an emitted module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from tilelink.backend.dtypes import TORCH_DTYPES as TORCH_DTYPES
from tilelink.backend.emit.kernel import compile_options
from tilelink.backend.runtime.image import Image, Slot
from tilelink.ir import layout

# Rows of a box of TMA, at most, but for the one that is there.
MOST_BEHIND = 255


class Rows:
    """A contiguous matrix ``tensor`` with ``rows`` rows, more than it has, as far as a descriptor can tell."""

    def __init__(self, tensor: torch.Tensor, rows: int) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self.shape = torch.Size((rows, *tensor.shape[1:]))

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self.tensor.data_ptr()

    def stride(self) -> tuple[int, ...]:
        """The strides, in elements: of one row alone, the tensor's may be any."""
        return self.shape[1], 1


class Views:
    """Names of a program resolved to tensors of this process.

    ``arenas``: one 1-D uint8 tensor a rank, the arena of that rank as this process sees it.
    ``tensors``: the user's tensors (and outputs) by name; ``scalars``: by name.
    ``extents``: the dynamic ones. ``workspace``: 1-D uint8, this rank's own memory for local buffers.
    """

    def __init__(
        self,
        image: Image,
        rank: int,
        arenas: list[torch.Tensor],
        peers: torch.Tensor,
        progress: float,
        arrival: float,
    ) -> None:
        self.image = image
        self.rank = rank
        self.world = image.world
        self.program = 0  # its number in error records
        self.host_record = 0  # address of pinned memory for the error record; 0: there is none
        self.arena = arenas[rank].view(torch.int32)
        self.peers = peers
        self.progress_ns = int(progress * 1e9)
        self.arrival_ns = int(arrival * 1e9)
        self.tensors: dict[str, torch.Tensor] = {}
        self.scalars: dict[str, float] = {}
        self.extents: dict[str, int] = dict(image.dynamic)
        self._arenas = arenas
        self.workspace: torch.Tensor | None = None
        self._named = {"launch": 0, "collective": 0}
        self._buffers: dict[tuple[str, int | None, int], torch.Tensor] = {}
        self._descriptors: dict[tuple[object, ...], Any] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The user's tensor ``name``: this rank's shard where it is spread."""
        return self.tensors[name]

    def scalar(self, name: str) -> float:
        """The scalar parameter ``name``."""
        return self.scalars[name]

    def extent(self, name: str) -> int:
        """The value of the dynamic extent ``name`` in this call."""
        return self.extents[name]

    def next_name(self, kind: str) -> str:
        """The symbol of the next ``launch`` or ``collective``: they come in program order."""
        number = self._named[kind]
        self._named[kind] = number + 1
        return (self.image.launches if kind == "launch" else self.image.collectives)[number]

    def buffer(self, name: str, peer: int | None = None, slot: int = 0) -> torch.Tensor:
        """The buffer ``name`` of this rank, or in the arena of ``peer``: its dims and dtype.

        ``slot``: that of calls of an even epoch, 0, or of an odd one, 1, of a buffer that lies in two.
        """
        alias = self.image.buffers[name].alias
        if alias and peer is None:
            return self.tensor(alias) if alias in self.image.tensors else self.buffer(alias)
        found = self._buffers.get((name, peer, slot))
        if found is None:
            place = self.image.buffer_at(name, self.extents)
            if place.local and (peer is not None or self.workspace is None):
                raise ValueError(f"no workspace holds @{name} of rank {peer}")
            where = (
                self.workspace if place.local else self._arenas[self.rank if peer is None else peer]
            )
            assert where is not None
            if slot:
                place = replace(place, offset=place.offset + slot * layout.SLOT_BYTES)
            found = self._buffers[name, peer, slot] = view_of(where, place)
        return found

    def endless(self, tensor: torch.Tensor) -> torch.Tensor | Rows:
        """``tensor``, and what may be read behind it: nothing where nobody knows."""
        return tensor

    def room(self, name: str, slot: int = 0) -> torch.Tensor | Rows:
        """All that the buffer ``name`` of this rank may take, where its dims depend on a dynamic extent; an input
        with as many rows as there are, and what may be read behind them.

        TMA takes longer to fill in what lies past the end of a tensor than to read what nobody looks at.
        """
        if name in self.image.tensors:
            return self.endless(self.tensors[name])
        place = self.image.buffers[name]
        if place.local:
            raise ValueError(f"@{name} is no symmetric buffer")
        place = replace(place, offset=place.offset + slot * layout.SLOT_BYTES)
        return view_of(self._arenas[self.rank], place)

    def descriptor(
        self,
        view: torch.Tensor | Rows,
        block_shape: list[int] | tuple[int, ...],
        emitter: str = "triton",
    ) -> Any:
        """A tensor descriptor of ``view`` with blocks of ``block_shape`` elements, for a kernel of ``emitter``."""
        key = (view.data_ptr(), view.dtype, view.shape, view.stride(), tuple(block_shape), emitter)
        found = self._descriptors.get(key)
        if found is None:
            if len(self._descriptors) >= 256:
                self._descriptors.clear()
            found = self._descriptors[key] = _descriptor(view, list(block_shape), emitter)
        return found

    def word_of(self, name: str, index: tuple[int, ...]) -> int:
        """The word number of an element of a flag or counter."""
        slots = self.image.flags if name in self.image.flags else self.image.counters
        return slots[name].element(tuple(index))

    def options(self, kernel: Any, warps: int, stages: int) -> dict[str, int]:
        """What the kernel of a launch is compiled with."""
        words = any(buffer.encoding for buffer in self.image.buffers.values())
        gluon = getattr(kernel, "is_gluon", bool)()
        return compile_options(warps, stages, words, self.image.folded and not gluon)

    def head_arguments(self, ack_wait: bool) -> tuple[object, ...]:
        """Arguments of ``tilelink.device.head_kernel``."""
        first, last = self.image.counter_words
        return (
            self.arena,
            self.peers,
            self.rank,
            first,
            last,
            self.progress_ns,
            self.arrival_ns,
            self.image.ack_word,
            self.world,
            bool(ack_wait),
            bool(self.image.flags),
            self.program,
            self.said(),
        )

    def wait_arguments(
        self, flag: str, index: tuple[int, ...], producer: int, tile: int, wait: int
    ) -> tuple[object, ...]:
        """Arguments of ``tilelink.device.wait_kernel``."""
        word = self.word_of(flag, index)
        limits = (self.progress_ns, self.arrival_ns)
        return (self.arena, self.peers, self.rank, word, producer, tile, wait, *limits, self.world)

    def acknowledge_arguments(self) -> tuple[object, ...]:
        """Arguments of ``tilelink.device.acknowledge_kernel``."""
        return self.arena, self.peers, self.rank, self.image.ack_word, self.world

    def said(self) -> int:
        """What ``head`` tells the peers beside the program's number, who compare it: the value of the dynamic
        extent, or 0."""
        return next(iter(self.extents.values()), 0)


def view_of(arena: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The region of ``slot`` in a uint8 arena, with its dims and dtype."""
    region = arena[slot.offset : slot.offset + slot.bytes]
    return region.view(TORCH_DTYPES[slot.dtype]).view(slot.dims)


def spread_axis(shard: Sequence[int], whole: Sequence[int]) -> int:
    """The axis along which ``whole`` holds the ``shard`` of every rank; 0 where there is one rank."""
    return next((n for n, (a, b) in enumerate(zip(shard, whole, strict=True)) if a != b), 0)


def record_words(arena: torch.Tensor) -> list[int]:
    """The error record of an int32 arena, as host integers; the first is nonzero once it is written."""
    return [int(v) for v in arena[layout.RECORD : layout.RECORD + layout.RECORD_WORDS].tolist()]


def _descriptor(view: torch.Tensor | Rows, block: list[int], emitter: str) -> Any:
    if emitter == "gluon":
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Gluon

        from tilelink.device.roles import descriptor_layout

        dtype = getattr(tl, str(view.dtype).removeprefix("torch."))
        return Gluon.from_tensor(view, block, descriptor_layout(block, dtype))
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(view, block)


@contextmanager
def lasting() -> Iterator[None]:
    """Where tensors are made that outlive a call, and views of them: any later call may write to them.

    To one that was made in PyTorch's inference mode only calls in that mode could. Also a decorator.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def clear_words(memory: torch.Tensor) -> None:
    """Leaves no word of a call in an arena, ``memory`` (uint8). Beside slots this is data like any other."""
    memory[layout.WORDS : layout.SENTINELS].zero_()
    memory[layout.SENTINELS :].fill_(layout.EMPTY & 0xFF)
