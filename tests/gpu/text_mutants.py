"""Emitted modules with one piece of synchronisation broken in their text: positive controls of the soak.

Only kinds that values or time-outs can show. Each is a regular expression, what replaces it, and how many
times it may be found (some kernels have another form at another number of ranks); a mutant whose pattern is not
found, or oftener, is an error of this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextMutant:
    """``pattern`` (multi-line) becomes ``text``, at most ``times`` times, in ``kernel`` under ``resource``."""

    kind: str
    kernel: str
    resource: str
    name: str
    pattern: str
    text: str
    times: int = 1

    def edit(self, source: str) -> str:
        """The broken module."""
        head, mark, tail = source.partition('"""\n\n\n@')
        broken, count = re.subn(self.pattern, self.text, tail, flags=re.MULTILINE)
        if not 1 <= count <= self.times or broken == tail:
            raise ValueError(f"{self.name}: found {count} times, not 1 to {self.times}")
        return head + mark + broken


_AG, _RS, _AR = "ag_gemm", "gemm_rs", "gemm_ar"
_CE, _SM, _EP = "copy_engine", "sm:8", "epilogue"
_CE_ROLES, _EP_ROLES = "copy_engine roles", "epilogue folded roles"
_COPIED, _COPIED_SUM = "sm:4 boxes roles", "sm:4 boxes folded roles"
_WORD, _SENTINEL = "epilogue word", "epilogue sentinel"
# A wait of the kernel for a flag or a counter, over one line or three.
_INSIDE = r"\((?:[^()]|\([^()]*\))*\)"
_PEER_WAIT = r"device\.peer_tiles?_wait" + _INSIDE
_COUNT_WAIT = r"device\.consumer_tile_wait" + _INSIDE
# Up to the count, which is the last argument.
_COUNTED = r"(counted_(?:all_)?(?:tile_)?notify\((?:[^()]|\([^()]*\))*,\s*)(\d+)(,?\s*\))"
_ACKNOWLEDGED = r"device\.rank_notify\(ctx, 128\)"
_ENDED = r"(device\.end_call\(ctx, \d+, \d+, )False"
_HOST_NOTIFY = r"^ *call\.notify\(.*\n"

