"""``bind-emitter``: which launches come out as Gluon kernels, whose warps have roles."""

from __future__ import annotations

from dataclasses import dataclass

from tilelink.backend.copying import copies_of
from tilelink.backend.passes.common import in_halves, schedule_of
from tilelink.ir import Block, Expr, Op, Ref, Value, make
from tilelink.schedules import ScheduleError
from tilelink.schedules.roles import (
    GROUP_ROWS,
    HALVES,
    LEAVING,
    PRODUCT_WARPS,
    fitting_tile,
    roles_of,
)

_BEFORE = frozenset({"wait", "zeros", "full", "constant", "param"})
_INSIDE = frozenset({"load", "transpose", "dot", "yield"})
_NEVER = frozenset({"dot", "for_tiles", "transfer", "transpose", "reshape"})
_REDUCE = frozenset({"sum", "max", "min"})
# What a group cannot do in front of a sum whose parts a role that loads fetches behind its own waits.
_BEHIND_SUM = frozenset({"load", "store", "notify", "load_sum", "for_range"})


@dataclass(frozen=True, slots=True)
class Copies:
    """The parts of a stage that copies beside products: ``before`` and ``load`` belong to the loader, which hands
    the tile to a group; ``after``, stores and notifies, to the group."""

    before: tuple[Op, ...]
    load: Op
    after: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """The parts of a stage that multiplies: ``before`` belongs to the loader, ``epilogue`` to the rest."""

    before: tuple[Op, ...]
    loop: Op
    epilogue: tuple[Op, ...]

    @property
    def landed(self) -> Op | None:
        """The sum over ranks whose parts a role that loads fetches, behind the waits of the epilogue."""
        return next((op for op in self.epilogue if lands(op)), None)

    @property
    def loads(self) -> tuple[Op, ...]:
        """The loads of the main loop, one a region."""
        found: list[Op] = []
        for op in self.loop.body:
            same = (o for o in found if _reads(o) == _reads(op))
            if op.name == "load" and next(same, None) is None:
                found.append(op)
        return tuple(found)

    def load_of(self, value: Value) -> tuple[Op, bool]:
        """The load behind an operand of a product, and whether it is transposed."""
        made = {op.results[0].name: op for op in self.loop.body if op.results}
        op, turned = made[value.name], False
        while op.name == "transpose":
            op, turned = made[op.operands[0].name], not turned
        return next(o for o in self.loads if _reads(o) == _reads(op)), turned


def lands(op: Op) -> bool:
    """Whether ``op`` adds parts to a product that a loader has fetched through TMA."""
    return op.name == "load_sum" and bool(op.operands) and op.get("via") == "tma"


def landing_stages(launch: Op) -> list[tuple[Op, Product]]:
    """The stages of a launch with roles whose sums may share a ring that parts land in; [] where they cannot.

    Groups take turns at that ring by the number of a tile among those that have such a sum. So these tiles follow
    one another: a worker that has one of them has no other in between, and its groups alternate at them. All of
    them have boxes of one shape and type, and as many. They wait for nothing in front of their main loop: the
    fetcher of the parts is not the loader, which does that.
    """
    products = [
        (op, split_product(op)) for op in launch.body if op.name == "stage" and not copies_of(op)
    ]
    found = [n for n, (_, product) in enumerate(products) if product.landed is not None]
    if not found or found != list(range(found[0], found[-1] + 1)):
        return []
    run = [products[n] for n in found]
    kinds = {
        (stage["tile"], product.loop["tile"], product.loads[0].results[0].type.dtype)
        for stage, product in run
    }
    waiting = any(op.name == "wait" for _, product in run for op in product.before)
    return run if len(kinds) == 1 and not waiting else []


def _reads(op: Op) -> tuple[object, ...]:
    return op.name, op.ref, op.get("own"), op.get("when")


class Unfit(Exception):
    """Why a stage is none that roles can run: the op concerned, what it is, and what would do beside Triton."""

    def __init__(self, op: Op, detail: str, advice: str = "") -> None:
        super().__init__(detail)
        self.op, self.detail, self.advice = op, detail, advice


