"""The schedule: how a kernel is run, never what it means. Frozen data with a JSON round trip."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from tilelink.errors import TilelinkError, choices
from tilelink.schedules.roles import PRODUCT_WARPS

ORDERS = ("auto", "row", "grouped", "arrival", "departure", "interleave")
# Who makes the code of a stage: `gluon` gives warps roles, `library` runs plain matrix products as the
# vendor's library does.
EMITTERS = ("triton", "gluon", "library")
MAX_TILE = 2**20
MAX_STAGES = 16
MAX_SPLIT = 16
MAX_TAIL = 8
MAX_WORKERS = 2**13
MAX_STREAMS = 4
SUMS = ("stage", "epilogue")
# How what is stored on a peer says that it is there: by a flag behind it, or each word of it by itself, which
# holds the number of the call too, or is no sentinel any more.
SIGNALS = ("flag", "word", "sentinel")
# How workers of `sm:N` copy: whole rows by loads and stores, to one peer after the other, or boxes by TMA, which
# are loaded once and stored into every peer.
COPIES = ("rows", "boxes")
# Who carries the contributions to a sum over the link: whoever made them, or whoever adds them.
DIRECTIONS = ("push", "pull")
# When the tiles of a rank's own slice are computed, whose epilogue adds what has arrived: behind all others,
# beside them by some workers, or between them by all.
OWNS = ("last", "beside", "between")
RESOURCES = ("copy_engine", "sm:N", "epilogue", "none")
_RESOURCE = re.compile(r"copy_engine|epilogue|none|sm:[1-9]\d{0,4}")


class ScheduleError(TilelinkError):
    """A schedule with a field that is unknown, of the wrong kind or out of range."""

    code: ClassVar[str] = "schedule"
    message: ClassVar[str] = "schedule field `{field}`: {detail}"
    hint: ClassVar[str] = "{help}"


@dataclass(frozen=True, slots=True)
class Move:
    """How one moved tensor travels.

    ``resource``: ``copy_engine``, ``sm:N`` (N workers of the launch), ``epilogue`` (the stores of the
    compute tile) or ``none`` (the library's collective, not overlapped). ``tile``: elements along the
    moved axis of one communication tile; None lets the compiler choose. ``channels``: flags a source
    rank, None lets the compiler choose; more of them release the consumer earlier and cost more signals.
    ``sum``: where the arrived parts of a scatter, or of a reduce in two shots, are added: in a ``stage`` of
    their own, or in the ``epilogue`` of the tiles of this rank's own slice, which are computed last.
    ``shots``: how a reduce is exchanged. 1: every rank gets every contribution and sums all of them;
    2: each rank sums a part, and hands the sum to every rank. None chooses by size, and 2 where ``sum`` is
    ``epilogue``; the library's collective chooses for itself. ``slots``: 2 gives what peers write two places,
    used by odd and by even calls: no call waits for acknowledgements of the one before, and no kernel goes
    before the launch. All moved tensors of a kernel have the same; only workers of the launch may move them
    (``sm:N``, ``epilogue``). ``streams``: side streams that share the copies of ``copy_engine``, so that
    while one signals or waits, another copies; each has its channels where their number divides, else its
    peers. ``signal``: how contributions and sums say that they have arrived. ``flag``: by a flag that is raised
    behind them; ``word``: every four bytes travel in a word of eight that holds the number of the call too
    (NCCL's LL protocol), and the reader polls the data: twice the bytes, and no more than a flight over the link;
    ``sentinel``: every four bytes land on a pattern that no data has (a Lamport buffer), which the reader polls
    until it is gone and then puts back: the bytes once, and a local store more. Both are for small sums, in two
    slots, stored by the ``epilogue`` and added in a ``stage``; what is summed by sentinels is read once.
    ``copies``: what the workers of ``sm:N`` copy at a time: ``rows``, by loads and stores, to one peer after the
    other; ``boxes`` of rows and columns, by TMA where that can have them, loaded once and stored into every peer.
    ``spans``: the tiles that read a gathered tensor are as long as ``tiles`` says, though they span the shards of
    several ranks: they wait for all of them, and this rank's rows are copied too. Else tiles end with each shard,
    and wait for that alone. The same of tiles that store a scatter which is pulled and summed in a stage: all
    owners of rows are notified. ``direction``: who carries the contributions to a scatter, or to a reduce in two
    shots, over the link. ``push``: the rank that made them, into memory of the rank that sums them; ``pull``: that
    rank, which reads them where they were made when it adds them. That is for the ``epilogue`` and the signal
    ``flag``: nothing is copied, and no contribution stored to a peer. ``own``: when the tiles of this rank's own
    slice are computed, with the sum in their ``epilogue``. ``last``: behind all others; ``beside`` them, by some
    workers, a little behind the others; ``between`` them, by all workers, some after a part of the others and the
    rest behind the rest. So what these tiles send leaves all along. That is for contributions that are stored by
    the ``epilogue`` of tiles of all ranks that take turns (order ``interleave``); where they are pulled, own tiles
    are computed beside the others in that order anyway. Not ``between`` with the emitter ``gluon``.
    """

    resource: str = "copy_engine"
    tile: int | None = None
    channels: int | None = None
    sum: str = "stage"
    shots: int | None = None
    slots: int = 1
    streams: int = 1
    signal: str = "flag"
    copies: str = "rows"
    spans: bool = False
    direction: str = "push"
    own: str = "last"

    def __post_init__(self) -> None:
        if not isinstance(self.resource, str) or not _RESOURCE.fullmatch(self.resource):
            raise ScheduleError(
                field="resource",
                detail=f"`{self.resource}` is not a resource",
                help=choices(self.resource, RESOURCES, "use one of"),
            )
        if self.tile is not None:
            _positive("tile", self.tile)
        if self.channels is not None:
            _positive("channels", self.channels)
        _one_of("sum", self.sum, SUMS)
        if self.shots is not None and not _one_or_two(self.shots):
            raise ScheduleError(
                field="shots",
                detail=f"{self.shots!r} is no number of shots",
                help="use 1, 2, or null to choose by size",
            )
        if not _one_or_two(self.slots):
            raise ScheduleError(
                field="slots", detail=f"{self.slots!r} is no number of slots", help="use 1 or 2"
            )
        if self.slots == 2 and not self.by_workers:
            raise ScheduleError(
                field="slots",
                detail=f"2 slots, but `{self.resource}` is no work of the launch",
                help="use 1 slot, or sm:N, or epilogue where a kernel stores the tensor",
            )
        _positive("streams", self.streams)
        if self.streams > MAX_STREAMS or (self.streams > 1 and self.resource != "copy_engine"):
            many = f"{self.streams} streams"
            raise ScheduleError(
                field="streams",
                detail=f"{many}, but `{self.resource}` has none"
                if self.resource != "copy_engine"
                else many,
                help=f"use 1, or up to {MAX_STREAMS} of copy_engine",
            )

        self._check_signal()
        self._check_direction()
        self._check_own()
        _one_of("copies", self.copies, COPIES)
        if self.copies != "rows" and not self.sm_workers:
            raise ScheduleError(
                field="copies",
                detail=f"{self.copies}, but `{self.resource}` has no workers that copy",
                help="use sm:N, or the copies `rows`",
            )
        if not isinstance(self.spans, bool):
            raise ScheduleError(
                field="spans",
                detail=f"{self.spans!r} is not true or false",
                help="use true or false",
            )

    def _check_signal(self) -> None:
        _one_of("signal", self.signal, SIGNALS)
        if self.signal == "flag":
            return
        self._check_needs(
            "signal", "flag", (("resource", "epilogue"), ("slots", 2), ("sum", "stage"))
        )

    def _check_direction(self) -> None:
        _one_of("direction", self.direction, DIRECTIONS)
        if self.direction == "push":
            return
        self._check_needs("direction", "push", (("resource", "epilogue"), ("signal", "flag")))

    def _check_own(self) -> None:
        _one_of("own", self.own, OWNS)
        if self.own == "last":
            return
        needs = (("resource", "epilogue"), ("sum", "epilogue"), ("direction", "push"))
        self._check_needs("own", "last", needs)

    def _check_needs(self, name: str, usual: str, needs: tuple[tuple[str, str | int], ...]) -> None:
        """ScheduleError unless fields have what a value of ``name`` that is not the ``usual`` one goes with."""
        value = getattr(self, name)
        for field, needed in needs:
            if getattr(self, field) != needed:
                raise ScheduleError(
                    field=name,
                    detail=f"`{value}`, but {field} is `{getattr(self, field)}`",
                    help=f"use `{usual}`; of a sum over ranks, a scatter or a reduce, `{value}` goes with "
                    f"{json.dumps(dict(needs))}",
                )

    def by(self, resource: str) -> Move:
        """This move by another resource, without what only the old one has."""
        plain = replace(
            self,
            slots=1,
            streams=1,
            signal="flag",
            copies="rows",
            direction="push",
            own="last",
            resource=resource,
        )
        if plain.sm_workers:
            plain = replace(plain, copies=self.copies)
        if plain.by_workers:
            plain = replace(plain, slots=self.slots)
        elif resource == "copy_engine":
            plain = replace(plain, streams=self.streams)
        elif resource == "none":
            plain = replace(plain, sum="stage")
        if resource == "epilogue" and self.signal == "flag":
            plain = replace(plain, direction=self.direction)
        if self.direction != plain.direction:
            # What is stored spans slices only where it stays.
            plain = replace(plain, spans=False)
        if resource == "epilogue":
            plain = replace(plain, own=self.own)
        fits = resource == "epilogue" and plain.slots == 2 and plain.sum == "stage"
        return replace(plain, signal=self.signal) if fits else plain

    @property
    def by_workers(self) -> bool:
        """Whether the workers of the launch move it, and no stream and no library."""
        return self.resource == "epilogue" or self.sm_workers > 0

    @property
    def sm_workers(self) -> int:
        """The N of ``sm:N``, else 0."""
        return int(self.resource[3:]) if self.resource.startswith("sm:") else 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a kernel is run.

    ``tiles``: tile length of each extent by name. ``order``: order of the tiles; ``auto`` starts with
    what is here for a gather and ends with the own slice for a scatter. ``group``: rows of tiles
    walked together for the L2 cache. ``workers``: persistent CTAs. ``warps``, ``stages``: of the
    Triton kernel. ``emitter``: ``triton``; ``gluon``: matrix products run as kernels whose warps have
    roles (two groups that take turns, ping-pong, or share a tile by halves, cooperative, by its size),
    ``warps`` then those that multiply and ``stages`` the slots of the ring that they are fed from; ``library``:
    loop nests that are one plain matrix product run as cuBLAS; with both, the rest as with ``triton``.
    ``flatten``: one loop over tiles and steps of the main loop. ``split``: split-K, parts into which the depth of
    a product is cut, for different workers; their sums in fp32 are added in order. ``tail``: the same of the tiles
    that are left over when those of a product are divided by the workers, the last of its queue: of one incomplete
    wave of tiles, not of all. Stream-K would give all workers equal shares of it.
    ``moves``: a :class:`Move` for each moved tensor by name.
    """

    tiles: tuple[tuple[str, int], ...] = ()
    order: str = "auto"
    group: int = 8
    workers: int = 132
    warps: int = 8
    stages: int = 3
    emitter: str = "triton"
    flatten: bool = True
    split: int = 1
    tail: int = 1
    moves: tuple[tuple[str, Move], ...] = ()

    def __post_init__(self) -> None:
        _pairs("tiles", self.tiles, int)
        _pairs("moves", self.moves, Move)
        for extent, size in self.tiles:
            _positive(f"tiles.{extent}", size)
            if size > MAX_TILE:
                raise ScheduleError(
                    field=f"tiles.{extent}",
                    detail=f"{size} is more than {MAX_TILE}, the most elements of a Triton tile",
                    help="give a smaller power of two",
                )
            if size & (size - 1):
                raise ScheduleError(
                    field=f"tiles.{extent}",
                    detail=f"{size} is no power of two",
                    help=f"Triton's tiles are powers of two: use {1 << size.bit_length() - 1} or "
                    f"{1 << size.bit_length()}",
                )
        for name in ("group", "workers", "warps", "stages", "split", "tail"):
            _positive(name, getattr(self, name))
        if self.warps & (self.warps - 1) or self.warps > 32:
            raise ScheduleError(
                field="warps", detail=f"{self.warps} warps", help="use 1, 2, 4, 8, 16 or 32"
            )
        if self.workers > MAX_WORKERS:
            raise ScheduleError(
                field="workers",
                detail=f"{self.workers} workers",
                help=f"use 1 to {MAX_WORKERS}: all of them are on the GPU at once",
            )
        if self.stages > MAX_STAGES:
            raise ScheduleError(
                field="stages",
                detail=f"{self.stages} stages",
                help=f"use 1 to {MAX_STAGES}: each holds a set of tiles in shared memory",
            )
        _one_of("order", self.order, ORDERS)
        _one_of("emitter", self.emitter, EMITTERS)
        if self.split > MAX_SPLIT:
            raise ScheduleError(
                field="split",
                detail=f"{self.split} parts",
                help=f"use 1 to {MAX_SPLIT}: all of them are added at once",
            )
        if self.split > 1 and self.emitter != "triton":
            raise ScheduleError(
                field="split",
                detail=f"`{self.emitter}` multiplies by whole sums",
                help="use the emitter triton, or 1",
            )
        self._check_tail()
        for name, move in self.moves:
            if move.sm_workers >= self.workers:
                raise ScheduleError(
                    field=f"moves.{name}.resource",
                    detail=f"{move.resource} leaves none of {self.workers} workers to compute",
                    help=f"use sm:1 to sm:{self.workers - 1}, or more workers"
                    if self.workers > 1
                    else "use two workers or more",
                )
            if move.own != "last" and self.order != "interleave":
                raise ScheduleError(
                    field=f"moves.{name}.own",
                    detail=f"{move.own} the others, but the order is `{self.order}`",
                    help="use the order `interleave`, or `last`",
                )
            if move.own == "between" and self.emitter == "gluon":
                raise ScheduleError(
                    field=f"moves.{name}.own",
                    detail="between the others, but warps with roles have no registers for that",
                    help="use the emitter triton, `beside` or `last`",
                )

    def _check_tail(self) -> None:
        if self.tail == 1:
            return
        detail = ""
        if self.tail > MAX_TAIL:
            detail = f"{self.tail} parts"
        elif self.emitter == "library":
            detail = "`library` multiplies by whole sums"
        elif self.split > 1:
            detail = f"all tiles are cut in {self.split} parts already"
        if detail:
            raise ScheduleError(
                field="tail",
                detail=detail,
                help=f"use 1, or up to {MAX_TAIL} with the emitter triton or gluon and `split = 1`",
            )

    def tile(self, extent: str, default: int) -> int:
        """The tile length of ``extent``."""
        return dict(self.tiles).get(extent, default)

    def move(self, tensor: str) -> Move:
        """The move of ``tensor``."""
        return dict(self.moves).get(tensor, Move())

    def with_tiles(self, **tiles: int) -> Schedule:
        """A copy with tile lengths set."""
        return replace(self, tiles=tuple(sorted({**dict(self.tiles), **tiles}.items())))

    def with_resource(self, resource: str) -> Schedule:
        """A copy in which every moved tensor uses ``resource``."""
        return replace(self, moves=tuple((n, m.by(resource)) for n, m in self.moves))

    def with_emitter(self, emitter: str) -> Schedule:
        """A copy for ``emitter``: of another than Triton without slots, as a call is one of its kernels, and for
        warps with roles as many as multiply."""
        moves = self.moves
        warps = PRODUCT_WARPS if emitter == "gluon" else self.warps
        if emitter != "triton":
            moves = tuple((n, replace(m, slots=1, signal="flag")) for n, m in moves)
        return replace(self, emitter=emitter, moves=moves, warps=warps)

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back."""
        data = asdict(self)
        data["tiles"] = dict(self.tiles)
        data["moves"] = {name: asdict(move) for name, move in self.moves}
        return json.dumps(data, sort_keys=True)

    def to_sparse(self) -> dict[str, Any]:
        """JSON data of the fields that differ from their defaults, tile lengths and resources always.

        :meth:`from_json` reads its text back; a table that holds it grows with no field that comes later.
        """
        data = {
            field.name: getattr(self, field.name)
            for field in fields(Schedule)
            if field.name not in ("tiles", "moves") and getattr(self, field.name) != field.default
        }
        moves = {
            name: {
                f.name: getattr(move, f.name)
                for f in fields(Move)
                if f.name == "resource" or getattr(move, f.name) != f.default
            }
            for name, move in self.moves
        }
        return {"tiles": dict(self.tiles), **data, "moves": moves}

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that ``text`` holds; ScheduleError if it holds none."""
        try:
            data = json.loads(text, object_pairs_hook=_once)
        except (ValueError, TypeError, RecursionError) as error:
            raise ScheduleError(
                field="(all)", detail=f"not JSON: {error}", help='write one object: {"workers": 64}'
            ) from None
        data = _checked(data, Schedule, "")
        tiles, moves = data.pop("tiles", {}), data.pop("moves", {})
        for name, value in (("tiles", tiles), ("moves", moves)):
            if not isinstance(value, dict):
                raise ScheduleError(field=name, detail="not an object", help='write {"NAME": …}')
        made = {n: _move(m, f"moves.{n}.") for n, m in moves.items()}
        return Schedule(
            tiles=tuple(sorted(tiles.items())), moves=tuple(sorted(made.items())), **data
        )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ScheduleError where a key stands in it twice, of which JSON would drop one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ScheduleError(field=key, detail="given twice", help="keep one of them")
        found[key] = value
    return found


def _pairs(field: str, value: object, kind: type) -> None:
    """ScheduleError unless ``value`` is a tuple of (name, ``kind``)."""
    fine = isinstance(value, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in value
    )
    if not fine or (kind is Move and not all(isinstance(pair[1], kind) for pair in value)):  # type: ignore[attr-defined]
        raise ScheduleError(
            field=field,
            detail=f"{value!r:.60} is no tuple of (name, {kind.__name__}) pairs",
            help=f'Schedule.from_json takes an object: {{"{field}": …}}',
        )


_KINDS: dict[str, type] = {
    "order": str,
    "group": int,
    "workers": int,
    "warps": int,
    "stages": int,
    "emitter": str,
    "flatten": bool,
    "split": int,
    "tail": int,
}
_SPOKEN = {str: "a string", int: "a whole number", bool: "true or false"}


def _move(data: object, prefix: str) -> Move:
    """A move of JSON data; ScheduleError names its field with ``prefix``."""
    values = _checked(data, Move, prefix)
    try:
        return Move(**values)
    except ScheduleError as error:
        field, detail, hint = (error.values[key] for key in ("field", "detail", "help"))
        raise ScheduleError(field=f"{prefix}{field}", detail=detail, help=hint) from None


def _checked(data: object, cls: type[Any], prefix: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ScheduleError(
            field=prefix.rstrip(".") or "(all)",
            detail="not an object",
            help="write one JSON object",
        )
    known = [f.name for f in fields(cls)]
    for key, value in data.items():
        if key not in known:
            raise ScheduleError(
                field=f"{prefix}{key}",
                detail="there is no such field",
                help=choices(key, known, "known fields"),
            )
        kind = _KINDS.get(key)
        if kind is not None and (
            not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        ):
            raise ScheduleError(
                field=f"{prefix}{key}",
                detail=f"{value!r} is not {_SPOKEN[kind]}",
                help=f"give {_SPOKEN[kind]}",
            )
    return dict(data)


def _one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    """ScheduleError unless ``value`` is one of the words ``known``."""
    if value not in known:
        detail = f"`{value!s:.60}` is none of its words"
        raise ScheduleError(field=field, detail=detail, help=choices(value, known, "use one of"))


def _one_or_two(value: object) -> bool:
    """Whether ``value`` is the whole number 1 or 2, and not one that compares equal to it."""
    return isinstance(value, int) and not isinstance(value, bool) and value in (1, 2)


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ScheduleError(
            field=name, detail=f"{value!r} is not a positive integer", help="give 1 or more"
        )
