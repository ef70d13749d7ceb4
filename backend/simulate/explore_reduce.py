"""Persistent sets: which steps of a state are enough to explore.

A set T of steps is *persistent* in a state if nothing that the other processes can do without a step of
T depends on one of T (Godefroid, 1996). What they can do is overestimated: they run as far as they can
with every word as large as it can get, while the processes of T stand still. Searching only T from each
state keeps every deadlock and, up to steps that commute, every execution; races, versions and counts
are the same in executions that differ only in the order of such steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
        nodes, sent, ordered = self.nodes, self.sent, self.ordered
        high = list(start)
        touched: dict[int, dict[object, set[int]]] = {w: {} for w in self._used(stands, frozen)}

        def touch(word: int, kind: object, who: tuple[int, ...]) -> None:
            if word in touched:
                touched[word].setdefault(kind, set()).update(who)

        def raised(notify: Held, who: tuple[int, ...]) -> None:
            word = notify.element
            if not notify.need:
                high[word] += 1
                touch(word, ADD, who)
                return
            reached = True
            if notify.slot >= 0:
                high[notify.slot] += 1
                if notify.slot in touched:
                    touch(notify.slot, _counted(notify), who)
                reached = high[notify.slot] >= notify.wanted
            if reached:
                high[word] = max(high[word], notify.need)
                touch(word, SET, who)

        # A cursor: the node, who may stand there, where a task returns to, and the task. Tasks of a
        # dynamic queue are started once for all.
        cursors: list[tuple[int, tuple[int, ...], int, int]] = []
        open_tasks: set[int] = set()
        started: set[int] = set()
        for number, (at, back, _, _, _, held) in enumerate(stands):
            if at < 0 or number in frozen:
                continue
            for notify in held:
                raised(notify, (number,))
            cursors.append((at, (number,), back, -1))
        moved = True
        while moved:
            moved = False
            still: list[tuple[int, tuple[int, ...], int, int]] = []
            for at, who, back, task in cursors:
                while at >= 0:
                    node = nodes[at]
                    kind = node.kind
                    if kind == WAIT:
                        need = node.need
                        for word in node.elements:
                            if high[word] < need:
                                break
                        else:
                            for word in node.elements:
                                touch(word, WAIT, who)
                            moved = True
                            at = node.next
                            continue
                        still.append((at, who, back, task))
                        break
                    given = sent[at]
                    if given is not None:
                        raised(given, who)
                    elif kind == TAKE:
                        word = node.elements[0]
                        touch(word, TAKE, who)
                        if node.slot >= 0:
                            high[node.slot] = max(high[node.slot], 1)
                        position = high[word] if word in ordered else 0
                        for other in node.tasks[position:]:
                            if other not in started:
                                started.add(other)
                                open_tasks.add(other)
                                still.append((other, who, -1, other))
                    elif kind == FOLLOW:
                        word = node.elements[0]
                        if start[word]:
                            # What has been drawn is known.
                            known, moved = start[word] <= len(node.tasks), True
                            at = node.tasks[start[word] - 1] if known else node.next
                            back = node.again if known else back
                            continue
                        if not high[word]:
                            still.append((at, who, back, task))
                            break
                        position = high[node.slot] if node.slot in ordered else 0
                        for other in node.tasks[position:]:
                            if other not in started:
                                started.add(other)
                                open_tasks.add(other)
                                still.append((other, who, -1, other))
                    elif kind == CLEAR:
                        for word in node.elements:
                            touch(word, CLEAR, who)
                            if word in ordered:
                                high[word] = 0
                    elif kind == SLOT:
                        touch(node.elements[0], SLOT, who)
                    elif kind == RETURN:
                        open_tasks.discard(task)
                        moved = True
                        at, back = back, -1
                        continue
                    elif kind == END:
                        # The launch ends when all its workers have, and so all tasks of its queues.
                        if not open_tasks.isdisjoint(node.tasks):
                            still.append((at, who, back, task))
                            break
                        for word in (*node.elements, *node.late):
                            high[word] += 1
                        moved = True
                        break
                    moved = True
                    at = node.next
            cursors = still
        return touched


def _counted(node: Held) -> tuple[object, ...]:
    """Counted notifies of one kind commute: whichever is last sets the word, and carries all."""
    return (SET, node.mode, node.wanted, node.element, node.need)
