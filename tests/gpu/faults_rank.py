"""One rank of ``tests.gpu.faults``: its process group, its calls, and what it answers."""

from __future__ import annotations

import os
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tilelink import kernels
from tilelink.backend.emit.triton import emit
from tilelink.backend.pipeline import compile_kernel
from tilelink.backend.runtime import interpret, watch
from tilelink.errors import TilelinkError
from tilelink.schedules import default_schedule

PATIENCE = 100.0  # seconds without a request after which a rank ends itself
Pair = tuple[torch.Tensor, torch.Tensor]


class Engine:
    """The kernels under test on this rank; what differs between GPUs and the interpreter."""

    M, K, N = 768, 512, 512
    dtype = torch.bfloat16
    device = "cuda"
    wide = 64  # what a mismatched rank has more of N

    def __init__(self, spec: dict[str, Any]) -> None:
        self.rank = spec["rank"]
        if spec["world"] > 4:
            self.M = 1680  # a multiple of every number of ranks up to 8

    def begin(self) -> None:
        """Before the process group is made."""
        torch.cuda.set_device(self.rank)

    def launch(self, name: str, group: Any, a: torch.Tensor, b: torch.Tensor, *c: Any) -> Any:
        """One call of a kernel; ``c``: the output, if it is to be that tensor."""
        op = getattr(kernels, name)
        schedule = self._schedule(name, group.size(), b.shape[1])
        return op.on(group=group, schedule=schedule)(a, b, *c)

    def _schedule(self, name: str, world: int, n: int) -> Any:
        key = (name, world, n)
        if key not in _schedules:
            op = getattr(kernels, name).build(
                {"M": self.M, "K": self.K, "N": n}, world=world, dtype="bf16"
            )
            plan = default_schedule(op)
            _schedules[key] = plan.with_resource("epilogue") if name == "gemm_ar" else plan
        return _schedules[key]

    def recover(self, group: Any) -> Any:
        """The group of the live ranks."""
        from tilelink.backend.runtime.recover import recover

        return recover(group, timeout=30.0)

    def lose(self, group: Any, peer: int, signals: int) -> None:
        """In the next call of gemm_ar all that this rank pushes to ``peer`` goes nowhere.

        The address of the peer in this rank's table is another memory's behind the head of that call,
        and the right one again behind its kernel.
        """
        del signals
        from tilelink.backend.runtime import cuda
        from tilelink.backend.runtime.arena import state_of
        from tilelink.backend.runtime.driver import driver

        state = state_of(group)
        found = [known.program for known in cuda._kernels.values() if known.program.state is state]
        # The one that was met last, and its newest plan, are those of the call just made.
        program = next(p for p in reversed(found) if p.image.name == "gemm_ar")
        plan = list(program._plans.values())[-1]
        arena = program.arena
        self.nowhere = torch.zeros(arena.size, dtype=torch.uint8, device="cuda")
        self.addresses = torch.tensor(
            [self.nowhere.data_ptr(), arena.addresses[peer]], dtype=torch.int64
        ).pin_memory()
        torch.cuda.synchronize()
        entry, source = arena.peers.data_ptr() + 8 * peer, self.addresses.data_ptr()
        commands = plan._commands
        (launch,) = plan.launches
        kernel = next(i for i, c in enumerate(commands) if getattr(c, "__self__", None) is launch)
        left = {"calls": 1}

        def swap(which: int) -> Any:
            def command(stream: int, _: object) -> None:
                if left["calls"] > 0:
                    driver().copy(stream, entry, source + 8 * which, 8)
                    left["calls"] -= which

            return command

        commands.insert(kernel + 1, swap(1))
        commands.insert(kernel, swap(0))

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """On this rank's device."""
        return values.to(self.dtype).to(self.device)


class LocalEngine(Engine):
    """The same on the interpreter, with shared memory."""

    M, K, N = 96, 32, 32
    dtype = torch.float32
    device = "cpu"
    wide = 32

    def begin(self) -> None:
        """Nothing to choose."""
        torch.set_num_threads(1)

    def launch(self, name: str, group: Any, a: torch.Tensor, b: torch.Tensor, *c: Any) -> Any:
        """One call of a kernel."""
        from tilelink.backend.runtime import local

        key = (name, group.size(), b.shape[1])
        if key not in _schedules:
            extents = {"M": self.M, "K": self.K, "N": b.shape[1]}
            op = getattr(kernels, name).build(extents, world=group.size(), dtype="fp32")
            program = interpret.plan(compile_kernel(op, None))
            _schedules[key] = emit(program), program
        source, program = _schedules[key]
        given = {"A": a, "B": b, **dict(zip(("C",), c, strict=False))}
        return local.state_of(group).call(source, program, given)["C"]

    def recover(self, group: Any) -> Any:
        """The group of the live ranks."""
        from tilelink.backend.runtime import local
        from tilelink.backend.runtime.recover import recover_state

        return recover_state(local.state_of(group), group, "cpu", 30.0)

    def lose(self, group: Any, peer: int, signals: int) -> None:
        """The signal number ``signals`` from here on is lost."""
        del peer
        from tests.assurance.faulty import break_rank
        from tilelink.backend.runtime import local

        state = local.state_of(group)
        self.undo = break_rank(state.arenas[-1].shared, "lost", state.rank, signals, 0.0)


