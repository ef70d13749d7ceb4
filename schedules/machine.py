"""A host of GPUs as a handful of numbers: what the virtual clock and the cost model count with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
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
    hint = "known machines: {known}; fewer GPUs of one are known too"


class BadMachineError(TilelinkError):
    """A description of a machine that lacks a field, or has one of another kind."""

    code = "bad-machine"
    message = "this is no description of a machine: {detail}"
    hint = "`tilelink tune --calibrate` writes one; docs/tuning.md lists the fields"


@dataclass(frozen=True, slots=True)
class Emitter:
    """What generated code of one kind costs beside the tensor cores' work, microseconds.

    ``step_us``: a step of the main loop (barriers, addresses). ``tile_us``: a tile, where the next tile's
    loads start behind its epilogue (filling the pipeline, the stores); ``flat_us``: the same where they
    are under way meanwhile. ``issue``: what passes between two instructions of a product, in columns of one.
    """

    step_us: float
    tile_us: float
    flat_us: float
    issue: float = 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """One host. GB/s are 1e9 bytes a second; times are microseconds.

    ``device`` is the name that CUDA gives its GPUs, ``kin`` those of GPUs so much alike that the description, and
    what was tuned on one of them, is a first guess for the others where they have none of their own. ``tflops``
    is the sustained rate of matrix products by dtype over all ``sms``; when products begin it is higher by
    ``burst`` (a share), which power limits take back with the time constant ``burst_us``. ``hbm_gbps`` is the
    bandwidth of memory, and ``sum_gbps`` what stages without a product draw of it. ``load_us`` is the latency of
    a tile's load. ``emitters`` says what code costs on top. ``contention`` is the share of the computing rate
    that is lost while the links of the GPU are busy. ``link_gbps`` is one direction of one GPU's links, to one
    peer or to all together. ``copy_us`` is the fixed cost of a copy-engine copy, ``copy_signal_us`` of the four-
    byte copy that signals it, ``store_signal_us`` the time from a release in a kernel to its sight by a peer.
    ``worker_copy_gbps`` is what one worker moves with loads and stores, ``bulk_copy_gbps`` with TMA,
    ``push_gbps`` with the stores of a tile alone. ``read_gbps`` is what all workers together read from memory of
    all peers beside products, ``box_gbps`` what all workers that copy boxes beside products with roles send to
    all peers together; both are ``link_gbps`` where a description does not say. ``copy_drag`` and ``store_drag``:
    while products draw a share of the bandwidth of memory for operands that the cache cannot hold, copies and
    the stores of tiles take longer by this times the share. ``store_gbps``: for as long as the tile that a
    worker has stored to a peer takes at this rate, it computes nothing of its next one. ``fill_us`` is what TMA
    takes for 128 bytes that lie past the end of a tensor, beyond what it takes to read them. ``poll_us`` is one
    look of a worker at a flag. ``launch_us``, ``head_us`` and ``finish_us`` are fixed costs of a kernel, of the
    start and of the end of a call, ``stream_us`` of handing over to a side stream and ``stream_wait_us`` of a
    stream's wait for a counter. ``collective_gbps`` is bus bandwidth by number of ranks, collective and bytes of
    the whole tensor.
    """

    name: str
    description: str
    device: str
    kin: tuple[str, ...]
    world: int
    sms: int
    tflops: Mapping[str, float]
    burst: float
    burst_us: float
    elementwise_tflops: float
    hbm_gbps: float
    sum_gbps: float
    l2_gbps: float
    l2_bytes: int
    load_us: float
    emitters: Mapping[str, Emitter]
    contention: float
    link_gbps: float
    link_latency_us: float
    copy_us: float
    copy_signal_us: float
    store_signal_us: float
    worker_copy_gbps: float
    bulk_copy_gbps: float
    push_gbps: float
    read_gbps: float
    box_gbps: float
    copy_drag: float
    store_drag: float
    store_gbps: float
    fill_us: float
    poll_us: float
    launch_us: float
    head_us: float
    stream_us: float
    stream_wait_us: float
    finish_us: float
    collective_gbps: Mapping[int, Mapping[str, tuple[tuple[float, float], ...]]]

    @staticmethod
    def load(name: str = "h200x8") -> Machine:
        """The machine described by ``schedules/machines/NAME.json``, or fewer GPUs of it.

        ``h200x4`` is four GPUs of ``h200x8`` where it has no description of its own.
        UnknownMachineError if there is none.
        """
        return _load(name)

    @staticmethod
    def of_device(device: str, world: int) -> Machine | None:
        """The description of ``world`` GPUs that CUDA calls ``device``; of kin where none of its own has as many.

        None if there is none.
        """
        known = [Machine.load(name) for name in Machine.known()]
        wide = sorted((m for m in known if m.world >= world), key=lambda m: (m.world, m.name))
        found = [m for m in wide if m.device == device] or [m for m in wide if device in m.kin]
        if not found:
            return None
        return replace(found[0], world=world, name=_with_world(found[0].name, world))

    @staticmethod
    def kin_of(device: str) -> tuple[str, ...]:
        """The other devices that share a description with CUDA's ``device``, sorted."""
        known = [(m.device, *m.kin) for m in map(Machine.load, Machine.known())]
        return tuple(sorted({kin for some in known if device in some for kin in some} - {device}))

    @staticmethod
    def from_json(text: str) -> Machine:
        """The machine that a JSON object describes; BadMachineError where it does not."""
        try:
            return _parse(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadMachineError(detail=f"{type(error).__name__}: {error}") from None

    def to_json(self) -> str:
        """Indented JSON that :meth:`from_json` reads back."""
        data = {field.name: getattr(self, field.name) for field in fields(Machine)}
        data["tflops"] = dict(self.tflops)
        data["emitters"] = {name: asdict(made) for name, made in self.emitters.items()}
        data["collective_gbps"] = {
            str(world): {op: [list(point) for point in curve] for op, curve in curves.items()}
            for world, curves in self.collective_gbps.items()
        }
        return json.dumps(data, indent=2) + "\n"

    @staticmethod
    def known() -> tuple[str, ...]:
        """Names of the machines that have a description, sorted."""
        folder = files("tilelink.schedules") / "machines"
        names = (entry.name for entry in folder.iterdir())
        return tuple(sorted(n.removesuffix(".json") for n in names if n.endswith(".json")))

    def emitter(self, name: str) -> Emitter:
        """The costs of the code that ``name`` emits; those of ``triton`` where it is not described."""
        return self.emitters.get(name) or self.emitters["triton"]

    def dot_us(self, flops: float, dtype: str, now: float = math.inf) -> float:
        """Time of ``flops`` of matrix products of ``dtype`` operands on the whole GPU.

        ``now``: microseconds since the first product; by default power limits have set in. The rate falls
        meanwhile: at t it is the sustained one times 1 + burst exp(-t / burst_us).
        """
        sustained = flops / (self.tflops.get(dtype, self.tflops["fp32"]) * 1e6)
        gain = self.burst * math.exp(-now / self.burst_us)
        taken = sustained / (1.0 + gain)
        if taken < 0.01 * self.burst_us:
            return taken
        # Newton's method on the work done; it is concave in the time, so that this converges from below.
        for _ in range(4):
            decay = math.exp(-taken / self.burst_us)
            done = taken + gain * self.burst_us * (1.0 - decay)
            taken += (sustained - done) / (1.0 + gain * decay)
        return taken

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
        curve = self._curve(op, world)
        share = (world - 1) / world * (2.0 if op == "all_reduce" else 1.0)
        at = max(size, curve[0][0])
        rate = curve[-1][1]
        for (low, slow), (high, fast) in pairwise(curve):
            if at <= high:
                rate = slow * (fast / slow) ** (math.log(at / low) / math.log(high / low))
                break
        return at * share / (rate * 1e3)

    def _curve(self, op: str, world: int) -> tuple[tuple[float, float], ...]:
        """The curve measured at the number of ranks nearest to ``world``, the larger one of two."""
        known = [w for w, curves in self.collective_gbps.items() if op in curves]
        nearest = min(known, key=lambda w: (abs(math.log(w / world)), -w))
        return self.collective_gbps[nearest][op]


@cache
def _load(name: str) -> Machine:
    known = Machine.known()
    if name in known:
        text = (files("tilelink.schedules") / "machines" / f"{name}.json").read_text()
        return Machine.from_json(text)
    base, _, world = name.rpartition("x")
    if world.isdecimal() and int(world) > 0:
        for other in known:
            machine = _load(other)
            if other.rpartition("x")[0] == base and machine.world >= int(world):
                return replace(machine, world=int(world), name=name)
    raise UnknownMachineError(name=name, known=", ".join(known))


def _with_world(name: str, world: int) -> str:
    return f"{name.rpartition('x')[0]}x{world}"


def _parse(found: dict[str, Any]) -> Machine:
    found = dict(found)
    found["tflops"] = MappingProxyType(dict(found["tflops"]))
    found["emitters"] = MappingProxyType({n: Emitter(**e) for n, e in found["emitters"].items()})
    found["collective_gbps"] = MappingProxyType(
        {
            int(world): MappingProxyType(
                {op: tuple((float(a), float(b)) for a, b in curve) for op, curve in curves.items()}
            )
            for world, curves in found["collective_gbps"].items()
        }
    )
    for rate in ("read_gbps", "box_gbps"):
        found.setdefault(rate, found["link_gbps"])
    found.setdefault("copy_drag", 0.0)
    found.setdefault("store_drag", 0.0)
    found.setdefault("store_gbps", math.inf)
    found.setdefault("fill_us", 0.0)
    found["kin"] = tuple(found.get("kin", ()))
    return Machine(**{field.name: found[field.name] for field in fields(Machine)})
