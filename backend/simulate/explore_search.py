"""The search of :mod:`explore`: states, steps and what makes a state bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tilelink.backend.simulate.explore_build import Processes
from tilelink.backend.simulate.explore_nodes import (
    ADD,
    CLEAR,
    END,
    FOLLOW,
    HOLD,
    NOBODY,
    PERFORM,
    PSEUDO,
    RETURN,
    SET,
    SLOT,
    TAKE,
    TAKES,
    WAIT,
    Held,
    Node,
)
from tilelink.backend.simulate.explore_reduce import Reducer, settled

# node, node to return to, clock, clock at the last proxy fence, own writes through the async proxy that
# nothing drained, notifies held back
Process: TypeAlias = tuple[int, int, int, int, int, tuple[Held, ...]]
Word: TypeAlias = tuple[
    int, int, int, int, int
]  # value, what releases carry by what they are good for


@dataclass(frozen=True, slots=True)
class Problem:
    """A bad state: ``kind`` is deadlock, race, version, balance or bounds."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Explored:
    """What an exploration found.

    ``bad`` is the first problem or None, ``trace`` the steps that lead to it. ``complete`` says that
    the search came to its end; if not, ``why`` says what was too large or could not be explored, and
    the program is neither good nor bad.
    """

    states: int
    transitions: int
    bad: Problem | None
    trace: tuple[str, ...] = ()
    complete: bool = True
    why: str = ""
    reduced: bool = True


