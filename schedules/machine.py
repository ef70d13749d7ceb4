"""A host of GPUs as a handful of numbers: what the virtual clock and the cost model count with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from tilelink.errors import TilelinkError


class UnknownMachineError(TilelinkError):
    """A machine that has no description."""

    code = "unknown-machine"
    message = "there is no machine `{name}`"
    hint = "known machines: {known}"


@dataclass(frozen=True, slots=True)
class Machine:
    """One host. Rates are sustained ones; GB/s are 1e9 bytes a second; times are microseconds.

    ``tflops`` is the rate of matrix products by dtype over all ``sms`` inside a tile, and ``tile_us``
    what a tile costs on top (filling the pipeline, the epilogue). ``link_gbps`` is one direction of
    one GPU's links, to one peer or to all together. ``copy_us`` is the fixed cost of a copy-engine
    copy, ``copy_signal_us`` of the four-byte copy that signals it, ``store_signal_us`` the time from a
    release in a kernel to its sight by a peer. ``worker_copy_gbps`` is what one worker moves with
    loads and stores. ``collective_gbps`` is bus bandwidth by bytes of the whole tensor.
    """

    name: str
    description: str
    world: int
    sms: int
    tflops: Mapping[str, float]
    elementwise_tflops: float
    hbm_gbps: float
    l2_gbps: float
    tile_us: float
    link_gbps: float
    link_latency_us: float
    copy_us: float
    copy_signal_us: float
    store_signal_us: float
    worker_copy_gbps: float
    launch_us: float
    head_us: float
    collective_gbps: Mapping[str, tuple[tuple[float, float], ...]]

    @staticmethod
    def load(name: str = "h200x8") -> Machine:
        """The machine described by ``schedules/machines/NAME.json``; UnknownMachineError if none is."""
        return _load(name)

    @staticmethod
    def known() -> tuple[str, ...]:
        """Names of the machines that have a description, sorted."""
        folder = files("tilelink.schedules") / "machines"
        names = (entry.name for entry in folder.iterdir())
        return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))

    def dot_us(self, flops: float, dtype: str) -> float:
        """Time of ``flops`` of matrix products of ``dtype`` operands on the whole GPU."""
        return flops / (self.tflops.get(dtype, self.tflops["fp32"]) * 1e6)

    def link_us(self, size: float) -> float:
        """Time of ``size`` bytes on one GPU's links in one direction, without latency."""
        return size / (self.link_gbps * 1e3)

    def collective_us(self, op: str, size: float, world: int) -> float:
        """Time of the library's collective over ``world`` ranks on a whole tensor of ``size`` bytes.

        Between the points of the curve bandwidth is a power of the size, so that time never falls
        with it; below the first the time stays, above the last the bandwidth stays.
        """
        if world == 1:
            return 0.0
        curve = self.collective_gbps[op]
        share = (world - 1) / world * (2.0 if op == "all_reduce" else 1.0)
        at = max(size, curve[0][0])
        rate = curve[-1][1]
        for (low, slow), (high, fast) in pairwise(curve):
            if at <= high:
                rate = slow * (fast / slow) ** (math.log(at / low) / math.log(high / low))
                break
        return at * share / (rate * 1e3)


@cache
def _load(name: str) -> Machine:
    path = files("tilelink.schedules") / "machines" / f"{name}.json"
    if name not in Machine.known():
        raise UnknownMachineError(name=name, known=", ".join(Machine.known()))
    found: dict[str, Any] = json.loads(path.read_text())
    found["tflops"] = MappingProxyType(found["tflops"])
    found["collective_gbps"] = MappingProxyType(
        {op: tuple((a, b) for a, b in curve) for op, curve in found["collective_gbps"].items()}
    )
    return Machine(**{field.name: found[field.name] for field in fields(Machine)})
