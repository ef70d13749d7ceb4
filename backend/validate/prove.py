"""One emitted module against the program of its kernel: read, compared, proven."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tilelink.backend.expand_rows import Access, Phase, Sync
from tilelink.backend.expand_walk import expand
from tilelink.backend.product import product_of
from tilelink.backend.validate.boxes import BoxMachine
from tilelink.backend.validate.demand import flows
from tilelink.backend.validate.errors import EmittedDiffers, EmittedHazard, Unclear
from tilelink.backend.validate.host import Agent, HostMachine, View
from tilelink.backend.validate.kernel import KernelMachine
from tilelink.backend.validate.launch import LaunchMachine
from tilelink.backend.validate.layout import Layout
from tilelink.backend.validate.module import Module
from tilelink.backend.validate.roles import GROUPS
from tilelink.backend.validate.rows import Placed, Rows
from tilelink.backend.validate.trace import Poll, Signal, Trace
from tilelink.backend.validate.values import (
    Data,
    Descriptor,
    Num,
    Pointer,
    Special,
    full,
)
from tilelink.backend.validate.words import WordMachine, stand_ins
from tilelink.backend.verify import Report, VerifyError, carried, prove, smaller
from tilelink.backend.verify.meaning import check_meaning
from tilelink.errors import Span, TilelinkError
from tilelink.ir import Op, make, parse_ir, print_ir
from tilelink.ir.layout import ACK, WORD

GLUON, LIBRARY = "gluon", "library"  # emitters of launches that are no Triton kernels


@dataclass(frozen=True, slots=True)
class Validation:
    """What was read from a module and proven: rows over all ranks and one call."""

    program: str
    lanes: int
    accesses: int
    signals: int
    report: Report


def validate(module: Module, program: Op) -> Validation:
    """Prove that ``module`` does what ``program`` says, and that it cannot hang or race.

    ``program`` is the fused program of the kernel, compiled from its source: declarations, maps and
    what each task has to read and store are taken from it. Where it has a dynamic extent, the module is read
    at the capacity and at each other value at which the program is proven. Errors: EmittedDiffers,
    EmittedHazard and Unclear at a place of the module, with the tasks concerned.
    """
    wanted = Wanted(program)
    whole = Validator(module, wanted).run()
    for small in smaller(wanted.expected, carried(program)):
        Validator(module, Wanted(small, program)).run()
    return whole


class Wanted:
    """What a program asks of its module, worked out once for all texts that are held against it.

    ``whole``: the program at its capacity, where ``program`` is that of another value.
    """

    def __init__(self, program: Op, whole: Op | None = None) -> None:
        self.program, self.whole = program, whole
        self.layout = Layout(program)
        # With what intermediates the kernel declares: reads of buffers that serve them say what they want.
        self.kernel = carried(program) if whole is None else None
        self.expected = expand(program, self.kernel)
        self.flows = flows(program)

    @cached_property
    def text(self) -> str:
        """The program that the module has to carry."""
        return print_ir(self.whole or self.program)

    @cached_property
    def meant(self) -> frozenset[tuple[int, int]]:
        """Where the kernel itself places tiles elsewhere than at their own starts: see :class:`Expansion`.

        VerifyError where the stages are not the kernel's.
        """
        if self.kernel is None:
            return frozenset()
        held = expand(self.program, self.kernel)
        check_meaning(held, self.kernel)
        return frozenset(held.meant)


class Validator:
    """The steps of :func:`validate`."""

    def __init__(self, module: Module, wanted: Wanted) -> None:
        self.module, self.wanted = module, wanted
        self.program, self.layout = wanted.program, wanted.layout
        self.expected = wanted.expected
        self.rows = Rows(self.expected, module.source, wanted.flows)
        self.wait_names: list[int] = []
        self.lanes = 0
        self.traces: list[Trace] = []
        self.slots = self.program.get("slots") is not None
        self.heads = self.program.find("head")
        self.folded = any(op.get("folded") for op in self.heads)
        # Whether the one launch ends the call.
        self.alone = self.slots or any(op.get("ends") for op in self.program.find("launch"))
        self.roles: set[str] = set()  # functions that kernels have started
        self.flushes: list[int] = []  # phases behind which every worker performs what it holds back

    def run(self) -> Validation:
        """All steps in order."""
        self.same_text()
        agents = HostMachine(self.module.source, self.layout, frozenset(self.module.kernels)).start(
            self.module.host
        )
        for agent in agents:
            if agent.kernel in self.module.gluon:
                agent.emitter = GLUON
        agents = self.with_head(agents)
        self.same_agents(agents)
        streamed = frozenset(
            s.symbol for a in agents if a.kind == "stream" for s in self.of(a).signals if s.wait
        )
        used = [a.kernel for a in agents if a.kind == "launch" and a.emitter != LIBRARY]
        if sorted(used) != sorted(self.module.kernels):
            self.differs(None, "a kernel is launched never or twice")
        placed: list[tuple[Agent, Placed]] = []
        for number, agent in enumerate(agents):
            if agent.kind == "stream":
                self.traces.append(self.of(agent))
                placed.append((agent, self.stream(number, agent)))
            elif agent.emitter == LIBRARY:
                one = self.library(number, agent)
                self.traces.append(one.trace)
                placed.append((agent, one))
            elif agent.kind == "launch":
                traces = [self.launch(agent, streamed, False)]
                if traces[0].queues:
                    # Positions are given to whoever asks: the text must do the same for another.
                    traces.append(self.launch(agent, streamed, True))
                    self.queues(number, traces[0])
                self.freed(agent, traces[0], streamed)
                self.traces += traces
                for trace in traces[::-1]:
                    self.rows.accesses = [a for a in self.rows.accesses if not self.at(number, a)]
                    self.rows.syncs = [s for s in self.rows.syncs if not self.at(number, s)]
                    self.rows.volume, self.rows.regions = {}, {}
                    one = self.rows.launch(number, trace, agent.workers)
                    self.place(number, one)
                self.flushes += [id(one.phases[n]) for n in sorted(traces[0].flushed)]
                placed.append((agent, one))
            elif agent.kind == "head":
                self.head(number, agent)
            else:
                kept = [a for a in self.expected.accesses if self.at(number, a)]
                self.rows.accesses += kept
        if self.roles != set(self.module.roles):
            self.differs(None, "a function of a role that no kernel starts, or several")
        self.rows.same_signals()
        self.producers(placed)
        self.named_waits()
        return self.proven()

    def of(self, agent: Agent) -> Trace:
        """The trace of an agent that has one."""
        assert agent.trace is not None
        return agent.trace

    def at(self, agent: int, row: Access | Sync) -> bool:
        """Whether rows are those of an agent."""
        if not len(row.task):
            return False
        return self.expected.phases[int(self.expected.task_phase[row.task[0]])].agent == agent

    def op(self, agent: Agent) -> Op:
        """The program's agent of the same name."""
        return next(a for a in self.expected.agents if a.ref is not None and a.symbol == agent.name)

    def differs(self, node: ast.AST | None, detail: str) -> None:
        """Refuses a difference."""
        line = getattr(node, "lineno", 0)
        source = self.module.source
        span = Span(source, line, 1, len(source.line(line)) + 1) if line else None
        raise EmittedDiffers(span, detail=detail)

    # The host ---------------------------------------------------------------------------------

    def same_text(self) -> None:
        """The program that the runtime takes memory and names from must be the kernel's."""
        if self.module.text == self.wanted.text:
            return
        try:
            given = parse_ir(self.module.text, self.module.source.name)
        except TilelinkError as error:
            raise EmittedDiffers(
                None, detail="the program that it carries does not parse", notes=(str(error),)
            ) from None
        ours = parse_ir(self.wanted.text)
        if given.with_attrs(file=None) == ours.with_attrs(file=None):
            return
        for one, two in zip(given.body, ours.body, strict=False):
            if one != two:
                names = [f"`{o.name} @{o.symbol}`" if o.ref else f"`{o.name}`" for o in (one, two)]
                self.differs(None, f"it carries {names[0]} where the kernel gives {names[1]}")
        self.differs(None, "the program that it carries is not that of the kernel")

    def with_head(self, agents: list[Agent]) -> list[Agent]:
        """The agents with the head that a program folds into its launches.

        That kernels begin and end the call is what :meth:`launch` holds.
        """
        if not self.folded:
            for agent in agents:
                if agent.begins:
                    self.differs(agent.node, "the head of the program is a kernel")
            return agents
        head = Agent("head", "head", (), agents[0].node if agents else ast.Pass(), waits=False)
        if self.alone:
            if any(agent.kind == "head" for agent in agents):
                self.differs(agents[0].node, "a head, which the program folds into its launch")
        elif not agents or not agents[0].begins or any(a.kind == "head" for a in agents[1:]):
            self.differs(head.node, "the host does not begin the call, and once, before its agents")
        else:
            head = agents[0]
        moved = [
            replace(agent, after=("head", *agent.after)) if agent.kind == "launch" else agent
            for agent in agents
            if agent.kind != "head"
        ]
        return [replace(head, waits=bool(self.heads[0].body)), *moved]

    def same_agents(self, agents: list[Agent]) -> None:
        """Agents, their order and what they come after, sizes of launches, sides of collectives."""
        wanted = self.expected.agents
        for agent, op in zip(agents, wanted, strict=False):
            name = op.symbol if op.ref is not None else "head"
            if (agent.kind, agent.name) != (op.name, name):
                self.differs(
                    agent.node, f"{agent.kind} `{agent.name}` where {op.name} `{name}` belongs"
                )
            if agent.after != tuple(op.get("after", ())):
                self.differs(
                    agent.node, f"`{name}` comes after {agent.after}, not {op.get('after', ())}"
                )
            if agent.emitter != op.get("emitter", ""):
                self.differs(agent.node, f"`{name}` is a launch of the emitter `{agent.emitter}`")
            if agent.kind == "launch" and agent.emitter != LIBRARY:
                groups = GROUPS if op.get("roles") is not None else 1
                warps = agent.warps * groups
                for label, have, key, default in (
                    ("workers", agent.workers, "workers", 1),
                    ("warps", warps, "warps", 4),
                    ("stages of its pipeline", agent.stages, "stages", 3),
                ):
                    if have != int(op.get(key, default)):
                        self.differs(
                            agent.node, f"{have} {label}; the program has {op.get(key, default)}"
                        )
            if agent.kind == "collective":
                assert op.ref is not None
                sides = (op["op"], op.ref.symbol, op["to"].symbol)
                if (agent.op, agent.source, agent.target) != sides:
                    self.differs(agent.node, f"another collective than {' '.join(sides)}")
        if len(agents) != len(wanted):
            self.differs(
                None, f"the host enqueues {len(agents)} agents, the program has {len(wanted)}"
            )

    def head(self, number: int, agent: Agent) -> None:
        """`call.head`, or what stands for it: advances the epoch, clears counters, waits for acknowledgements."""
        wanted = [s for s in self.expected.syncs if self.at(number, s)]
        if not agent.waits:
            if wanted:
                self.differs(agent.node, "`head` does not wait for the acknowledgements")
            return
        if not wanted:
            self.differs(agent.node, "`head` waits for acknowledgements that nobody gives")
        task = next(p.first for p in self.expected.phases if p.agent == number)
        world = self.layout.world
        words = np.arange(ACK, ACK + world, dtype=np.int64)
        symbol, flat = self.layout.word(words)
        rank = np.repeat(np.arange(world, dtype=np.int64), world)
        signal = Signal(
            (getattr(agent.node, "lineno", 0), 0), symbol, True, rank, 0, np.zeros_like(rank), 1,
            rank, np.tile(flat, world), np.ones_like(rank), epoch=-1,
        )  # fmt: skip
        trace = Trace(world)
        trace.signals.append(signal)
        table = {0: (task + np.arange(world))[:, None]}
        self.rows.signals(Placed(trace, {}, table, np.arange(world, dtype=np.int64)))

    def stream(self, number: int, agent: Agent) -> Placed:
        """A side stream: one task a rank."""
        trace = self.of(agent)
        world = self.layout.world
        first = next(p.first for p in self.expected.phases if p.agent == number)
        table = {0: (first + np.arange(world, dtype=np.int64))[:, None]}
        placed = Placed(trace, {}, table, np.arange(world, dtype=np.int64))
        self.place(number, placed)
        return placed

    def library(self, number: int, agent: Agent) -> Placed:
        """A launch of the library: the products of the stage, one a task."""
        (stage,) = self.expected.agents[number].find("stage")
        product = product_of(stage)
        for called in agent.products:
            detail = called.differs(product)
            if detail:
                self.differs(agent.node, f"another product than that of @{stage.symbol}: {detail}")
        placed = self.rows.launch(number, self.of(agent), 1)
        self.wait_names += list(dict.fromkeys(agent.numbers))
        self.lanes += self.layout.world
        self.place(number, placed)
        return placed

    def place(self, number: int, placed: Placed) -> None:
        """Matches everything of one agent."""

        def mine(access: Access) -> bool:
            return self.at(number, access)

        self.rows.touches(placed, mine)
        self.rows.products(placed, mine)
        self.rows.complete(mine)
        self.rows.signals(placed)
        self.rows.syncs += stand_ins(
            self.expected, self.rows.accesses, lambda row: self.at(number, row)
        )

    # Kernels ----------------------------------------------------------------------------------

    def launch(self, agent: Agent, streamed: frozenset[str], reverse: bool) -> Trace:
        """Runs a kernel with the arguments of its launch."""
        function = self.module.kernels[agent.kernel]
        gluon = agent.kernel in self.module.gluon
        shared = (self.module.source, function, self.layout, agent.workers, streamed)
        launched = None
        if gluon and self.op(agent).get("roles") is None:
            machine: KernelMachine = BoxMachine(*shared, reverse)
        elif gluon:
            stages = enumerate(self.op(agent).find("stage"))
            landed = tuple(n for n, stage in stages if any(map(_lands, stage.walk())))
            machine = launched = LaunchMachine(*shared, self.module.roles, landed, reverse)
        else:
            machine = WordMachine(*shared, reverse)
        names = [a.arg for a in function.args.args]
        if len(names) != len(agent.arguments):
            self.differs(
                agent.node, f"{len(agent.arguments)} arguments for {len(names)} parameters"
            )
        given: dict[str, Any] = {}
        for argument, value in zip(function.args.args, agent.arguments, strict=True):
            given[argument.arg] = self.argument(machine, argument, value, agent)
        trace = machine.start(given)
        if launched is not None:
            self.same_roles(agent, launched)
        if not reverse:
            # The waits of a stage's roles stand in different functions.
            waits = list(dict.fromkeys(machine.wait_names))
            self.wait_names += sorted(waits) if gluon else waits
            self.lanes += machine.lanes
        has_finish = any(
            p.kind == "finish" and self.expected.agents[p.agent].symbol == agent.name
            for p in self.expected.phases
        )
        if (machine.begun, machine.ended) != (self.folded, self.alone):
            self.differs(function, "the launch does not begin and end the call as the program says")
        if (machine.signals, machine.opened) != self.opens(agent):
            self.differs(function, "the launch does not begin the call as the program says")
        if (machine.told, machine.agreed) != 2 * (self.compares(agent),):
            self.differs(function, "the launch does not compare the dynamic extent between ranks")
        outputs = [
            op.symbol for op in self.program.find("tensor") if op["role"] in ("out", "inout")
        ]
        if self.alone and sorted(machine.spoiled) != sorted(outputs):
            self.differs(function, f"after an abort it spoils {machine.spoiled}, not {outputs}")
        if has_finish and not machine.left:
            self.differs(function, "the launch is not left through `finish_arrive`")
        return trace

    def opens(self, agent: Agent) -> tuple[bool | None, tuple[bool, bool] | None]:
        """How a launch begins a call whose head it has within; see ``AccessMachine.opened``.

        The first one does what the head does; the others come behind it in the main stream.
        """
        if self.slots or not self.folded:
            return None, None
        # Flags hold epochs, whether or not the call waits for those of the one before.
        signals = bool(self.program.find("flag"))
        if self.program.find("launch")[0].symbol != agent.name:
            return signals, None
        return signals, (bool(self.heads[0].body), bool(self.program.find("stream")))

    def compares(self, agent: Agent) -> bool:
        """Whether a launch tells the peers the value of a dynamic extent and compares theirs, as a head does."""
        told = self.folded and bool(self.program.find("flag")) and bool(self.layout.varying)
        return told and self.program.find("launch")[0].symbol == agent.name

    def same_roles(self, agent: Agent, machine: LaunchMachine) -> None:
        """The roles of a launch must be those that the program gives it."""
        op = self.op(agent)
        if not machine.started:
            self.differs(agent.node, "a kernel of Gluon that starts no roles")
        slots = [ring.slots for ring in machine.rings]
        have = ("turns" if machine.turns else "halves", slots)
        wanted = [int(op[key]) for key in ("stages", "landing") if op.get(key) is not None]
        if have != (op.get("roles"), wanted):
            self.differs(agent.node, f"groups in {have[0]} at rings of {slots} slots")
        self.roles |= machine.used

    def argument(self, machine: KernelMachine, parameter: ast.arg, value: Any, agent: Agent) -> Any:
        """An argument of the host as the kernel sees it."""
        kind = ast.unparse(parameter.annotation) if parameter.annotation is not None else ""
        if isinstance(value, Num):
            if kind != "tl.int32":
                self.differs(agent.node, f"an integer for the parameter `{parameter.arg}`")
            array = full(value.v, self.layout.world)
            machine.fits(np.repeat(array, agent.workers), False, None)
            return Num(np.repeat(array, agent.workers))
        if isinstance(value, Special):
            typed = {
                "arena": "",
                "peers": "",
                "progress_ns": "tl.int64",
                "arrival_ns": "tl.int64",
                "program": "tl.int32",
                "host_record": "tl.int64",
            }
            if value.name in typed:
                if kind != typed[value.name]:
                    self.differs(agent.node, f"`{value.name}` for the parameter `{parameter.arg}`")
                return value
            return Data(())
        if kind:
            self.differs(agent.node, f"a tensor for the parameter `{parameter.arg}`")
        if isinstance(value, Descriptor):
            if value.emitter != (agent.emitter or "triton"):
                self.differs(agent.node, "a descriptor for kernels of another emitter")
            return value
        if isinstance(value, View) and value.whole:
            if np.any(value.home != np.arange(self.layout.world)):
                raise Unclear(None, detail="an argument in memory of a peer")
            return Pointer(value.symbol, machine.rank, 0, self.layout.item[value.symbol])
        raise Unclear(None, detail=f"the argument for `{parameter.arg}`")

    def queues(self, number: int, trace: Trace) -> None:
        """Queues draw from the counters that the program gives them, which nothing else touches."""
        wanted = {
            stage["counter"].symbol
            for stage in self.expected.agents[number].find("stage")
            if stage.get("queue", "static") == "dynamic" and stage.get("counter") is not None
        }
        drawn = {symbol for symbol, _ in trace.queues}
        if drawn != wanted:
            self.differs(None, f"queues draw from {sorted(drawn)}, not {sorted(wanted)}")
        if any(s.symbol in drawn for s in self.expected.syncs):
            self.differs(None, "a queue draws from a counter that is waited for")

    def freed(self, agent: Agent, trace: Trace, streamed: frozenset[str]) -> None:
        """After an abort, the counters that streams wait for must be advanced by whom raises them."""
        raised = sorted({s.symbol for s in trace.signals if not s.wait and s.symbol in streamed})
        wanted = []
        for symbol in raised:
            first = int(self.layout.declared[symbol]["offset"]) // WORD
            wanted.append((first, first + int(np.prod(self.layout.dims[symbol]))))
        if sorted(trace.freed) != sorted(wanted):
            raise EmittedHazard(
                None,
                detail=f"after an abort `{agent.name}` frees the counter words {trace.freed}, "
                f"while streams wait for {wanted}",
            )

    # All together -----------------------------------------------------------------------------

    def producers(self, placed: list[tuple[Agent, Placed]]) -> None:
        """A wait that runs out must blame the rank that raises its flag."""
        raised: dict[tuple[str, int, int], int] = {}
        for sync in self.rows.syncs:
            if not sync.wait:
                rows = zip(sync.home.tolist(), sync.flat.tolist(), sync.rank.tolist(), strict=True)
                raised |= {(sync.symbol, home, flat): rank for home, flat, rank in set(rows)}
        for _, one in placed:
            named: list[Signal | Poll] = [*one.trace.signals, *one.trace.polls]
            for signal in named:
                if signal.producer is None:
                    continue
                table = np.unique(
                    np.column_stack((signal.home, signal.flat, signal.producer)), axis=0
                )
                for home, flat, named in table.tolist():
                    if raised.get((signal.symbol, home, flat), named) != named:
                        raise EmittedHazard(
                            self.rows.span(signal.site),
                            detail=f"the wait names rank {named} as the one it waits for, which "
                            "does not raise this flag",
                        )

    def named_waits(self) -> None:
        """Waits of kernels have their numbers in the program, so that a record of a time-out finds its line.

        One whose condition no task meets is nowhere performed, and may have no number.
        """
        ops = list(self.program.walk())
        numbers = {id(op): n for n, op in enumerate(o for o in ops if o.name == "wait")}
        launches = self.program.find("launch")
        wanted = [numbers[id(o)] for op in launches for o in op.walk() if o.name == "wait"]
        performed = {numbers.get(id(s.op)) for s in self.expected.syncs if s.wait and len(s.task)}
        found = set(self.wait_names)
        needed = [n for n in wanted if n in performed or n in found]
        if self.wait_names != needed:
            self.differs(None, f"waits are numbered {self.wait_names}")

    def proven(self) -> Validation:
        """The proof, with the rows of the module in place of the program's."""
        phases: list[Phase] = []
        moved = np.zeros(len(self.expected.phases), dtype=np.int64)
        for number, phase in enumerate(self.expected.phases):
            if phase.kind == "flush":
                continue
            moved[number] = len(phases)
            phases.append(phase)
            if id(phase) in self.flushes:
                end = phase.first + phase.count * self.layout.world
                flush = make("flush", drain=True, span=phase.op.span)
                phases.append(Phase("flush", phase.agent, flush, end, 0))
        out = replace(
            self.expected,
            phases=phases,
            task_phase=moved[self.expected.task_phase],
            accesses=self.rows.accesses,
            syncs=self.rows.syncs,
        )
        try:
            out.meant = self.expected.meant | self.wanted.meant
            # What each read finds is the matter of the capacity; see the rule `rows`.
            report = prove(out, contents=self.wanted.whole is None)
        except VerifyError as error:
            lines = tuple(str(error).splitlines())
            raise EmittedHazard(
                None, detail="the proof refuses what the module does", notes=lines
            ) from error
        rows = sum(len(a.task) for a in self.rows.accesses)
        signals = sum(len(s.task) for s in self.rows.syncs)
        return Validation(self.program.symbol, self.lanes, rows, signals, report)


def _lands(op: Op) -> bool:
    """Whether an op adds parts to a product that come through TMA."""
    return op.name == "load_sum" and bool(op.operands) and op.get("via") == "tma"