class _Bad(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        self.problem = Problem(kind, detail)


@dataclass(slots=True)
class _Step:
    """A process in the middle of a step: the node that it stands at, and what it will be behind the step."""

    at: int
    after: int
    back: int
    clock: int
    fenced: int
    pending: int
    held: tuple[Held, ...]

    def drain(self) -> None:
        """Own writes through the async proxy are complete."""
        self.clock, self.pending = self.clock | self.pending, 0

    def enter(self, queue: Node, number: int) -> None:
        """Go to a task of a queue, which returns to what takes the next."""
        self.back = queue.again if queue.again >= 0 else self.at
        self.after = queue.tasks[number]


class Search:
    """One exploration; see :func:`tilelink.backend.simulate.explore.explore`."""

    def __init__(self, processes: Processes, reduce: bool, limit: int) -> None:
        self.instance = processes
        self.nodes = processes.nodes
        self.limit = limit
        self.reducer = Reducer(processes) if reduce else None
        self.versions: dict[int, int] = {}
        self.process_ids: dict[Process, int] = {}
        self.process_of: list[Process] = []
        self.word_ids: dict[Word, int] = {}
        self.word_of: list[Word] = []
        self._see_what_counts()

    def _see_what_counts(self) -> None:
        """Which nodes are steps of their own, and which processes a hidden one may release."""
        inside = {word for key, word in self.instance.elements.items() if key[0] == PSEUDO}
        quiet = inside | (settled(self.instance) if self.reducer is not None else set())
        waiting: dict[int, set[int]] = {}
        group_of: dict[int, tuple[int, int]] = {}
        for group in self.instance.groups:
            for number in range(*group):
                group_of[number] = group
        for node in self.nodes:
            real = node.kind in (WAIT, ADD, SET, PERFORM, TAKE, CLEAR, SLOT)
            used = (*node.elements, *((node.slot,) if node.slot >= 0 else ()))
            node.visible = real and not quiet.issuperset(used)
            if node.kind in (TAKE, SLOT, PERFORM):
                node.visible = True
            if node.kind == CLEAR and self.instance.ordered.issuperset(used):
                node.visible = False
        for number, begin in enumerate(self.instance.begins):
            frontier, seen = [begin], set[int]()
            while frontier:
                at = frontier.pop()
                if at < 0 or at in seen:
                    continue
                seen.add(at)
                node = self.nodes[at]
                frontier += (node.next, node.again, *node.tasks)
                if node.kind in (WAIT, FOLLOW) and not node.visible:
                    # Workers of one launch change places; see `_key`.
                    for word in node.elements:
                        waiting.setdefault(word, set()).update(
                            range(*group_of.get(number, (number, number + 1)))
                        )
        self.waiting = {w: tuple(sorted(found)) for w, found in waiting.items()}

    def process_id(self, process: Process) -> int:
        found = self.process_ids.get(process)
        if found is None:
            found = self.process_ids[process] = len(self.process_of)
            self.process_of.append(process)
        return found

    def word_id(self, word: Word) -> int:
        found = self.word_ids.get(word)
        if found is None:
            found = self.word_ids[word] = len(self.word_of)
            self.word_of.append(word)
        return found

    # The search.

    def run(self) -> Explored:
        """Depth first over canonical states."""
        states = transitions = 0
        parents: dict[tuple[int, ...], tuple[tuple[int, ...] | None, int]] = {}
        count = len(self.instance.begins)
        key: tuple[int, ...] | None = None
        reduced = self.reducer is not None
        try:
            first = [self.process_id((n, -1, 0, 0, 0, ())) for n in self.instance.begins]
            words = [self.word_id((v, 0, 0, 0, 0)) for v in self.instance.initial]
            state = (first, words, [0])
            self._settle(*state, list(range(count)))
            key = self._key(state)
            parents[key] = (None, -1)
            stack = [(key, state[2][0])]
            while stack:
                key, executed = stack.pop()
                states += 1
                if states > self.limit:
                    why = f"more than {self.limit} states"
                    return Explored(states, transitions, None, (), False, why, reduced)
                enabled = self._enabled(key, count)
                if not enabled:
                    self._check_end(key, count, executed)
                    continue
                if self.reducer is not None and len(enabled) > 1:
                    enabled = self.reducer.persistent(self, key, count, enabled)
                for number in enabled:
                    transitions += 1
                    processes, words = list(key[:count]), list(key[count:])
                    done = [executed]
                    try:
                        self._step(processes, words, done, number)
                    except _Bad as bad:
                        trace = (*self._trace(parents, key), self._label(key, number))
                        return Explored(states, transitions, bad.problem, trace, reduced=reduced)
                    after = self._key((processes, words, done))
                    if after not in parents:
                        parents[after] = (key, number)
                        stack.append((after, done[0]))
        except _Bad as bad:
            trace = self._trace(parents, key) if key is not None else ()
            return Explored(states, transitions, bad.problem, trace, reduced=reduced)
        return Explored(states, transitions, None, reduced=reduced)

    def _key(self, state: tuple[list[int], list[int], list[int]]) -> tuple[int, ...]:
        """Workers of a launch with the same future are alike: their order does not matter."""
        processes, words, _ = state
        for first, last in self.instance.groups:
            if last - first > 1:
                processes[first:last] = sorted(processes[first:last])
        return (*processes, *words)

    def _label(self, key: tuple[int, ...], number: int) -> str:
        return self.nodes[self.process_of[key[number]][0]].text()

    def _trace(
        self, parents: dict[Any, tuple[Any, int]], key: tuple[int, ...] | None
    ) -> tuple[str, ...]:
        found: list[str] = []
        while key is not None:
            key, number = parents[key]
            if key is not None:
                found.append(self._label(key, number))
        return tuple(reversed(found))

    def _enabled(self, key: tuple[int, ...], count: int) -> list[int]:
        found: list[int] = []
        alike: set[int] = set()
        for number in range(count):
            if key[number] in alike:
                continue
            at = self.process_of[key[number]][0]
            if at >= 0 and self.nodes[at].visible and self.passes(self.nodes[at], key, count):
                alike.add(key[number])
                found.append(number)
        return found

    def passes(self, node: Node, words: Sequence[int], base: int = 0) -> bool:
        """Whether the step of ``node`` can be made."""
        if node.kind == WAIT:
            word_of = self.word_of
            if node.equal:
                return all(word_of[words[base + e]][0] == node.need for e in node.elements)
            # Values are small here, so that the cyclic order is that of the integers.
            return all(word_of[words[base + e]][0] >= node.need for e in node.elements)
        if node.kind in (SLOT, FOLLOW):
            return self.word_of[words[base + node.elements[0]]][0] > 0
        return node.kind != END

    def _check_end(self, key: tuple[int, ...], count: int, executed: int) -> None:
        stuck = [self.process_of[p] for p in key[:count] if self.process_of[p][0] >= 0]
        nodes = [self.nodes[p[0]] for p in stuck]
        if nodes:
            first = next((n for n in nodes if n.visible), nodes[0])
            raise _Bad("deadlock", f"{len(nodes)} processes wait, {first.text()}")
        lost = self.instance.queued & ~executed
        if lost:
            task = self.instance.segments[(lost & -lost).bit_length() - 1]
            raise _Bad("balance", f"{task} is never drawn from its queue")
        for word, most in self.instance.flag_checks:
            value = self.word_of[key[count + word]][0]
            if value and (most is None or value > most):
                name = self.instance.names[word]
                raise _Bad("balance", f"{name} is notified, but nothing waits for it")

    # Steps.

    def _step(self, processes: list[int], words: list[int], done: list[int], number: int) -> None:
        """The visible step of one process, and all hidden ones that it makes possible."""
        frontier = [number]
        self._perform(processes, words, done, number, frontier)
        self._settle(processes, words, done, frontier)

    def _settle(
        self, processes: list[int], words: list[int], done: list[int], frontier: list[int]
    ) -> None:
        while frontier:
            number = frontier.pop()
            while True:
                at, _, _, _, _, held = self.process_of[processes[number]]
                if at < 0:
                    break
                node = self.nodes[at]
                if node.kind == PERFORM:
                    if held and not self._quiet(held):
                        break
                elif node.kind == TAKE:
                    if self.word_of[words[node.elements[0]]][0] < len(node.tasks):
                        break
                elif node.visible or (node.kind in (WAIT, FOLLOW) and not self.passes(node, words)):
                    break
                self._perform(processes, words, done, number, frontier)

    def _quiet(self, held: tuple[Held, ...]) -> bool:
        return self.reducer is not None and held[0].element in self.reducer.settled

    def _perform(
        self,
        processes: list[int],
        words: list[int],
        done: list[int],
        number: int,
        frontier: list[int],
    ) -> None:
        """The step of one process, with the accesses behind it; ``frontier`` gets whom it may release."""
        at, back, clock, fenced, pending, held = self.process_of[processes[number]]
        node = self.nodes[at]
        step = _Step(at, node.next, back, clock, fenced, pending, held)
        if node.kind == END:
            self._end(node, step, words, frontier)
            processes[number] = self.process_id((-1, -1, 0, 0, 0, ()))
            return
        perform = _PERFORMS.get(node.kind)
        if perform is not None:
            perform(self, node, step, words, frontier)
        if step.after != at and (node.bit | node.async_bit or node.broken):
            self._segment(node, step, done)
        processes[number] = self.process_id(
            (step.after, step.back, step.clock, step.fenced, step.pending, step.held)
        )

    def _wait(self, node: Node, step: _Step, words: list[int], _: list[int]) -> None:
        for element in node.elements:
            word = self.word_of[words[element]]
            for which in TAKES[node.mode]:
                step.clock |= word[1 + which]
        if node.proxy:
            step.fenced = step.clock
        if node.checks:
            self._check_counters(node, words)

    def _notify(self, node: Node, step: _Step, words: list[int], frontier: list[int]) -> None:
        if node.drain:
            step.drain()
        if node.kind == SET:
            self._set(Held.of(node), words, step.clock, frontier)
            return
        told = step.clock if node.carry is None else step.clock & node.kept | node.own
        self._add(words, node.elements[0], node.mode, told, frontier)

    def _hold(self, node: Node, step: _Step, _words: list[int], _: list[int]) -> None:
        step.held = (*step.held, Held.of(node))

    def _perform_held(self, node: Node, step: _Step, words: list[int], frontier: list[int]) -> None:
        """The first of the notifies that are held back; the node stays until there is none."""
        if node.drain:
            step.drain()
        if not step.held:
            return
        first, *rest = step.held
        if first.drain:
            step.drain()
        if first.need:
            self._set(first, words, step.clock, frontier)
        else:
            self._add(words, first.element, first.mode, step.clock, frontier)
        step.held = tuple(rest)
        if rest:
            step.after = step.at

    def _take(self, node: Node, step: _Step, words: list[int], frontier: list[int]) -> None:
        """The next task of a queue, if there is one."""
        queue = node.elements[0]
        value, *carried = self.word_of[words[queue]]
        if value >= len(node.tasks):
            return
        words[queue] = self.word_id((value + 1, *carried))  # type: ignore[arg-type]
        step.enter(node, value)
        if node.slot >= 0:
            words[node.slot] = self.word_id((value + 1, 0, 0, 0, 0))
            frontier += self.waiting.get(node.slot, ())
        if value + 1 == len(node.tasks):
            frontier += range(len(self.instance.begins))

    def _follow(self, node: Node, step: _Step, words: list[int], _: list[int]) -> None:
        """The task that another drew, if it drew one."""
        value = self.word_of[words[node.elements[0]]][0]
        if value <= len(node.tasks):
            step.enter(node, value - 1)

    def _return(self, _node: Node, step: _Step, _words: list[int], _: list[int]) -> None:
        """From a task of a dynamic queue to taking the next."""
        step.back, step.after = -1, step.back

    def _clear(self, node: Node, _step: _Step, words: list[int], _: list[int]) -> None:
        for element in node.elements:
            words[element] = self.word_id((0, 0, 0, 0, 0))

    def _start(self, node: Node, _step: _Step, words: list[int], _: list[int]) -> None:
        """A worker that takes one of the places on its device."""
        value, *carried = self.word_of[words[node.elements[0]]]
        words[node.elements[0]] = self.word_id((value - 1, *carried))  # type: ignore[arg-type]

    def _end(self, node: Node, step: _Step, words: list[int], frontier: list[int]) -> None:
        for element in node.elements:
            self._add(words, element, 0, step.clock, frontier)
        for element in node.late:
            self._add(words, element, 0, step.clock | step.pending, frontier)

    def _segment(self, node: Node, step: _Step, done: list[int]) -> None:
        """Make the accesses behind ``node``."""
        if node.broken:
            raise _Bad("race", f"{node.where}: {node.broken}")
        executed = done[0]
        late = node.behind & executed & ~step.clock
        late |= node.behind_async & executed & ~step.fenced
        if late:
            earlier = self.instance.segments[(late & -late).bit_length() - 1]
            raise _Bad("race", f"{node.where} is not ordered behind {earlier}")
        version = (node.behind | node.behind_async) & executed
        if self.versions.setdefault(step.at, version) != version:
            other = version ^ self.versions[step.at]
            earlier = self.instance.segments[(other & -other).bit_length() - 1]
            raise _Bad("version", f"{node.where} is before or after {earlier}, as it happens")
        done[0] = executed | node.bit | node.async_bit
        step.clock |= node.bit
        step.pending |= node.async_bit

    def _add(
        self, words: list[int], element: int, mode: int, clock: int, frontier: list[int]
    ) -> None:
        word = list(self.word_of[words[element]])
        word[0] += 1
        if mode != NOBODY:
            word[1 + mode] |= clock
        words[element] = self.word_id(tuple(word))  # type: ignore[arg-type]
        frontier += self.waiting.get(element, ())

    def _set(self, node: Held, words: list[int], clock: int, frontier: list[int]) -> None:
        mode = node.mode
        if node.slot >= 0:
            self._add(words, node.slot, mode, clock, frontier)
            value, *carried = self.word_of[words[node.slot]]
            if value > node.wanted:
                name = self.instance.names[node.slot]
                detail = f"{name} is notified {value} times where {node.wanted} are expected"
                raise _Bad("balance", detail)
            if value < node.wanted:
                return
            if mode != NOBODY:
                # The last of the counted notifies has acquired the counter.
                for which in TAKES[1]:
                    clock |= carried[which]
        word = [node.need, 0, 0, 0, 0]
        if mode != NOBODY:
            word[1 + mode] = clock
        words[node.element] = self.word_id(tuple(word))  # type: ignore[arg-type]
        frontier += self.waiting.get(node.element, ())

    def _check_counters(self, node: Node, words: list[int]) -> None:
        for word, wanted in node.checks:
            value = self.word_of[words[word]][0]
            if value != max(wanted, 0):
                detail = f"{self.instance.names[word]} is {value} when the call has ended"
                right = "nothing waits for it" if wanted < 0 else f"{wanted} is waited for"
                raise _Bad("balance", f"{detail}, {right}")


# What a step does beside going on, by kind of node; nothing where there is none.
_PERFORMS: dict[int, Callable[[Search, Node, _Step, list[int], list[int]], None]] = {
    WAIT: Search._wait,
    ADD: Search._notify,
    SET: Search._notify,
    HOLD: Search._hold,
    PERFORM: Search._perform_held,
    TAKE: Search._take,
    FOLLOW: Search._follow,
    RETURN: Search._return,
    CLEAR: Search._clear,
    SLOT: Search._start,
}