MUTANTS = (
    TextMutant("dropped notify", _AG, _CE, "host notify of A.ready", _HOST_NOTIFY, ""),
    TextMutant("dropped wait", _AG, _CE, "wait for A.ready", _PEER_WAIT, "0"),
    TextMutant(
        "wrong epoch", _AG, _CE, "wait for the call before", r"ctx\.epoch,", "ctx.epoch - 1,"
    ),
    TextMutant("wrong epoch", _AG, _CE, "wait for the next call", r"ctx\.epoch,", "ctx.epoch + 1,"),
    TextMutant("dropped notify", _AG, _CE, "acknowledgement", _ACKNOWLEDGED, "pass"),
    TextMutant(
        "dropped notify",
        _AG,
        _SM,
        "notify of A.ready",
        r"^ *device\.(peer|counted)_tile_notify\(.*\n",
        "",
    ),
    TextMutant("dropped wait", _AG, _SM, "wait for A.ready", _PEER_WAIT, "0"),
    TextMutant(
        "wrong epoch", _AG, _SM, "wait for the call before", r"ctx\.epoch,", "ctx.epoch - 1,"
    ),
    TextMutant(
        "dropped wait", _RS, _CE, "copy before its tiles", r"^ *call\.wait_counter\(.*\n", ""
    ),
    TextMutant(
        "wrong count",
        _RS,
        _CE,
        "copy one tile early",
        r"(call\.wait_counter\(.*), (\d+)\)",
        r"\1, 1)",
    ),
    TextMutant(
        "forgotten flush",
        _RS,
        _CE,
        "last tile of a worker",
        r"^    device\.delayed_tile_notify\(ctx, pending.*\n",
        "",
    ),
    TextMutant(
        "dropped notify",
        _RS,
        _CE,
        "notify of a tile",
        r"^            device\.delayed_tile_notify\(ctx, pending.*\n",
        "",
    ),
    TextMutant("dropped notify", _RS, _CE, "host notify of C.ready", _HOST_NOTIFY, ""),
    TextMutant("dropped wait", _RS, _CE, "wait for the parts", _PEER_WAIT, "0", 2),
    TextMutant("dropped wait", _RS, _CE, "wait for the own part", _COUNT_WAIT, "0"),
    TextMutant(
        "wrong epoch", _RS, _CE, "parts of the call before", r"ctx\.epoch,", "ctx.epoch - 1,", 2
    ),
    TextMutant(
        "wrong count",
        _RS,
        _CE,
        "own part one too many",
        r"(consumer_tile_wait\(ctx, \d+ \+ rank), (\d+),",
        r"\1, \2 + 1,",
    ),
    TextMutant("dropped wait", _RS, _EP, "wait for the parts", _PEER_WAIT, "0"),
    TextMutant(
        "wrong count",
        _RS,
        _EP,
        "notify by the first tile",
        _COUNTED,
        r"\g<1>1\3",
        2,
    ),
    TextMutant(
        "wrong count",
        _RS,
        _EP,
        "notify by one tile too many",
        _COUNTED,
        r"\1\2 + 1\3",
        2,
    ),
    TextMutant(
        "wrong epoch", _RS, _EP, "parts of the call before", r"ctx\.epoch,", "ctx.epoch - 1,"
    ),
    # As in a program with slots: the next call takes its number again.
    TextMutant("wrong epoch", _RS, _EP, "call that is not counted", _ENDED, r"\1True"),
    TextMutant("dropped notify", _RS, _EP, "acknowledgement", _ACKNOWLEDGED, "pass"),
    TextMutant("dropped notify", _AG, _CE_ROLES, "acknowledgement", _ACKNOWLEDGED, "pass"),
    TextMutant("dropped wait", _AR, _EP, "wait for the parts", _PEER_WAIT, "0", 2),
    TextMutant(
        "wrong count",
        _AR,
        _EP,
        "notify by the first tile",
        _COUNTED,
        r"\g<1>1\3",
        3,
    ),
    TextMutant("dropped wait", _RS, _SM, "wait for the parts", _PEER_WAIT, "0", 2),
    TextMutant("dropped wait", _AG, _CE_ROLES, "wait for A.ready", _PEER_WAIT, "0"),
    TextMutant("dropped notify", _AG, _CE_ROLES, "host notify of A.ready", _HOST_NOTIFY, ""),
    TextMutant("dropped wait", _RS, _EP_ROLES, "wait for the parts", _PEER_WAIT, "0", 2),
    TextMutant(
        "forgotten flush",
        _RS,
        _EP_ROLES,
        "last tile of a group of warps",
        r"^    roles\.delayed_counted_notify\(ctx, pending.*\n",
        "",
    ),
    TextMutant(
        "stale data",
        _RS,
        _SENTINEL,
        "words not emptied",
        r"^ *device\.empty_words" + _INSIDE + r"\n",
        "",
    ),
    TextMutant(
        "wrong buffer",
        _RS,
        _SENTINEL,
        "stores to the other slot",
        r"(device\.peer_pointer\(peers, [^,]*, \d+) \+ slot",
        r"\1 + (1 - slot)",
    ),
    TextMutant(
        "wrong epoch", _AR, _WORD, "words of the call before", r"ctx\.epoch,", "ctx.epoch - 1,", 2
    ),
    TextMutant(
        "wrong buffer",
        _AR,
        _WORD,
        "stores to the other slot",
        r"(device\.peer_pointer\(peers, [^,]*, \d+) \+ slot",
        r"\1 + (1 - slot)",
        2,
    ),
    # Workers that copy beside products with roles.
    TextMutant("dropped wait", _AG, _COPIED, "wait for A.ready", _PEER_WAIT, "0", 2),
    TextMutant("dropped notify", _AG, _COPIED, "acknowledgement", _ACKNOWLEDGED, "pass"),
    TextMutant("dropped wait", _RS, _COPIED_SUM, "copy before its tiles", _COUNT_WAIT, "0"),
    TextMutant(
        "wrong count",
        _RS,
        _COPIED_SUM,
        "copy one tile early",
        r"(consumer_tile_wait\(\s*ctx, [^,]*), (\d+),",
        r"\1, 1,",
    ),
    TextMutant("dropped wait", _RS, _COPIED_SUM, "wait for the parts", _PEER_WAIT, "0", 2),
    TextMutant("wrong count", _RS, _COPIED_SUM, "notify by the first tile", _COUNTED, r"\g<1>1\3"),
    TextMutant(
        "dropped notify",
        _RS,
        _COPIED_SUM,
        "notify of a tile",
        r"^            device\.producer_tile_notify\(.*\n",
        "",
    ),
)