def split_copies(stage: Op) -> Copies:
    """The parts of ``stage``, which copies; Unfit where it is not of the form that roles can run.

    That is: waits, the load of a tile, its stores and what they notify, for some workers, which draw the tiles
    from one queue.
    """
    if stage.get("workers") is None or stage.get("queue", "static") != "dynamic":
        raise Unfit(stage, "a stage that copies for all workers, or without a queue of its own")
    at = next(n for n, op in enumerate(stage.body) if op.name == "load")
    before, load, after = stage.body[:at], stage.body[at], stage.body[at + 1 :]
    for op in before:
        if op.name != "wait":
            raise Unfit(op, f"a `{op.name}` in front of what is copied")
    for op in (o for top in after for o in top.walk()):
        if op.name in ("wait", "load") or op.get("delay") is not None:
            raise Unfit(op, "a copy that waits, loads or holds back behind its load")
    return Copies(before, load, after)


def check_copies(launch: Op) -> None:
    """Unfit where a stage of ``launch`` copies beside products that have roles, in a way that roles cannot.

    Whoever copies does nothing else, lest the roles of a worker take tiles in other orders than they are drawn in.
    Two groups that take turns send them on, by way of slots of the ring: more than leave at a time, and as tall.
    """
    stages = [op for op in launch.body if op.name == "stage"]
    copying = [op for op in stages if copies_of(op)]
    if not copying:
        return
    if any(map(in_halves, stages)):
        raise Unfit(
            copying[0],
            "workers that copy beside groups that have halves of each tile",
            "use tiles that one warp group holds, as 128 x 128",
        )
    for stage in copying:
        split_copies(stage)
    if int(launch["stages"]) <= LEAVING:
        raise Unfit(
            copying[0],
            f"workers that copy by way of a ring of {launch['stages']} slots",
            f"use {LEAVING + 1} stages or more",
        )
    every = (0, int(launch["workers"]))
    low, high = copying[0]["workers"]
    for stage in stages:
        first, last = stage.get("workers", every)
        if stage is not copying[0] and first < high and low < last:
            raise Unfit(stage, "workers that copy and multiply")
    if len(copying) > 1:
        raise Unfit(copying[1], "a second stage that copies")
    rows, columns = (int(n) for n in copying[0]["tile"][-2:])
    ends = [Expr.of(extent) for extent in copying[0]["extent"][-2:]]
    whole = all(
        not end.names and int(end.evaluate({})) % length == 0
        for end, length in zip(ends, (rows, columns), strict=True)
    )
    for stage in stages:
        loop = next((op for op in stage.body if op.name == "for_tiles"), None)
        slots = loop is None or (rows == stage["tile"][0] and columns % int(loop["tile"][0]) == 0)
        if not (whole and slots):
            of = " x ".join(map(str, ends))
            detail = (
                f"copies of {of} in tiles of {rows} x {columns}, which are no slots of the ring"
            )
            raise Unfit(copying[0], detail, "use tiles and channels of as many rows as are copied")


def split_product(stage: Op) -> Product:
    """The parts of ``stage``; Unfit where it is not of the form that roles can run.

    That is: waits and constants, one loop of loads and products over one extent, an epilogue.
    """
    if stage.get("queue", "static") != "static":
        raise Unfit(stage, "a queue that is shared with workers that copy")
    if len(stage.args) != 2 or any(not a.type.is_tile for a in stage.args):
        raise Unfit(stage, "a stage over other variables than the rows and columns of a tile")
    at = next((i for i, op in enumerate(stage.body) if op.name not in _BEFORE), len(stage.body))
    loop = stage.body[at] if at < len(stage.body) else stage
    if loop.name != "for_tiles" or not any(op.name == "dot" for op in loop.body):
        raise Unfit(loop, f"`{loop.name}` in front of the main loop")
    if loop.get("extent") is None or len(loop["extent"]) != 1 or loop.get("segment") is not None:
        raise Unfit(loop, "a main loop that is not over one whole extent")
    rows, columns = (a.name for a in stage.args)
    made: dict[str, Op] = {}
    for op in loop.body:
        if op.name not in _INSIDE:
            raise Unfit(op, f"`{op.name}` in the main loop")
        if op.name == "transpose":
            source = made.get(op.operands[0].name)
            if source is None or source.name == "dot":
                raise Unfit(op, "a transpose of something that the loop does not load")
        if op.name == "dot":
            _check_dot(op, made, (rows, columns, loop.args[0].name))
        made |= {value.name: op for value in op.results}
    carried = {a.name for a in loop.args[1:]}
    sums = {name for name, op in made.items() if op.name == "dot"} - carried
    moved = [v for v in loop.body[-1].operands if v.name not in sums]
    if loop.body[-1].name != "yield" or moved:
        raise Unfit(loop, "a main loop that carries something else than sums of products")
    for top in stage.body[at + 1 :]:
        for op in top.walk():
            if op.name in _NEVER:
                raise Unfit(op, f"`{op.name}` behind the main loop")
    _check_landed(stage.body[at + 1 :])
    return Product(stage.body[:at], loop, stage.body[at + 1 :])


