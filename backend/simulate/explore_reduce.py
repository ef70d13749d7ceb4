"""Persistent sets: which steps of a state are enough to explore.

A set T of steps is *persistent* in a state if nothing that the other processes can do without a step of
T depends on one of T (Godefroid, 1996). What they can do is overestimated: they run as far as they can
with every word as large as it can get, while the processes of T stand still. Searching only T from each
state keeps every deadlock and, up to steps that commute, every execution; races, versions and counts
are the same in executions that differ only in the order of such steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilelink.backend.simulate.explore_build import Processes
from tilelink.backend.simulate.explore_nodes import (
    ADD,
    CLEAR,
    END,
    FOLLOW,
    HOLD,
    PERFORM,
    PSEUDO,
    RETURN,
    SET,
    SLOT,
    TAKE,
    WAIT,
    Held,
    Node,
)

if TYPE_CHECKING:
    from tilelink.backend.simulate.explore_search import Process, Search


def settled(instance: Processes) -> set[int]:
    """Counters on which the order of steps never matters: no wait passes before the last notify.

    Every process that uses one starts behind the head that clears it, a call's notifies are at most
    what each of its waits asks for, and nothing else uses it. Waits then pass after all notifies or
    never.
    """
    users: dict[int, list[Node]] = {}
    for node in instance.nodes:
        for word in node.elements:
            users.setdefault(word, []).append(node)
        if node.slot >= 0:
            users.setdefault(node.slot, []).append(node)
    found: set[int] = set()
    for key, word in instance.elements.items():
        if key[0] == PSEUDO or word not in instance.ordered:
            continue
        mine = users.get(word, [])
        if any(n.kind not in (WAIT, ADD, HOLD, CLEAR) or n.slot == word for n in mine):
            continue
        adds = sum(n.kind in (ADD, HOLD) for n in mine)
        calls = sum(n.kind == CLEAR for n in mine)
        waits = [n for n in mine if n.kind == WAIT]
        # Every call does the same.
        if all(n.need * calls >= adds for n in waits):
            found.add(word)
    return found


class Reducer:
    """Chooses the steps to take from a state."""

    def __init__(self, instance: Processes) -> None:
        self.instance = instance
        self.nodes = instance.nodes
        self.settled = settled(instance)
        # Words of one call alone, and those that start every call at 0.
        inside = {word for key, word in instance.elements.items() if key[0] == PSEUDO}
        self.ordered = instance.ordered | inside
        # What each notify sends, held back or not.
        self.sent = [Held.of(n) if n.kind in (ADD, HOLD, SET) else None for n in instance.nodes]

    def persistent(
        self, search: Search, key: tuple[int, ...], count: int, enabled: list[int]
    ) -> list[int]:
        """The smallest persistent set found; all of ``enabled`` if none is smaller."""
        stands = [search.process_of[k] for k in key[:count]]
        high = [search.word_of[w][0] for w in key[count:]]
        kinds = [self.nodes[stands[n][0]].kind for n in enabled]
        order = sorted(range(len(enabled)), key=lambda i: (kinds[i] in (TAKE, SLOT), kinds[i]))
        best = enabled
        for i in order:
            found = self._close(stands, high, key, enabled, enabled[i])
            if found is None:
                continue
            if len(found) < len(best):
                best = found
            # Always the same queue first: turning from one to another multiplies their states.
            if len(found) == 1 or kinds[i] in (TAKE, SLOT):
                return found
        return best

    def _close(
        self,
        stands: Sequence[Process],
        high: list[int],
        key: tuple[int, ...],
        enabled: list[int],
        start: int,
    ) -> list[int] | None:
        """Grow {start} until nothing outside depends on it; None if that takes a disabled process."""
        can = {key[n] for n in enabled}
        chosen = {start}
        while True:
            touched = self._reach(stands, high, chosen)
            more: set[int] = set()
            for number in chosen:
                process = stands[number]
                more |= self._dependent(self.nodes[process[0]], process, touched)
            more -= chosen
            if not more:
                break
            if any(key[n] not in can for n in more):
                return None
            chosen |= more
        # One of several processes in the same state stands for all.
        picked: dict[int, int] = {}
        for number in sorted(chosen):
            picked.setdefault(key[number], number)
        return sorted(picked.values())

    def _dependent(
        self, node: Node, process: Process, touched: Mapping[int, Mapping[object, set[int]]]
    ) -> set[int]:
        """The processes that do, among ``touched``, what does not commute with the step of ``node``."""
        found: set[int] = set()

        def add(word: int, harmless: tuple[object, ...]) -> None:
            for kind, numbers in touched.get(word, {}).items():
                if kind not in harmless:
                    found.update(numbers)

        def sent(notify: Held) -> None:
            add(notify.element, () if notify.need else (ADD,))
            if notify.slot >= 0:
                add(notify.slot, (_counted(notify),))

        if node.kind == WAIT:
            for word in node.elements:
                add(word, (WAIT,))
        elif node.kind == ADD:
            add(node.elements[0], (ADD,))
        elif node.kind == PERFORM:
            sent(process[5][0])
        elif node.kind == SET:
            sent(Held.of(node))
        elif node.kind in (TAKE, CLEAR):
            for word in node.elements:
                add(word, ())
        elif node.kind == SLOT:
            add(node.elements[0], ())
        return found

    def _used(self, stands: Sequence[Process], numbers: set[int]) -> Iterator[int]:
        """The words of the next steps of these processes."""
        for number in numbers:
            at, held = stands[number][0], stands[number][5]
            node = self.nodes[at]
            yield from node.elements
            yield node.slot
            for notify in held[:1]:
                yield notify.element
                yield notify.slot

    def _reach(
        self, stands: Sequence[Process], start: list[int], frozen: set[int]
    ) -> dict[int, dict[object, set[int]]]:
        """What the processes outside ``frozen`` may do to the words that those in it use next: word to kind
        of step to processes. ``start``: the values of all words now."""
        reach = _Reach(self, start, self._used(stands, frozen))
        for number, process in enumerate(stands):
            if process[0] >= 0 and number not in frozen:
                reach.begin(number, process)
        reach.run()
        return reach.touched


@dataclass(slots=True)
class _Cursor:
    """Where processes may stand: the node, who they are, where a task returns to, and the task or -1.

    Tasks of a dynamic queue have one cursor for all that may draw them.
    """

    at: int
    who: tuple[int, ...]
    back: int
    task: int


class _Reach:
    """How far some processes come with every word as large as it can get, and what they do on the way to some
    words: ``touched``."""

    def __init__(self, reducer: Reducer, start: list[int], words: Iterable[int]) -> None:
        self.nodes, self.sent, self.ordered = reducer.nodes, reducer.sent, reducer.ordered
        self.start, self.high = start, list(start)
        self.touched: dict[int, dict[object, set[int]]] = {word: {} for word in words}
        # Those that go on in this round, and those that wait for the next.
        self.cursors: list[_Cursor] = []
        self.still: list[_Cursor] = []
        self.open_tasks: set[int] = set()
        self.started: set[int] = set()

    def begin(self, number: int, process: Process) -> None:
        """A process sends what it holds back, and goes on from where it stands."""
        at, back, *_, held = process
        for notify in held:
            self._raise(notify, (number,))
        self.cursors.append(_Cursor(at, (number,), back, -1))

    def run(self) -> None:
        """Move all cursors until none can."""
        moved = True
        while moved:
            moved = False
            for cursor in self.cursors:
                while cursor.at >= 0:
                    node = self.nodes[cursor.at]
                    if not _PASSES.get(node.kind, _Reach._go)(self, cursor, node):
                        self.still.append(cursor)
                        break
                    moved = True
            self.cursors, self.still = self.still, []

    def _touch(self, word: int, kind: object, who: tuple[int, ...]) -> None:
        if word in self.touched:
            self.touched[word].setdefault(kind, set()).update(who)

    def _raise(self, notify: Held, who: tuple[int, ...]) -> None:
        word, high = notify.element, self.high
        if not notify.need:
            high[word] += 1
            self._touch(word, ADD, who)
            return
        if notify.slot >= 0:
            high[notify.slot] += 1
            self._touch(notify.slot, _counted(notify), who)
            if high[notify.slot] < notify.wanted:
                return
        high[word] = max(high[word], notify.need)
        self._touch(word, SET, who)

    def _open(self, queue: Node, word: int, who: tuple[int, ...]) -> None:
        """The tasks that may be drawn from a queue, each once; ``word`` counts those that were."""
        for task in queue.tasks[self.high[word] if word in self.ordered else 0 :]:
            if task not in self.started:
                self.started.add(task)
                self.open_tasks.add(task)
                self.still.append(_Cursor(task, who, -1, task))

    # Steps by kind of node: whether the cursor has passed it.

    def _go(self, cursor: _Cursor, node: Node) -> bool:
        cursor.at = node.next
        return True

    def _wait(self, cursor: _Cursor, node: Node) -> bool:
        need, high = node.need, self.high
        if any(high[word] < need for word in node.elements):
            return False
        for word in node.elements:
            self._touch(word, WAIT, cursor.who)
        return self._go(cursor, node)

    def _notify(self, cursor: _Cursor, node: Node) -> bool:
        given = self.sent[cursor.at]
        assert given is not None
        self._raise(given, cursor.who)
        return self._go(cursor, node)

    def _take(self, cursor: _Cursor, node: Node) -> bool:
        word = node.elements[0]
        self._touch(word, TAKE, cursor.who)
        if node.slot >= 0:
            self.high[node.slot] = max(self.high[node.slot], 1)
        self._open(node, word, cursor.who)
        return self._go(cursor, node)

    def _follow(self, cursor: _Cursor, node: Node) -> bool:
        drawn = self.start[node.elements[0]]
        if drawn and drawn <= len(node.tasks):
            # What has been drawn is known.
            cursor.at, cursor.back = node.tasks[drawn - 1], node.again
            return True
        if not drawn:
            if not self.high[node.elements[0]]:
                return False
            self._open(node, node.slot, cursor.who)
        return self._go(cursor, node)

    def _clear(self, cursor: _Cursor, node: Node) -> bool:
        for word in node.elements:
            self._touch(word, CLEAR, cursor.who)
            if word in self.ordered:
                self.high[word] = 0
        return self._go(cursor, node)

    def _place(self, cursor: _Cursor, node: Node) -> bool:
        self._touch(node.elements[0], SLOT, cursor.who)
        return self._go(cursor, node)

    def _return(self, cursor: _Cursor, _: Node) -> bool:
        self.open_tasks.discard(cursor.task)
        cursor.at, cursor.back = cursor.back, -1
        return True

    def _end(self, cursor: _Cursor, node: Node) -> bool:
        """The launch ends when all its workers have, and so all tasks of its queues."""
        if not self.open_tasks.isdisjoint(node.tasks):
            return False
        for word in (*node.elements, *node.late):
            self.high[word] += 1
        cursor.at = -1
        return True


_PASSES: dict[int, Callable[[_Reach, _Cursor, Node], bool]] = {
    WAIT: _Reach._wait,
    ADD: _Reach._notify,
    HOLD: _Reach._notify,
    SET: _Reach._notify,
    TAKE: _Reach._take,
    FOLLOW: _Reach._follow,
    CLEAR: _Reach._clear,
    SLOT: _Reach._place,
    RETURN: _Reach._return,
    END: _Reach._end,
}


def _counted(node: Held) -> tuple[object, ...]:
    """Counted notifies of one kind commute: whichever is last sets the word, and carries all."""
    return (SET, node.mode, node.wanted, node.element, node.need)
