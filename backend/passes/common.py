"""What several passes ask of a program: extents, moved tensors and their closed-form index maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tilelink.backend.expand import environment, evaluate
from tilelink.errors import TilelinkError
from tilelink.ir import (
    All,
    At,
    Block,
    Expr,
    Index,
    Op,
    Range,
    Ref,
    Type,
    Value,
    dynamic_extents,
    make,
    minimum,
)
from tilelink.ir.node import DECLARATIONS
from tilelink.schedules import Schedule
from tilelink.schedules.roles import HALVES, roles_of

RANK = Expr.name("RANK")
WORLD = Expr.name("WORLD")
MOVED = ("gather", "scatter", "reduce")


class UnsupportedProgram(TilelinkError):
    """A kernel that has a meaning but that the passes cannot fuse."""

    code: ClassVar[str] = "cannot-fuse"
    message: ClassVar[str] = "{detail}"
    hint: ClassVar[str] = "{help}"


def schedule_of(program: Op) -> Schedule:
    """The schedule that the program carries."""
    return Schedule.from_json(program["schedule"])


def dynamic_extent(program: Op) -> str | None:
    """The extent that is known at run time only, up to its capacity; None where there is none."""
    found = dynamic_extents(program)
    if len(found) > 1:
        raise UnsupportedProgram(
            found[1].span,
            detail=f"`{found[0].symbol}` and `{found[1].symbol}` are both dynamic",
            help="mark one extent of a kernel",
        )
    return found[0].symbol if found else None


def at_capacity(program: Op, dims: Iterable[Expr | int]) -> tuple[Expr | int, ...]:
    """Dimensions of memory that is allocated once: a dynamic extent has its capacity."""
    name = dynamic_extent(program)
    if name is None:
        return tuple(dims)
    values = {name: int(program.declared(name)["value"])}
    found = [d.substitute(values) if isinstance(d, Expr) and name in d.names else d for d in dims]
    return tuple(d if d.value is None else d.value for d in map(Expr.of, found))


def global_dims(declaration: Op, env: Mapping[str, int]) -> tuple[int, ...]:
    """The dimensions as the kernel's text has them: of a moved tensor the whole, not the shard."""
    return tuple(int(evaluate(d, env, declaration)) for d in declaration["dims"])


def tensors_of(program: Op) -> dict[str, Op]:
    """Declared tensors by name."""
    return {op.symbol: op for op in program.find("tensor")}


def moved_axis(tensor: Op) -> int:
    """The axis that ranks share out: `over`, or `part_axis` of a sum in two shots; 0 where there is none."""
    return int(tensor.get("part_axis", tensor.get("over", 0)))


def replace_declaration(program: Op, new: Op) -> Op:
    """The program with the declaration of the same symbol replaced."""
    ops = tuple(new if op.name == new.name and op.ref == new.ref else op for op in program.body)
    return program.with_ops(ops)


def add_declarations(program: Op, *new: Op) -> Op:
    """The program with declarations put behind the existing ones."""
    ops = program.body
    last = max((i for i, op in enumerate(ops) if op.name in DECLARATIONS), default=-1) + 1
    return program.with_ops((*ops[:last], *new, *ops[last:]))


def stages_of(program: Op) -> tuple[Op, ...]:
    """Every compute stage, in program order."""
    return tuple(stage for launch in program.find("launch") for stage in launch.find("stage"))