_schedules: dict[Any, Any] = {}


class Rank:
    """What a rank does when it is told to."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.engine = (LocalEngine if spec["cpu"] else Engine)(spec)
        os.environ["TILELINK_ARRIVAL_TIMEOUT"] = str(spec["arrival"])
        self.engine.begin()
        client = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", spec["port"], None, False, timeout=timedelta(seconds=60)
        )
        store = dist.PrefixStore(f"start{spec['start']}", client)  # type: ignore[attr-defined]
        dist.init_process_group(
            "gloo" if spec["cpu"] else "nccl",
            store=store,
            rank=spec["rank"],
            world_size=spec["world"],
            timeout=timedelta(seconds=60),
        )
        self.group: Any = dist.group.WORLD
        self.seed = 0
        self.graph: Any = None

    def inputs(self, name: str, seed: int, n: int | None = None) -> list[Pair]:
        """A and B of every rank of the group: -1, 0 or 1, so that every sum is exact."""
        world, e = self.group.size(), self.engine
        generator = torch.Generator().manual_seed(seed)
        rows = e.M // world if name == "ag_gemm" else e.M

        def draw(*shape: int) -> torch.Tensor:
            return e.tensor(torch.randint(-1, 2, shape, generator=generator))

        return [(draw(rows, e.K), draw(e.K, n or e.N)) for _ in range(world)]

    def expected(self, name: str, pairs: list[Pair]) -> torch.Tensor:
        """What this rank must get."""
        if name == "ag_gemm":
            whole = torch.cat([a for a, _ in pairs]).float()
            mine: torch.Tensor = pairs[self.group.rank()][1]
            return whole.matmul(mine.float())
        return torch.stack([a.float() @ b.float() for a, b in pairs]).sum(0)

    def verify(self) -> dict[str, Any]:
        """Both kernels on fresh numbers, twice, and a collective of the library where it is asked for."""
        right = True
        for name in ("ag_gemm", "gemm_ar") * 2:
            # All ranks count calls alike only within one generation.
            self.seed += 1
            pairs = self.inputs(name, self.seed % 7)
            want = self.expected(name, pairs)
            got = self.engine.launch(name, self.group, *pairs[self.group.rank()])
            watch.synchronize()
            right = right and torch.equal(got.float(), want)
        if self.spec["nccl"]:
            one = self.engine.tensor(torch.ones(1))
            dist.all_reduce(one, group=self.group)
            right = right and int(one.item()) == self.group.size()
        return {"right": right, "world": self.group.size()}

    def calls(self, message: dict[str, Any]) -> dict[str, Any]:
        """Calls in a row: ``calls`` of them, or for ``seconds``; the first error ends them."""
        pairs = {name: self.inputs(name, 3) for name in ("ag_gemm", "gemm_ar")}
        want = {name: self.expected(name, p) for name, p in pairs.items()}
        time.sleep(message.get("sleep", 0.0))
        began, number = time.monotonic(), 0
        out: dict[str, torch.Tensor] = {}
        try:
            while number < message.get("calls", 1 << 30):
                if time.monotonic() - began > message.get("seconds", 1e9):
                    break
                if number == message.get("fail_at"):
                    raise ZeroDivisionError("between two calls")
                for name, given in pairs.items():
                    out[name] = self.engine.launch(name, self.group, *given[self.group.rank()])
                number += 1
                if number % 8 == 0:
                    watch.synchronize()
            watch.synchronize()
        except (TilelinkError, ZeroDivisionError) as problem:
            at = time.monotonic()
            # The last call that was enqueued cannot have been complete where one was stopped before it.
            nan = bool(out) and all(bool(t.isnan().all()) for t in list(out.values())[-1:])
            return self._error(problem, at) | {"nan": nan, "calls": number}
        right = all(torch.equal(out[name].float(), want[name]) for name in out)
        return {"error": "" if right else "wrong numbers", "calls": number}

    def lost(self, message: dict[str, Any]) -> dict[str, Any]:
        """Two calls of gemm_ar, the signals of the first one lost on one rank."""
        pairs = self.inputs("gemm_ar", 5)[self.group.rank()]
        # The plan of these very tensors is what loses the signals.
        c = torch.empty_like(self.expected("gemm_ar", [pairs]), dtype=self.engine.dtype)
        self.engine.launch("gemm_ar", self.group, *pairs, c)
        watch.synchronize()
        if message["drop"] is not None:
            self.engine.lose(self.group, message["drop"], message["signals"])
        began = time.monotonic()
        try:
            for _ in range(3):
                self.engine.launch("gemm_ar", self.group, *pairs, c)
            watch.synchronize()
        except TilelinkError as problem:
            return self._error(problem, time.monotonic()) | {"began": began}
        finally:
            undo = getattr(self.engine, "undo", None)
            if undo is not None:
                undo()
                self.engine.undo = None  # type: ignore[attr-defined]
        return {"error": "", "began": began}

    def mismatch(self, message: dict[str, Any]) -> dict[str, Any]:
        """A call that the ranks have not made before, with another N on one of them."""
        return self._with_columns(self.engine.N + (2 if message["wide"] else 1) * self.engine.wide)

    def learn(self, message: dict[str, Any]) -> dict[str, Any]:
        """Calls with N and with twice as many columns, on all ranks alike."""
        del message
        answers = [self._with_columns(self.engine.N * times) for times in (1, 2)]
        return next((a for a in answers if a["error"]), {"error": ""})

    def other(self, message: dict[str, Any]) -> dict[str, Any]:
        """A call that the ranks have made before, another one on one of them."""
        return self._with_columns(self.engine.N * (2 if message["wide"] else 1))

    def _with_columns(self, n: int) -> dict[str, Any]:
        a, b = self.inputs("gemm_ar", 1, n)[self.group.rank()]
        out = None
        try:
            out = self.engine.launch("gemm_ar", self.group, a, b)
            watch.synchronize()
        except TilelinkError as problem:
            at = time.monotonic()
            return self._error(problem, at) | {"nan": out is None or bool(out.isnan().all())}
        return {"error": ""}

    def recover(self, message: dict[str, Any]) -> dict[str, Any]:
        """The next generation, and calls in it."""
        if "arrival" in message:
            os.environ["TILELINK_ARRIVAL_TIMEOUT"] = str(message["arrival"])
        began = time.monotonic()
        self.group = self.engine.recover(self.group)
        seconds = time.monotonic() - began
        self.seed = 0
        return self.verify() | {"seconds": round(seconds, 3)}

    def capture(self) -> dict[str, Any]:
        """Captures a call of each kernel into a graph and replays it once."""
        pairs = {name: self.inputs(name, 4) for name in ("ag_gemm", "gemm_ar")}
        rank = self.group.rank()
        self.given = [given[rank] for given in pairs.values()]
        for name, given in pairs.items():
            self.engine.launch(name, self.group, *given[rank])
        watch.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [
                self.engine.launch(name, self.group, *given[rank]) for name, given in pairs.items()
            ]
        self.graph.replay()
        watch.synchronize()
        want = [self.expected(name, given) for name, given in pairs.items()]
        same = [torch.equal(o.float(), w) for o, w in zip(self.outputs, want, strict=True)]
        return {"right": all(same)}

    def replays(self, message: dict[str, Any]) -> dict[str, Any]:
        """Replays the graph for some seconds; the first error ends it."""
        began = time.monotonic()
        try:
            while time.monotonic() - began < message["seconds"]:
                for _ in range(8):
                    self.graph.replay()
                watch.synchronize()
        except TilelinkError as problem:
            at = time.monotonic()
            return self._error(problem, at) | {"nan": bool(self.outputs[-1].isnan().all())}
        return {"error": ""}

    def _error(self, problem: BaseException, at: float) -> dict[str, Any]:
        said = str(problem).splitlines()[0]
        return {"error": type(problem).__name__, "at": at, "said": said, "nan": True}

    def handle(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        do = message["do"]
        if do == "nothing":
            return {"error": ""}
        if do in ("verify", "capture"):
            return getattr(self, do)()  # type: ignore[no-any-return]
        return getattr(self, do)(message)  # type: ignore[no-any-return]


def serve(pipe: Any, spec: dict[str, Any]) -> None:
    """Answers requests; ends this process where one takes too long or none comes."""
    last = [time.monotonic()]

    def guard() -> None:
        while time.monotonic() - last[0] < PATIENCE:
            time.sleep(1.0)
        os._exit(7)

    threading.Thread(target=guard, daemon=True).start()
    rank: Rank | None = None
    try:
        rank = Rank(spec)
        pipe.send(rank.verify())
    except BaseException:
        pipe.send({"crash": traceback.format_exc()[-1500:]})
    while rank is not None:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            break
        last[0] = time.monotonic()
        try:
            pipe.send(rank.handle(message))
        except BaseException:
            pipe.send({"crash": traceback.format_exc()[-1500:]})
    # Without the destructor of the process group, which would wait for ranks that are gone.
    os._exit(0)
