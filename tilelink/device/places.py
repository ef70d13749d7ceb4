"""Stores and polls of places that hold words: the primitives of :mod:`tilelink.device.words`.

A place is up to sixteen bytes of words, which one thread stores or loads at once; each word in it is checked by
itself, so nothing rests on sixteen bytes being whole. ``tagged``: words hold the epoch of their call.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import core

from tilelink.ir import layout

EMPTY = tl.constexpr(layout.EMPTY)
# Polls of a thread before the CTA looks at the clock and at the abort word: about 1 ms.
_POLLS = 2048
# Bytes of words that a thread has under way at once, at most: 4 registers hold 16 of them.
_AHEAD = 256
# Places of a thread, of sixteen bytes of words each at most, whose data it holds at once, over all parts.
_HELD = 16

if triton.knobs.runtime.interpret:

    @triton.jit
    def put_places(address, data, epoch, inside, tagged: tl.constexpr, offset: tl.constexpr = 0):
        pointer = (address + offset).to(
            tl.pointer_type(tl.int64 if tagged else tl.int32), bitcast=True
        )
        for number in tl.static_range(len(data)):
            word = data[number]
            if tagged:
                word = (word.to(tl.int64) & 0xFFFFFFFF) | (tl.cast(epoch, tl.int64) << 32)
            tl.store(pointer + number, word, mask=inside)

    @triton.jit
    def at_once(words: tl.constexpr, most: tl.constexpr):
        return most

    @triton.jit
    def together(address, parts: tl.constexpr):
        return parts

    @triton.jit
    def look_places(
        address,
        epoch,
        inside,
        step: tl.constexpr,
        first: tl.constexpr,
        parts: tl.constexpr,
        width: tl.constexpr,
        tagged: tl.constexpr,
    ):
        missing = (inside & False).to(tl.int32)
        found = ()
        for part in tl.static_range(first, first + parts):
            pointer = (address + part * step).to(
                tl.pointer_type(tl.int64 if tagged else tl.int32), bitcast=True
            )
            for number in tl.static_range(width):
                word = tl.load(pointer + number, mask=inside, other=0, volatile=True)
                absent = (word >> 32).to(tl.int32) != epoch if tagged else word == EMPTY
                missing |= tl.where(inside & absent, 1 << part, 0)
                found = found + (word.to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
        return found + (missing,)  # noqa: RUF005

    @triton.jit
    def agreed(missing, parts: tl.constexpr):
        return missing

else:

    @core.builtin
    def put_places(
        address: Any,
        data: Any,
        epoch: Any,
        inside: Any,
        tagged: Any,
        offset: Any = 0,
        _semantic: Any = None,
    ) -> Any:
        # Several words a store, each of which is whole.
        tagged, offset = core._unwrap_if_constexpr(tagged), core._unwrap_if_constexpr(offset)
        values = list(data)
        given = [inside.to(tl.int32, _semantic=_semantic), *([epoch] if tagged else []), *values]
        words = [f"${number + 2 + len(given) - len(values)}" for number in range(len(values))]
        lines = ["{ .reg .pred p; setp.ne.s32 p, $2, 0;"]
        if tagged:
            lines.append(f".reg .b64 w<{len(words)}>;")
            lines += [f"mov.b64 w{n}, {{{word}, $3}};" for n, word in enumerate(words)]
            words = [f"w{n}" for n in range(len(words))]
        kind = _kind(len(words), tagged)
        lines.append(f"@p st.relaxed.sys.global.{kind} [$1 + {offset}], {_vector(words)};")
        core.inline_asm_elementwise(
            " ".join([*lines, "mov.b32 $0, 0; }"]),
            ",".join(["=r", "l", *["r"] * len(given)]),
            [address, *given],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
            _semantic=_semantic,
        )

    def _kind(width: int, tagged: bool) -> str:
        return ("" if width == 1 else f"v{width}.") + ("b64" if tagged else "b32")

    def _vector(names: list[str]) -> str:
        return names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"

    def _poll(step: int, first: int, parts: int, width: int, pack: int, tagged: bool) -> str:
        """The assembly of a poll of ``pack`` places, ``width`` words each, of ``parts`` parts from ``first`` on.

        Parts are ``step`` bytes apart; ``tagged``: words hold the epoch of their call.
        Results: the words' data, part by part, then a bit for each part of which a word is missing. Arguments:
        the addresses, whether they count, the epoch if ``tagged``.
        """
        words = parts * width
        address, inside, epoch = ((words + 1 + n) * pack for n in range(3))
        names = [[f"w{i}_{n}" for n in range(words)] for i in range(pack)]
        # Of the words of a part: any bit in which an epoch differs, or the largest as an unsigned number, EMPTY.
        fold, absent = ("or.b32", "ne.u32 q, {}, 0") if tagged else ("max.u32", "eq.u32 q, {}, -1")
        bits = "b64" if tagged else "b32"
        lines = [
            f".reg .pred q, p<{pack}>; .reg .b32 n, m, t, u, e<{parts}>;",
            f".reg .{bits} " + ", ".join(name for row in names for name in row) + ";",
            "mov.u32 n, 0;",
        ]
        for i, row in enumerate(names):
            lines.append(f"setp.ne.s32 p{i}, ${inside + i}, 0;")
            there = f"{{0, ${epoch}}}" if tagged else "0"
            lines += [f"mov.{bits} {name}, {there};" for name in row]
        lines.append("POLL:")
        for part in range(parts):
            for i, row in enumerate(names):
                into = _vector(row[part * width : (part + 1) * width])
                where = f"[${address + i} + {(first + part) * step}]"
                lines.append(f"@p{i} ld.relaxed.sys.global.{_kind(width, tagged)} {into}, {where};")
        lines.append("mov.u32 m, 0;")
        for part in range(parts):
            lines.append(f"mov.u32 e{part}, 0;")
            for row in names:
                for name in row[part * width : (part + 1) * width]:
                    if tagged:
                        lines.append(f"mov.b64 {{t, u}}, {name}; xor.b32 u, u, ${epoch};")
                    lines.append(f"{fold} e{part}, e{part}, {'u' if tagged else name};")
            lines.append(f"{fold} m, m, e{part};")
        lines.append(f"setp.{absent.format('m')}; @!q bra SEEN;")
        lines.append(f"add.u32 n, n, 1; setp.lt.u32 q, n, {_POLLS}; @q bra POLL;")
        lines.append("SEEN: mov.u32 m, 0;")
        for part in range(parts):
            lines.append(
                f"setp.{absent.format(f'e{part}')}; selp.u32 t, {1 << (first + part)}, 0, q;"
            )
            lines.append("or.b32 m, m, t;")
        for i, row in enumerate(names):
            for n, name in enumerate(row):
                into = f"${n * pack + i}"
                lines.append(
                    f"mov.b64 {{{into}, u}}, {name};" if tagged else f"mov.b32 {into}, {name};"
                )
            lines.append(f"mov.u32 ${words * pack + i}, m;")
        return "{ " + "\n".join(lines) + " }"

    def _each(address: Any, semantic: Any) -> int:
        """How many elements of a tile a thread has."""
        count = 1
        for extent in address.shape:
            count *= int(core._unwrap_if_constexpr(extent))
        return max(1, count // (32 * int(semantic.builder.options.num_warps)))

    @core.builtin
    def at_once(words: Any, most: Any, _semantic: Any = None) -> Any:
        # Words of a place, of a tile of ``words``: as many as fit it, but every thread has a place if it can.
        width = core._unwrap_if_constexpr(most)
        threads = 32 * int(_semantic.builder.options.num_warps)
        while width > 1 and core._unwrap_if_constexpr(words) < width * threads:
            width //= 2
        return tl.constexpr(width)

    @core.builtin
    def together(address: Any, parts: Any, _semantic: Any = None) -> Any:
        # As many parts of a tile as fit the registers.
        fitting = max(1, _HELD // _each(address, _semantic))
        return tl.constexpr(min(core._unwrap_if_constexpr(parts), fitting))

    @core.builtin
    def look_places(
        address: Any,
        epoch: Any,
        inside: Any,
        step: Any,
        first: Any,
        parts: Any,
        width: Any,
        tagged: Any,
        _semantic: Any = None,
    ) -> Any:
        step, first, parts = map(core._unwrap_if_constexpr, (step, first, parts))
        width, tagged = map(core._unwrap_if_constexpr, (width, tagged))
        under_way = (8 if tagged else 4) * parts * width
        pack = min(_each(address, _semantic), max(1, _AHEAD // under_way))
        pack = 1 << (pack.bit_length() - 1)
        words = parts * width
        outputs = ["=&r"] * ((words + 1) * pack)
        inputs = ["l"] * pack + ["r"] * (pack + (pack if tagged else 0))
        return core.inline_asm_elementwise(
            _poll(step, first, parts, width, pack, tagged),
            ",".join(outputs + inputs),
            [address, inside.to(tl.int32, _semantic=_semantic), *([epoch] if tagged else [])],
            dtype=[tl.int32] * (words + 1),
            is_pure=False,
            pack=pack,
            _semantic=_semantic,
        )

    @core.builtin
    def agreed(missing: Any, parts: Any, _semantic: Any = None) -> Any:
        """The bits of all warps, behind a barrier: of a small tile each warp has polled all by itself."""
        lines = [
            "{ .reg .pred p; .reg .b32 t; mov.u32 $0, 0;",
            "setp.ne.u32 p, $1, 0; bar.red.or.pred p, 0, p; @!p bra AGREED;",
        ]
        for part in range(core._unwrap_if_constexpr(parts)):
            lines.append(f"and.b32 t, $1, {1 << part}; setp.ne.u32 p, t, 0;")
            lines.append(f"bar.red.or.pred p, 0, p; selp.u32 t, {1 << part}, 0, p;")
            lines.append("or.b32 $0, $0, t;")
        return core.inline_asm_elementwise(
            "\n".join([*lines, "AGREED: }"]),
            "=&r,r",
            [missing],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
            _semantic=_semantic,
        )


@triton.jit
def empty_places(address, inside, width: tl.constexpr, offset: tl.constexpr):
    """Store EMPTY in places of ``width`` words, ``offset`` bytes behind their addresses."""
    blank = (tl.full(address.shape, EMPTY, tl.int32),) * width
    put_places(address, blank, 0, inside, False, offset)