def _check_landed(epilogue: tuple[Op, ...]) -> None:
    """Unfit where parts would be waited for at another place than where the text says it.

    It is the loader that waits, or a fetcher: so all waits stand in front of the sum and nothing that others
    could see does. And no notify is held back: a later task would make it, whose loads stand behind these waits,
    and whose sum stands behind waits of its own.
    """
    at = next((n for n, op in enumerate(epilogue) if lands(op)), None)
    if at is None:
        return
    for op in epilogue[:at]:
        if op.name in _BEHIND_SUM:
            raise Unfit(op, f"a `{op.name}` in front of a sum whose parts the loader fetches")
    for op in (o for top in epilogue[at + 1 :] for o in top.walk()):
        if op.name == "wait" or lands(op):
            raise Unfit(op, f"a `{op.name}` behind a sum whose parts the loader fetches")
        if op.name == "notify" and op.get("delay") is not None:
            raise Unfit(op, "a notify held back in a stage whose loader waits for parts")


def _check_dot(op: Op, made: dict[str, Op], names: tuple[str, str, str]) -> None:
    rows, columns, depth = names
    shapes = [v.type.shape for v in op.operands[:2]]
    if shapes != [(rows, depth), (depth, columns)] or len(op.operands) != 3:
        raise Unfit(op, "a product of something else than the stage's rows and columns")
    if any(v.type.dtype not in ("bf16", "fp16") for v in op.operands[:2]):
        raise Unfit(op, f"a product in {op.operands[0].type.dtype}")
    if any(v.name not in made or made[v.name].name == "dot" for v in op.operands[:2]):
        raise Unfit(op, "a product of something that the loop does not load")
    if op.operands[2].name in made and made[op.operands[2].name].name != "dot":
        raise Unfit(op, "a product added to something that the loop loads")


def _shared_by(stage: Op, product: Product) -> str:
    """How two groups share the tiles of a stage; Unfit where they cannot."""
    rows, columns = (int(n) for n in stage["tile"])
    sums = len(product.loop.results)
    roles = roles_of(rows, columns, sums)
    if roles is None:
        detail = f"a tile of {rows} x {columns} with {sums} sum{'s' * (sums > 1)}"
        fits = zip(stage["extent"], fitting_tile(rows, columns, sums), strict=True)
        lengths = ",".join(f"{extent}={length}" for extent, length in fits)
        raise Unfit(
            stage,
            f"{detail}, which two warp groups of {GROUP_ROWS} rows cannot hold",
            f"use `--tile {lengths}`",
        )
    for top in product.epilogue if roles == HALVES else ():
        for op in top.walk():
            along = op.operands[0].type.shape[int(op["axis"])] if op.name in _REDUCE else ""
            if along == stage.args[0].name:
                raise Unfit(op, "a reduction over rows of which each warp group has half")
    return roles