def accesses(op: Op, symbol: str, name: str) -> Iterator[Op]:
    """Every op ``name`` (load, store) on ``symbol`` inside ``op``."""
    for inner in op.walk():
        if inner.name == name and inner.ref is not None and inner.ref.symbol == symbol:
            yield inner


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that is spread over the ranks, with its owner map in closed form.

    ``axis``: the moved axis, ``extent`` elements long; ``shard`` of them a rank, in blocks of
    ``block``. A reduce tensor is not spread, and its shard is the whole extent, unless it is summed in
    two ``shots``: then each rank sums one part, and the parts go round. ``channel_rows``: local
    elements of one channel; ``tile``: of one communication tile. ``task_rows``: elements along the moved axis
    that one task stores, ``tasks_across``: tasks beside each other over all other axes. ``dynamic``: the moved
    extent, where only its capacity is known. ``pulled``: contributions stay where they are made, and whoever
    sums them reads them there. ``words``: the encoding in which what peers write says itself that it
    is there; "" where flags do. ``channel_axis``: the axis along which channels lie, ``across`` elements long,
    where that is not the moved one: tasks span the shards of several ranks, or own tiles do not come last.
    ``channel_rows`` and ``task_columns``, of which each task stores so many, count along it then. Else None.
    ``closed``: rows that are gathered land side by side, as many as there are: tiles that read them span shards.
    ``by_owner``: dynamic rows of a sum in one shot lie by the owners of another tensor, in one channel.
    """

    name: str
    kind: str
    axis: int
    extent: int
    world: int
    block: int
    owner: Expr | None
    resource: str = "copy_engine"
    tile: int = 0
    channel_rows: int = 0
    in_place: bool = True
    task_rows: int = 1
    tasks_across: Expr | int = 1
    dynamic: str | None = None
    shots: int = 1
    words: str = ""
    pulled: bool = False
    channel_axis: int | None = None
    across: int = 0
    task_columns: int = 1
    closed: bool = False
    by_owner: bool = False

    @property
    def pitch(self) -> Expr | int:
        """How far the shards of two ranks begin from each other where they land."""
        return self.live if self.closed else self.shard

    @property
    def live(self) -> Expr | int:
        """Elements of a shard that are there in a call: all, unless the extent is dynamic."""
        if self.dynamic is None:
            return self.shard
        whole = Expr.name(self.dynamic)
        return whole // WORLD if self.spread else whole

    @property
    def spread(self) -> bool:
        """Whether each part of the moved axis has one rank that owns it, or (in two shots) sums it."""
        return self.kind != "reduce" or self.shots == 2

    @property
    def shard(self) -> int:
        """Elements of the moved axis that one rank holds."""
        return self.extent // self.world if self.spread else self.extent

    @property
    def blocks(self) -> int:
        """Blocks of one owner."""
        return self.shard // self.block

    @property
    def along(self) -> int:
        """The axis along which channels lie."""
        return self.axis if self.channel_axis is None else self.channel_axis

    @property
    def channels(self) -> int:
        """Channels of one source."""
        return -(-self.length // self.channel_rows)

    @property
    def length(self) -> int:
        """Elements of the axis along which channels lie."""
        return self.shard if self.channel_axis is None else self.across

    def owner_of(self, start: Expr) -> Expr:
        """The rank that owns the block of element ``start``."""
        if self.owner is None:
            return RANK
        if self.block == self.shard:
            return start // self.shard
        return self.owner.substitute({"e": start})

    def local_of(self, start: Expr) -> Expr:
        """The place of element ``start`` in its owner's shard."""
        if not self.spread:
            return start
        if self.block == self.shard:
            return start % self.shard
        return start // (self.block * self.world) * self.block + start % self.block

    def landing_of(self, start: Expr) -> Expr:
        """The place of element ``start`` where shards lie one behind the other in rank order."""
        if not self.spread or self.block == self.shard:
            return start
        return self.owner_of(start) * self.shard + self.local_of(start)

    def block_of(self, owner: Expr, number: Expr) -> Expr | None:
        """The block (counted over the whole axis) that is ``owner``'s ``number``-th; None if not closed-form."""
        if self.block == self.shard:
            return owner if self._in_rank_order() else None
        w, o, j = self.world, Expr.name("o"), Expr.name("j")
        cyclic = j * w + o
        zigzag = j * w + o + j % 2 * (w - 1 - o * 2)
        for form in (cyclic, zigzag):
            if self._inverts(form):
                return form.substitute({"o": owner, "j": number})
        return None

    def _in_rank_order(self) -> bool:
        """Whether the owners of whole shards are the ranks in order: closed forms hold for no other."""
        if self.owner is None:
            return True
        starts = np.arange(self.world) * self.shard
        return bool(np.all(self.owner.evaluate({"e": starts}) == np.arange(self.world)))

    def _inverts(self, form: Expr) -> bool:
        """Whether ``form`` (in ``o`` and ``j``) undoes ``owner_of`` and ``local_of`` on every block."""
        owners = np.arange(self.world).repeat(self.blocks)
        numbers = np.tile(np.arange(self.blocks), self.world)
        start = form.evaluate({"o": owners, "j": numbers}) * self.block
        e = Expr.name("e")
        owner = self.owner_of(e).evaluate({"e": start})
        local = self.local_of(e).evaluate({"e": start})
        return bool(np.all(owner == owners) and np.all(local == numbers * self.block))

    def channel_of(self, local: Expr) -> Expr:
        """The channel of local element ``local``."""
        return Expr.const(0) if self.channels == 1 else local // self.channel_rows

    def rows_of(self, channel: Expr) -> Expr | int:
        """Local elements of ``channel``; the last channel may be shorter."""
        if self.by_owner:
            return self.extent  # its one channel's: those that are there are no range
        if self.channels == 1:
            return self.live if self.channel_axis is None else self.across
        fixed = (
            self.dynamic is None or self.channel_axis is not None
        )  # columns are as many in each call
        if fixed and self.length % self.channel_rows == 0:
            return self.channel_rows
        end = self.live if self.channel_axis is None else self.across
        return (
            minimum(channel * self.channel_rows + self.channel_rows, end)
            - channel * self.channel_rows
        )

    def tasks_of(self, channel: Expr) -> Expr | int:
        """Tasks that store one channel of one owner."""
        if self.channel_axis is not None:
            return self.tasks_meeting(RANK, channel)
        if self.by_owner:
            shard = Expr.name(self.dynamic or "") // WORLD
            return _times(
                WORLD * ((shard + (self.task_rows - 1)) // self.task_rows), self.tasks_across
            )
        if self.channel_rows == self.task_rows and self.block == self.shard:
            return self.tasks_across
        rows = self.rows_of(channel)
        if self.block != self.shard:
            blocks = rows // self.block * -(-self.block // self.task_rows)
        else:
            blocks = (rows + (self.task_rows - 1)) // self.task_rows
        return _times(blocks, self.tasks_across)

    def owners_met(self, start: Expr, stop: Expr) -> tuple[Expr | int, Expr | int]:
        """The ranks lo..hi (half open) whose shards ``start``..``stop`` of the moved axis meet."""
        if self.task_rows >= self.extent:
            return 0, WORLD
        return start // self.shard, (stop - 1) // self.shard + 1

    def rows_meeting(self, owner: Expr) -> Expr | int:
        """Rows of tasks that span shards and meet the shard of ``owner``."""
        if self.shard % self.task_rows == 0:
            return self.shard // self.task_rows
        if self.task_rows >= self.extent or self.task_rows % self.shard == 0:
            return 1
        first = owner * self.shard
        return (first + (self.shard - 1)) // self.task_rows - first // self.task_rows + 1

    def tasks_meeting(self, owner: Expr, channel: Expr) -> Expr | int:
        """Tasks that span shards and store something of ``channel`` into the shard of ``owner``."""
        columns = (self.rows_of(channel) + (self.task_columns - 1)) // self.task_columns
        return _times(self.rows_meeting(owner), _times(columns, self.tasks_across))

    def tiles_of(self, channel: Expr) -> Expr | int:
        """Communication tiles of one channel of one source."""
        if self.channel_rows == self.tile:
            return 1
        return (self.rows_of(channel) + (self.tile - 1)) // self.tile

    def channel_range(self, start: Expr, stop: Expr, tile: int) -> tuple[Expr, Expr]:
        """Channels lo..hi (half open) that a tile, ``tile`` long at most, of one block lies in."""
        if self.channels == 1:
            return Expr.const(0), Expr.const(1)
        if self.channel_axis is not None:
            if self.channel_rows % tile == 0:
                return self.channel_of(start), self.channel_of(start) + 1
            return self.channel_of(start), self.channel_of(stop - 1) + 1
        local = self.local_of(start)
        aligned = self.block == self.shard or self.block % tile == 0
        if (self.channel_rows % tile == 0 and aligned) or self.channel_rows % self.block == 0:
            return self.channel_of(local), self.channel_of(local) + 1
        return local // self.channel_rows, (local + (stop - start) - 1) // self.channel_rows + 1


def copied_region(program: Op, info: Moved, element: Index) -> tuple[Index, ...]:
    """What a copy takes: ``element`` on the moved axis and everything else whole, of rows those that are there."""
    dims = [Expr.of(dim) for dim in program.declared(info.name)["dims"]]
    rows = dynamic_extent(program)
    return tuple(
        element if axis == info.axis else Range(Expr.const(0), dim) if rows in dim.names else All()
        for axis, dim in enumerate(dims)
    )


def moved(program: Op, name: str) -> Moved:
    """The :class:`Moved` of tensor ``name`` as far as the passes have decided it."""
    op = program.declared(name)
    names = environment(program)
    dims = global_dims(op, names)
    axis = moved_axis(op)
    owner = op.get("owner")
    world = names["WORLD"]
    kind = op["move"]
    extent = dims[axis]
    shots = int(op.get("shots", 1))
    shard = extent if kind == "reduce" and shots == 1 else extent // world
    if kind == "reduce" and shots == 2:
        owner = Expr.name("e") // shard
    concrete = owner.substitute(dict(names)) if isinstance(owner, Expr) else None
    return Moved(
        name=name,
        kind=kind,
        axis=axis,
        extent=extent,
        world=world,
        block=int(op.get("block", shard)),
        owner=concrete,
        resource=op.get("resource", "copy_engine"),
        tile=int(op.get("comm_tile", shard)),
        channel_rows=int(op.get("channel_rows", shard)),
        in_place=bool(op.get("in_place", True)),
        task_rows=int(op.get("task_rows", 1)),
        tasks_across=op.get("tasks_across", 1),
        dynamic=_dynamic_along(program, op, axis),
        shots=shots,
        words=op.get("polled", ""),
        pulled=bool(op.get("pulled", False)),
        channel_axis=op.get("channel_axis"),
        across=dims[int(op.get("channel_axis", axis))],
        task_columns=int(op.get("task_columns", 1)),
        closed=bool(op.get("closed", False)),
        by_owner=bool(op.get("by_owner", False)),
    )


def _dynamic_along(program: Op, tensor: Op, axis: int) -> str | None:
    """The dynamic extent, if a tensor moves along it."""
    name = dynamic_extent(program)
    along = tensor["dims"][axis]
    if name is None or not isinstance(along, Expr) or name not in along.names:
        return None
    return name


def start_of(value: Value) -> Expr:
    """The first index of a loop variable: of a tile, or the number itself."""
    return Expr.name(value.name) if not value.type.is_tile else Expr.name(f"{value.name}.start")


def stop_of(value: Value) -> Expr:
    """One past the last index of a loop variable."""
    return Expr.name(value.name) + 1 if not value.type.is_tile else Expr.name(f"{value.name}.stop")


def substitute(op: Op, values: dict[str, Value]) -> Op:
    """``op`` with values renamed everywhere: operands, indices, expressions, types, results, arguments."""
    exprs = {
        f"{old}{suffix}": Expr.name(f"{new.name}{suffix}")
        for old, new in values.items()
        for suffix in ("", ".start", ".stop", ".tile")
    }
    dims = {old: new.name for old, new in values.items()}

    def value(v: Value) -> Value:
        shape = tuple(dims.get(d, d) for d in v.type.shape)
        known = values.get(v.name)
        return Value(known.name if known else v.name, Type(v.type.dtype, shape))

    def index(i: Index) -> Index:
        if isinstance(i, Value):
            return value(i)
        if isinstance(i, At):
            return At(value(i.value), i.start.substitute(exprs))
        if isinstance(i, Expr):
            return i.substitute(exprs)
        if isinstance(i, Range):
            return Range(i.lo.substitute(exprs), i.hi.substitute(exprs))
        return i

    def ref(r: Ref) -> Ref:
        return Ref(r.symbol, tuple(index(i) for i in r.index))

    def attr(a: object) -> object:
        if isinstance(a, Ref):
            return ref(a)
        if isinstance(a, Expr):
            return a.substitute(exprs)
        return tuple(map(attr, a)) if isinstance(a, tuple) else a

    return replace(
        op,
        results=tuple(map(value, op.results)),
        ref=ref(op.ref) if op.ref else None,
        operands=tuple(map(value, op.operands)),
        attrs=tuple((k, attr(v)) for k, v in op.attrs),
        blocks=tuple(
            Block(tuple(map(value, b.args)), tuple(substitute(o, values) for o in b.ops))
            for b in op.blocks
        ),
    )


def storing_stage(program: Op, name: str) -> tuple[Op, int | None]:
    """The stage whose tasks store ``name``, and its variable that walks the moved axis (None: none does)."""
    axis = moved_axis(program.declared(name))
    for stage in stages_of(program):
        for store in accesses(stage, name, "store"):
            if not store.get("final") and not store.get("relay"):
                assert store.ref is not None
                element = store.ref.index[axis]
                return stage, stage.args.index(element) if element in stage.args else None
    raise UnsupportedProgram(
        detail=f"`{name}` is never stored", help="store it, or drop it from the mapping"
    )


def reading_rows(program: Op, name: str) -> int | None:
    """The length along the moved axis of the tiles in which tasks read ``name``; None where none reads tiles."""
    axis = moved_axis(program.declared(name))
    for stage in stages_of(program):
        for load in accesses(stage, name, "load"):
            element = load.ref.index[axis] if load.ref is not None and load.ref.index else None
            if element in stage.args:
                return int(stage["tile"][stage.args.index(element)])
    return None


def copied_beside(program: Op, name: str) -> bool:
    """Whether workers of the launch that multiplies copy ``name`` in boxes, and its warps have roles.

    They copy by way of the ring that operands have, and two groups take turns at it. Tiles that span shards, or of
    which each group has a half, are computed behind all copies instead.
    """
    move = schedule_of(program).move(name)
    return (
        schedule_of(program).emitter == "gluon"
        and move.sm_workers > 0
        and move.copies == "boxes"
        and not move.spans
        and not any(map(in_halves, stages_of(program)))
    )


def in_halves(stage: Op) -> bool:
    """Whether each of two warp groups has a half of the tiles of a stage that multiplies."""
    sums = sum(op.name == "dot" for op in stage.walk())
    if not sums or len(stage["tile"]) != 2:
        return False
    rows, columns = (int(n) for n in stage["tile"])
    return roles_of(rows, columns, sums) == HALVES


def handed_on(program: Op, name: str) -> tuple[tuple[str, int], ...]:
    """The stages, by launch and position in it, that store ``name`` for a later stage of their launch.

    Each has an element of the tensor's counter, in this order. What a later launch reads is there when
    it starts.
    """
    found: list[tuple[str, int]] = []
    for launch in program.find("launch"):
        stages = [(n, op) for n, op in enumerate(launch.body) if op.name == "stage"]
        last = max((n for n, op in stages if any(accesses(op, name, "load"))), default=-1)
        found += [
            (launch.symbol, number)
            for number, stage in stages
            if number < last
            and any(not (s.get("final") or s.get("relay")) for s in accesses(stage, name, "store"))
        ]
    return tuple(found)


def folded(program: Op, name: str) -> bool:
    """Whether the sum of ``name`` stands in the epilogue of its own tiles."""
    return any(
        op.operands for stage in stages_of(program) for op in accesses(stage, name, "load_sum")
    )


def _tiles(program: Op, extent: Expr | int, tile: int) -> Expr | int:
    """How many tiles an extent makes: a number, or an expression of the dynamic extent."""
    if isinstance(extent, int):
        return -(-extent // tile)
    name = dynamic_extent(program)
    if name is not None and name in extent.names:
        return extent if tile == 1 else (extent + (tile - 1)) // tile
    return -(-int(extent.evaluate(environment(program))) // tile)


def _times(left: Expr | int, right: Expr | int) -> Expr | int:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    product = Expr.of(left) * right
    return product if product.value is None else product.value


def tasks_across(program: Op, stage: Op, *skip: int | None) -> Expr | int:
    """Tasks of ``stage`` on one rank over all its variables but the numbers ``skip``; they end at its segments."""
    count: Expr | int = 1
    cut = stage.get("segment") is not None
    for number, (extent, tile) in enumerate(zip(stage["extent"], stage["tile"], strict=True)):
        if number in skip:
            continue
        if not cut or number != int(stage.get("axis", 0)):
            count = _times(count, _tiles(program, extent, tile))
            continue
        segment = int(stage["segment"])
        length = extent if isinstance(extent, int) else int(extent.evaluate(environment(program)))
        segments = Expr.of(stage.get("segments", length // segment)).evaluate(environment(program))
        per = _tiles(program, stage.get("live", segment), int(tile))
        count = _times(_times(count, int(segments)), per)
    return count


def tasks_of_stage(program: Op, stage: Op) -> Expr | int:
    """All tasks of ``stage`` on one rank."""
    if stage.get("positions") is not None:
        lo, hi = (int(x) for x in stage["positions"])
        return hi - lo
    return tasks_across(program, stage, None)


def drawn(stage: Op) -> tuple[Op, Op]:
    """``stage`` with a dynamic queue, and the counter that it draws from."""
    queue = f"{stage.symbol}.queue"
    counter = make("counter", ref=Ref(queue), dims=(1,))
    return stage.with_attrs(
        queue="dynamic", counter=Ref(queue, (Expr.const(0),)), first=None
    ), counter
