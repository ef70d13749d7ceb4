"""Bad schedules: JSON and shorthands of the command line, and schedules given to a call."""

from __future__ import annotations

import json
from typing import Any

from tests.assurance.bad_calls import shards
from tests.assurance.bad_case import ROOT, Call, Case, Command
from tilelink.schedules import Move, Schedule

FILE = str(ROOT / "examples" / "ag_gemm.py")


def schedule(name: str, value: object, *words: str, code: int = 2) -> Command:
    """``check --schedule`` with ``value``: text as it is, anything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    files = {"s.json": text}
    arguments = ("check", FILE, "--schedule", "s.json")
    return Command(f"schedule: {name}", arguments, words, code=code, files=files)


def scattered(name: str, move: dict[str, object], *words: str, **fields: object) -> Command:
    """``check --schedule`` of a kernel that scatters C, with a move of it and other ``fields``."""
    files = {"s.json": json.dumps({"moves": {"C": move}, **fields})}
    arguments = ("check", str(ROOT / "examples" / "gemm_rs.py"), "--schedule", "s.json")
    return Command(f"schedule: {name}", arguments, words, code=2, files=files)


def option(name: str, *arguments: str, words: tuple[str, ...], code: int = 2) -> Command:
    """``check`` with options for the schedule."""
    return Command(f"schedule: {name}", ("check", FILE, *arguments), words, code=code)


def on(name: str, value: Any, *words: str) -> Call:
    """A schedule given to ``Kernel.on``."""

    def call() -> Any:
        kernel, a, b = shards()
        return kernel.on("simulate", world=2, schedule=value)(a, b)

    return Call(f"schedule: {name}", call, words)


def move(**fields: object) -> dict[str, object]:
    """A schedule whose move of A has ``fields``."""
    return {"moves": {"A": fields}}


CASES: tuple[Case, ...] = (
    schedule("a field of a move", move(resource="sm2"), "`moves.A.resource`", "`sm2`"),
    schedule("a move that is a text", {"moves": {"A": "sm:2"}}, "`moves.A`", "object"),
    on(
        "a move of a local tensor",
        Schedule(moves=(("B", Move("sm:2")),)),
        "moves.B",
        "moved tensor",
    ),
    on("a dict in place of a schedule", {"workers": 4}, "`schedule`", "from_json"),
    schedule("empty file", "", "JSON", "(all)"),
    schedule("not JSON", "{workers: 3}", "JSON"),
    schedule("cut off", '{"workers": 3', "JSON"),
    schedule("a list", [1, 2], "object"),
    schedule("a number", 3, "object"),
    schedule("null", None, "object"),
    schedule("NaN", '{"workers": NaN}', "workers"),
    schedule("deep JSON", "[" * 100_000, "JSON"),
    schedule("a key twice", '{"workers": 4, "workers": 8}', "workers", "twice"),
    schedule("unknown key", {"worker": 4}, "worker", "no such field"),
    schedule("workers text", {"workers": "4"}, "workers", "'4'"),
    schedule("workers float", {"workers": 4.5}, "workers", "4.5"),
    schedule("workers true", {"workers": True}, "workers", "True"),
    schedule("workers null", {"workers": None}, "workers", "None"),
    schedule("workers 0", {"workers": 0}, "workers", "0"),
    schedule("workers negative", {"workers": -1}, "workers", "-1"),
    schedule("workers huge", {"workers": 10**30}, "workers"),
    schedule("warps 3", {"warps": 3}, "warps", "3"),
    schedule("warps 64", {"warps": 64}, "warps", "64"),
    schedule("stages 0", {"stages": 0}, "stages", "0"),
    schedule("stages huge", {"stages": 10**9}, "stages"),
    schedule("order unknown", {"order": "best"}, "order", "best"),
    schedule("emitter unknown", {"emitter": "cuda"}, "emitter", "cuda"),
    schedule("emitter a number", {"emitter": 1}, "emitter", "1"),
    schedule(
        "library in two slots",
        {"emitter": "library", "moves": {"A": {"resource": "sm:2", "slots": 2}}},
        "moves.A.slots",
        "2 slots",
    ),
    schedule("gluon of four warps", {"emitter": "gluon", "warps": 4}, "warps", "Gluon", "triton"),
    schedule("gluon of low tiles", {"emitter": "gluon", "tiles": {"M": 32}}, "32 x 128", "triton"),
    schedule(
        "gluon in two slots", {"emitter": "gluon", **move(resource="sm:4", slots=2)}, "triton"
    ),
    schedule("split 0", {"split": 0}, "split", "0"),
    schedule("split text", {"split": "2"}, "split", "'2'"),
    schedule("split huge", {"split": 32}, "split", "32 parts"),
    schedule("split of the library", {"split": 2, "emitter": "library"}, "split", "whole sums"),
    schedule("split uneven", {"split": 3}, "split", "128 elements of `K`", "3 equal parts"),
    schedule("tail 0", {"tail": 0}, "tail", "0"),
    schedule("tail text", {"tail": "2"}, "tail", "'2'"),
    schedule("tail huge", {"tail": 32}, "tail", "32 parts"),
    schedule("tail of the library", {"tail": 2, "emitter": "library"}, "tail", "whole sums"),
    schedule("tail of parts", {"tail": 2, "split": 2}, "tail", "2 parts already"),
    schedule("tail longer than the depth", {"tail": 8}, "tail", "8 parts of a depth of 2 steps"),
    schedule("tail beside copying workers", {"tail": 2, **move(resource="sm:4")}, "tail", "join"),
    schedule("flatten text", {"flatten": "yes"}, "flatten", "yes"),
    schedule("tiles a list", {"tiles": [["M", 64]]}, "tiles"),
    schedule("tiles 0", {"tiles": {"M": 0}}, "tiles.M", "0"),
    schedule("tiles negative", {"tiles": {"M": -16}}, "tiles.M", "-16"),
    schedule("tiles no power of two", {"tiles": {"M": 48}}, "tiles.M", "48"),
    schedule("tiles null", {"tiles": {"M": None}}, "tiles.M", "None"),
    schedule("tiles of another kernel", {"tiles": {"Q": 64}}, "`Q`"),
    schedule("tiles huge", {"tiles": {"M": 2**40}}, "tiles.M"),
    schedule("moves a list", {"moves": ["A"]}, "moves"),
    schedule("a move that is text", {"moves": {"A": "sm:4"}}, "moves.A"),
    schedule("a move of another kernel", {"moves": {"Q": {}}}, "`Q`"),
    schedule("a move of what does not move", {"moves": {"B": {}}}, "`B`"),
    schedule("an unknown key of a move", move(speed=3), "moves.A.speed"),
    schedule("an unknown resource", move(resource="dma"), "resource", "dma"),
    schedule("sm:0", move(resource="sm:0"), "resource", "sm:0"),
    schedule("sm:-1", move(resource="sm:-1"), "resource", "sm:-1"),
    schedule("sm:", move(resource="sm:"), "resource", "sm:"),
    schedule("sm:999", move(resource="sm:999"), "moves.A.resource", "sm:999"),
    schedule("sm of many digits", move(resource="sm:" + "9" * 5000), "resource"),
    schedule("a resource that is a number", move(resource=4), "resource", "4"),
    schedule("a move's tile 0", move(tile=0), "tile", "0"),
    schedule("a move's tile text", move(tile="8"), "tile", "'8'"),
    schedule("a move's channels negative", move(channels=-2), "channels", "-2"),
    schedule("a sum nowhere", move(sum="never"), "sum", "never"),
    schedule("a sum that is a number", move(sum=1), "sum", "1"),
    schedule("the sum of a gather", move(sum="epilogue"), "sum", "`A`", "scatter"),
    schedule("a move's shots 3", move(shots=3), "shots", "3"),
    schedule("a move's slots 0", move(resource="sm:4", slots=0), "slots", "0"),
    schedule("two slots by copy engine", move(slots=2), "slots", "copy_engine"),
    schedule("a move's streams 0", move(streams=0), "streams", "0"),
    schedule("a move's streams 9", move(streams=9), "streams", "9"),
    schedule("a move's streams true", move(streams=True), "streams", "True"),
    schedule("two streams by workers", move(resource="sm:4", streams=2), "streams", "sm:4"),
    schedule("a signal nobody hears", move(signal="bell"), "signal", "bell"),
    schedule("words by copy engine", move(signal="word"), "signal", "copy_engine"),
    schedule(
        "sentinels by workers", move(resource="sm:4", slots=2, signal="sentinel"), "signal", "sm:4"
    ),
    schedule(
        "sentinels in an epilogue",
        move(resource="epilogue", slots=2, signal="sentinel", sum="epilogue"),
        "signal",
        "sum",
    ),
    schedule("a direction up", move(resource="epilogue", direction="up"), "direction", "up"),
    schedule("a direction that is a number", move(direction=1), "direction", "1"),
    schedule("a pull by copy engine", move(direction="pull"), "direction", "copy_engine"),
    schedule("a pull by workers", move(resource="sm:4", direction="pull"), "direction", "sm:4"),
    schedule(
        "a pull of words",
        move(resource="epilogue", slots=2, signal="word", direction="pull"),
        "direction",
        "word",
    ),
    schedule("own tiles first", move(resource="epilogue", own="first"), "own", "first"),
    schedule("own tiles that are a number", move(resource="epilogue", own=1), "own", "1"),
    schedule("own tiles of copies", move(own="beside"), "own", "copy_engine"),
    schedule("own tiles of a stage", move(resource="epilogue", own="between"), "own", "stage"),
    schedule(
        "own tiles of a pull",
        move(resource="epilogue", sum="epilogue", direction="pull", own="beside"),
        "own",
        "pull",
    ),
    schedule(
        "own tiles beside, in rows",
        {"order": "row", **move(resource="epilogue", sum="epilogue", own="beside")},
        "own",
        "row",
    ),
    schedule(
        "own tiles between, with roles",
        {
            "order": "interleave",
            "emitter": "gluon",
            **move(resource="epilogue", sum="epilogue", own="between"),
        },
        "own",
        "registers",
    ),
    scattered(
        "rows copied beside roles",
        {"resource": "sm:4", "sum": "epilogue"},
        "emitter",
        "copy beside",
        "triton",
        emitter="gluon",
        tiles={"M": 128, "N": 128},
    ),
    scattered(
        "boxes beside roles, summed in a stage",
        {"resource": "sm:4", "copies": "boxes"},
        "emitter",
        "copy beside",
        "triton",
        emitter="gluon",
    ),
    scattered(
        "boxes beside halves of tiles",
        {"resource": "sm:4", "copies": "boxes", "sum": "epilogue"},
        "emitter",
        "halves",
        emitter="gluon",
        tiles={"M": 128, "N": 256},
    ),
    schedule("copies of letters", move(resource="sm:4", copies="letters"), "copies", "letters"),
    schedule("boxes by copy engine", move(copies="boxes"), "copies", "copy_engine"),
    schedule("spans that are a number", move(spans=1), "spans", "1"),
    scattered("spans of what is pushed", {"spans": True}, "spans", "`C`", "pull"),
    scattered(
        "spans of own tiles",
        {"resource": "epilogue", "direction": "pull", "sum": "epilogue", "spans": True},
        "spans",
        "`C`",
        "stage",
    ),
    schedule("words in one slot", move(resource="epilogue", signal="word"), "signal", "slots"),
    schedule("a move's shots text", move(shots="two"), "shots", "'two'"),
    schedule("a move's shots 2.0", move(shots=2.0), "shots", "2.0"),
    schedule("a move's slots 1.0", move(slots=1.0), "slots", "1.0"),
    schedule("epilogue of a gather", move(resource="epilogue"), "A", "epilogue"),
    Command(
        "schedule: the file is missing",
        ("check", FILE, "--schedule", "nowhere.json"),
        ("nowhere.json",),
        code=2,
    ),
    Command("schedule: the file is a folder", ("check", FILE, "--schedule", "."), ("`.`",), code=2),
    Command(
        "schedule: the file is binary",
        ("check", FILE, "--schedule", "s.json"),
        ("s.json",),
        code=2,
        files={"s.json": b"\xff\xfe\x80"},
    ),
    option("tile of a stranger", "--tile", "Q=64", words=("--tile", "`Q`")),
    option("tile no power of two", "--tile", "M=48", words=("M", "48")),
    option("tile 0", "--tile", "M=0", words=("--tile", "0")),
    option("tile without a number", "--tile", "M", words=("--tile", "`M`")),
    option("resource unknown", "--resource", "dma", words=("--resource", "dma")),
    option("resource of a stranger", "--resource", "Q=sm:4", words=("--resource", "`Q`")),
    option("resource sm:999", "--resource", "sm:999", words=("sm:999",)),
    option("--workers 0", "--workers", "0", words=("--workers", "0")),
    on("a call with text", "fast", "schedule", "str"),
    on("a call with a dict", {"workers": 4}, "schedule", "dict"),
    on("a call with tiles of another kernel", Schedule(tiles=(("Q", 64),)), "`Q`"),
    on("a call with a move of another kernel", Schedule(moves=(("Q", Move()),)), "`Q`"),
    Call("schedule: tiles is a number", lambda: Schedule(tiles=3), ("tiles",)),  # type: ignore[arg-type]
    Call("schedule: moves is text", lambda: Schedule(moves="A"), ("moves",)),  # type: ignore[arg-type]
    Call("schedule: from_json of None", lambda: Schedule.from_json(None), ("(all)",)),  # type: ignore[arg-type]
)