def bind_emitter(program: Op) -> Op:
    """Give the launches that multiply to the emitter that the schedule names.

    Before, with ``emitter = "gluon"`` in the schedule::

        launch @f {after = ["head"], …} do { stage @C.gemm …  stage @C.sum …  finish … }
        stream @C.copy …

    After::

        launch @f {after = ["head"], emitter = "gluon", roles = "turns", …} do { stage @C.gemm … }
        stream @C.copy …
        launch @f.part2 {after = ["head", "f"], part = 2, …} do { stage @C.sum …  finish … }

    ``roles`` says how two warp groups share the tiles: in ``turns``, or each the ``halves`` of all.
    Invariant: a launch with roles holds nothing but products and a finish, in their order, and no
    stage changes. Raises ScheduleError where a product is of a form that roles cannot run.
    """
    schedule = schedule_of(program)
    if schedule.emitter != "gluon":
        return program
    if schedule.warps != PRODUCT_WARPS:
        raise ScheduleError(
            program.span,
            field="warps",
            detail=f"{schedule.warps} warps, of which a Gluon kernel has {PRODUCT_WARPS} multiply",
            help=f"use {PRODUCT_WARPS}, or the emitter triton",
        )
    if program.get("slots") is not None:
        raise ScheduleError(
            program.span,
            field="emitter",
            detail="`gluon` has no kernel that begins and ends a call by itself",
            help="use triton, or `slots = 1`",
        )
    if not any(op.name == "dot" for op in program.walk()):
        raise ScheduleError(
            program.span,
            field="emitter",
            detail=f"`{program.symbol}` multiplies no matrices, so warps have no roles in it",
            help="use triton",
        )
    ops: list[Op] = []
    late: list[Op] = []  # launches that stand behind the streams that they wait for
    for op in program.body:
        if op.name == "launch" and op.get("emitter") is None:
            ops, late = [*ops, *late], []
            first, *late = _split(op)
            ops.append(first)
        elif op.name == "stream":
            ops.append(op)
        else:
            ops, late = [*ops, *late, op], []
    return program.with_ops((*ops, *late))


def _split(launch: Op) -> list[Op]:
    """A launch as launches of which each has roles or has none."""
    runs: list[tuple[str, list[Op]]] = []
    beside = {id(op) for op in launch.body if op.name == "stage" and _copies_beside(launch, op)}
    products = [op for op in launch.body if op.name == "stage" and id(op) not in beside]
    for child in launch.body:
        # What copies does so beside products: those that it reads, or the first of those that wait for it.
        near = child if child in products else None if runs else products[0]
        roles = _roles(near) if near is not None else runs[-1][0]
        if not runs or runs[-1][0] != roles:
            runs.append((roles, []))
        runs[-1][1].append(child)
    found: list[Op] = []
    number = int(launch.get("part", 1))
    for roles, children in runs:
        ref, after, part = launch.ref, launch.get("after", ()), launch.get("part")
        if found:
            part = number + len(found)
            ref = Ref(launch.symbol.rsplit(".part", 1)[0] + f".part{part}")
            after = (*after, found[-1].symbol)
        found.append(
            make(
                "launch",
                ref=ref,
                span=launch.span,
                after=after,
                emitter="gluon" if roles else None,
                part=part,
                roles=roles or None,
                stages=launch["stages"],
                warps=launch["warps"],
                workers=launch["workers"],
                blocks=(Block((), tuple(children)),),
            )
        )
    return found


def _copies_beside(launch: Op, stage: Op) -> bool:
    """Whether a stage copies, for workers of its own; ScheduleError where roles cannot run it."""
    if not copies_of(stage) or stage.get("workers") is None:
        return False
    try:
        check_copies(launch)
    except Unfit as unfit:
        raise _refused(unfit, stage) from None
    return True


def _refused(unfit: Unfit, stage: Op) -> ScheduleError:
    return ScheduleError(
        unfit.op.span or stage.span,
        field="emitter",
        detail=unfit.detail,
        help=f"{unfit.advice}, or the emitter triton" if unfit.advice else "use triton",
    )


def _roles(stage: Op) -> str:
    """How warp groups share the tiles of a stage; the empty text where it multiplies nothing."""
    try:
        if any(op.name == "dot" for op in stage.walk()):
            return _shared_by(stage, split_product(stage))
        if stage.get("workers") is not None:
            raise Unfit(
                stage,
                "workers that copy beside those that multiply, in another form than this emitter has",
                "use the resource copy_engine, or of a scatter with the sum `epilogue` the copies `boxes`",
            )
    except Unfit as unfit:
        raise _refused(unfit, stage) from None
    return ""
