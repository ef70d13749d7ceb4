"""Words: data that is its own signal.

Every four bytes of a tile travel in an aligned word of eight, whose other half is the epoch of the call. Such
a word is read and written whole, so a reader polls the data itself until each word that it wants has the epoch
of its call. Nothing is released and no flag is raised: a store and its flight are all that lies between two
ranks (the idea of NCCL's protocol LL).

A buffer of words lies in memory that nothing but words is ever written to; see :mod:`tilelink.ir.layout`.
Element e of it, of s bytes, is in word e * s // 4. Between two calls that use the same place of it the reader
must have said that it is done: with two slots, which alternate with the epoch, data of the call between says so.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.language import core

from tilelink.device.signal import overdue

# Polls of a thread before the CTA looks at the clock and at the abort word: about 1 ms.
_POLLS = 2048
# Bytes of words that a thread has under way at once, at most: 4 registers hold 16 of them.
_AHEAD = 256
# Places of a thread whose data it holds at once, over all parts.
_HELD = 16

if triton.knobs.runtime.interpret:

    @triton.jit
    def _put(address, data, epoch, inside, pair: tl.constexpr):
        tag = tl.cast(epoch, tl.int64) << 32
        pointer = address.to(tl.pointer_type(tl.int64), bitcast=True)
        for number in tl.static_range(2 if pair else 1):
            word = (data[number].to(tl.int64) & 0xFFFFFFFF) | tag
            tl.store(pointer + number, word, mask=inside)

    @triton.jit
    def _together(address, parts: tl.constexpr):
        return parts

    @triton.jit
    def _look(
        address,
        epoch,
        inside,
        step: tl.constexpr,
        first: tl.constexpr,
        parts: tl.constexpr,
        pair: tl.constexpr,
    ):
        missing = (inside & False).to(tl.int32)
        found = ()
        for part in tl.static_range(first, first + parts):
            pointer = (address + part * step).to(tl.pointer_type(tl.int64), bitcast=True)
            for number in tl.static_range(2 if pair else 1):
                word = tl.load(pointer + number, mask=inside, other=0, volatile=True)
                fresh = (word >> 32).to(tl.int32) == epoch
                missing |= tl.where(inside & (fresh == 0), 1 << part, 0)
                found = found + (word.to(tl.int32),)  # type: ignore[assignment]  # noqa: RUF005
        return found + (missing,)  # noqa: RUF005

else:

    @core.builtin
    def _put(
        address: Any, data: Any, epoch: Any, inside: Any, pair: Any, _semantic: Any = None
    ) -> Any:
        # Sixteen bytes a store are two words, each of which is whole.
        lines = ["{ .reg .pred p; .reg .b64 a, b; setp.ne.s32 p, $2, 0;"]
        if core._unwrap_if_constexpr(pair):
            lines.append("mov.b64 a, {$4, $3}; mov.b64 b, {$5, $3};")
            lines.append("@p st.relaxed.sys.global.v2.b64 [$1], {a, b};")
        else:
            lines.append("mov.b64 a, {$4, $3}; @p st.relaxed.sys.global.b64 [$1], a;")
        words = list(data)
        core.inline_asm_elementwise(
            " ".join([*lines, "mov.b32 $0, 0; }"]),
            ",".join(["=r", "l", "r", "r", *["r"] * len(words)]),
            [address, inside.to(tl.int32, _semantic=_semantic), epoch, *words],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
            _semantic=_semantic,
        )

    def _poll(step: int, first: int, parts: int, width: int, pack: int) -> str:
        """The assembly of a poll of ``pack`` places, ``width`` words each, of ``parts`` parts from ``first`` on.

        Parts are ``step`` bytes apart.
        Results: the words' data, part by part, then a bit for each part of which a word is missing. Arguments:
        the addresses, whether they count, the epoch.
        """
        words = parts * width
        address, inside, epoch = ((words + 1 + n) * pack for n in range(3))
        one = "ld.relaxed.sys.global.b64" if width == 1 else "ld.relaxed.sys.global.v2.b64"
        names = [[f"w{i}_{n}" for n in range(words)] for i in range(pack)]
        lines = [
            f".reg .pred q, p<{pack}>; .reg .b32 n, m, t, u, e<{parts}>;",
            ".reg .b64 " + ", ".join(name for row in names for name in row) + ";",
            "mov.u32 n, 0;",
        ]
        for i, row in enumerate(names):
            lines.append(f"setp.ne.s32 p{i}, ${inside + i}, 0;")
            lines += [f"mov.b64 {name}, {{0, ${epoch}}};" for name in row]
        lines.append("POLL:")
        for part in range(parts):
            for i, row in enumerate(names):
                into = (
                    row[part * width] if width == 1 else f"{{{row[part * 2]}, {row[part * 2 + 1]}}}"
                )
                lines.append(f"@p{i} {one} {into}, [${address + i} + {(first + part) * step}];")
        lines.append("mov.u32 m, 0;")
        for part in range(parts):
            lines.append(f"mov.u32 e{part}, 0;")
            for row in names:
                for name in row[part * width : (part + 1) * width]:
                    lines.append(f"mov.b64 {{t, u}}, {name}; xor.b32 u, u, ${epoch};")
                    lines.append(f"or.b32 e{part}, e{part}, u;")
            lines.append(f"or.b32 m, m, e{part};")
        lines.append("setp.eq.u32 q, m, 0; @q bra SEEN;")
        lines.append(f"add.u32 n, n, 1; setp.lt.u32 q, n, {_POLLS}; @q bra POLL;")
        lines.append("SEEN: mov.u32 m, 0;")
        for part in range(parts):
            lines.append(f"setp.ne.u32 q, e{part}, 0; selp.u32 t, {1 << (first + part)}, 0, q;")
            lines.append("or.b32 m, m, t;")
        for i, row in enumerate(names):
            for n, name in enumerate(row):
                lines.append(f"mov.b64 {{${n * pack + i}, u}}, {name};")
            lines.append(f"mov.u32 ${words * pack + i}, m;")
        return "{ " + "\n".join(lines) + " }"

    def _each(address: Any, semantic: Any) -> int:
        """How many elements of a tile a thread has."""
        count = 1
        for extent in address.shape:
            count *= int(core._unwrap_if_constexpr(extent))
        return max(1, count // (32 * int(semantic.builder.options.num_warps)))

    @core.builtin
    def _together(address: Any, parts: Any, _semantic: Any = None) -> Any:
        # As many parts of a tile as fit the registers.
        fitting = max(1, _HELD // _each(address, _semantic))
        return tl.constexpr(min(core._unwrap_if_constexpr(parts), fitting))

    @core.builtin
    def _look(
        address: Any,
        epoch: Any,
        inside: Any,
        step: Any,
        first: Any,
        parts: Any,
        pair: Any,
        _semantic: Any = None,
    ) -> Any:
        step, first, parts, pair = map(core._unwrap_if_constexpr, (step, first, parts, pair))
        width = 2 if pair else 1
        pack = min(_each(address, _semantic), max(1, _AHEAD // (8 * parts * width)))
        pack = 1 << (pack.bit_length() - 1)
        words = parts * width
        outputs, inputs = ["=&r"] * ((words + 1) * pack), ["l"] * pack + ["r"] * (2 * pack)
        return core.inline_asm_elementwise(
            _poll(step, first, parts, width, pack),
            ",".join(outputs + inputs),
            [address, inside.to(tl.int32, _semantic=_semantic), epoch],
            dtype=[tl.int32] * (words + 1),
            is_pure=False,
            pack=pack,
            _semantic=_semantic,
        )


@triton.jit
def _halves(value, rows: tl.constexpr, columns: tl.constexpr):
    # Neighbours in a row, which one thread then holds.
    return tl.split(tl.reshape(value, (rows, columns // 2, 2)))


@triton.jit
def _payload(value, rows: tl.constexpr, columns: tl.constexpr):
    # Four bytes of a row an element: int32 (rows, columns * size / 4).
    if value.dtype.primitive_bitwidth == 32:
        return value.to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        low, high = _halves(bits, rows, columns)
        return low | (high << 16)


@triton.jit
def _half(data, dtype: tl.constexpr, half: tl.constexpr, single: tl.constexpr):
    # One of the elements that words hold, where they hold two, else the only one; in fp32 if ``single``.
    if dtype.primitive_bitwidth == 32:
        value = data.to(dtype, bitcast=True)
    elif half == 0:
        value = (data & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    else:
        value = (data >> 16).to(tl.int16).to(dtype, bitcast=True)
    return value.to(tl.float32) if single else value


@triton.jit
def _added(
    before, data, held: tl.constexpr, per: tl.constexpr, dtype: tl.constexpr, single: tl.constexpr
):
    # The pieces of a tile (see :func:`_joined`), of which ``before`` are the sums so far: ``held`` words a place
    # of ``per`` elements each, part after part in ``data``.
    added = ()
    for place in tl.static_range(held * per):
        total = _half(data[place // per], dtype, place % per, single)
        if len(before) > 0:
            total = before[place] + total
        for part in tl.static_range(1, (len(data) - 1) // held):
            total += _half(data[part * held + place // per], dtype, place % per, single)
        added = added + (total,)  # type: ignore[assignment]  # noqa: RUF005 - no unpacking
    return added


@triton.jit
def _joined(pieces, shape: tl.constexpr, dtype: tl.constexpr):
    # Every piece holds each fourth (second) element of a row: word by word, in a word half by half.
    count: tl.constexpr = len(pieces)
    if count == 4:
        first = tl.join(pieces[0].to(dtype), pieces[2].to(dtype))
        second = tl.join(pieces[1].to(dtype), pieces[3].to(dtype))
        return tl.reshape(tl.join(first, second), shape)
    elif count == 2:
        return tl.reshape(tl.join(pieces[0].to(dtype), pieces[1].to(dtype)), shape)
    else:
        return pieces[0].to(dtype)


@triton.jit
def _places(words, start, step, shape: tl.constexpr, size: tl.constexpr, pair: tl.constexpr):
    # Addresses of the tile's places, of one word or of two: int64 (rows, places), and the column of each.
    each: tl.constexpr = (8 if pair else 4) // size
    rows = tl.arange(0, shape[0])[:, None]
    columns = tl.arange(0, shape[1] // each)[None, :] * each
    first = words.to(tl.int64, bitcast=True) + tl.cast(start, tl.int64) * (2 * size)
    return first + (rows * step + columns) * (2 * size), rows, columns


@triton.jit
def _inside(rows, columns, height, width):
    found = (rows >= 0) & (columns >= 0)
    if height is not None:
        found = found & (rows < height)
    if width is not None:
        found = found & (columns < width)
    return found


@triton.jit
def store_words(words, epoch, value, start, step, height, width, pair: tl.constexpr):
    """Store a tile as words of call ``epoch``.

    ``words``: an int64 pointer to the first word of the buffer, on any rank. ``value``: a tile of two axes, of
    16 or 32 bits an element. ``start``: the element of the buffer that is its first, ``step`` elements from one
    row to the next. ``height`` and ``width``: of its rows and columns, only the first so many are there; None:
    all. ``pair``: rows begin and end at whole pairs of words, so that sixteen bytes are stored at a time; else
    at whole words. Nothing else is to be done for the reader.
    """
    shape: tl.constexpr = value.shape
    size: tl.constexpr = value.dtype.primitive_bitwidth // 8
    address, rows, columns = _places(words, start, step, shape, size, pair)
    data = _payload(value, shape[0], shape[1])
    inside = _inside(rows, columns, height, width)
    if pair:
        _put(address, _halves(data, shape[0], shape[1] * size // 4), epoch, inside, pair)
    else:
        _put(address, (data,), epoch, inside, pair)


@triton.jit
def _gathered(
    ctx,
    words,
    start,
    step,
    shape: tl.constexpr,
    dtype: tl.constexpr,
    height,
    width,
    pair: tl.constexpr,
    parts: tl.constexpr,
    apart: tl.constexpr,
    single: tl.constexpr,
    result: tl.constexpr,
    flag,
    flag_step,
    producer,
    tile,
    wait,
):
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    address, rows, columns = _places(words, start, step, shape, size, pair)
    inside = _inside(rows, columns, height, width)
    held: tl.constexpr = 2 if pair else 1
    together: tl.constexpr = _together(address, parts)
    polls = tl.cast(0, tl.int32)
    started = tl.cast(0, tl.int64)
    was_here = tl.cast(0, tl.int32)
    stuck = tl.cast(0, tl.int32)
    blank = tl.zeros(address.shape, tl.float32 if single else dtype)
    pieces = (blank,) * (held * (4 // size))
    spinning = ctx.epoch == ctx.epoch
    while spinning:
        missing = tl.cast(0, tl.int32)
        added = ()
        for begin in tl.static_range(0, parts, together):
            data = _look(
                address,
                ctx.epoch,
                inside,
                2 * size * apart,
                begin,
                together if begin + together < parts else parts - begin,
                pair,
            )
            missing |= tl.max(data[len(data) - 1])
            added = _added(added, data, held, 4 // size, dtype, single)
        spinning = missing != 0
        # Put together behind the loop: what it carries keeps its place in the registers.
        pieces = added
        if spinning:
            late = producer
            for part in tl.static_range(parts if single else 0):
                late = tl.where((missing >> part) & 1 != 0, part, late)
            spinning, started, was_here, stuck = overdue(
                ctx,
                polls,
                polls == 0,
                started,
                was_here,
                stuck,
                ctx.epoch,
                late,
                flag + late * flag_step,
                ctx.epoch,
                ctx.epoch - 1,
                tile,
                wait,
            )
        polls += 1
    return _joined(pieces, shape, result)


@triton.jit
def load_words(
    ctx,
    words,
    start,
    step,
    shape: tl.constexpr,
    dtype: tl.constexpr,
    height,
    width,
    pair: tl.constexpr,
    flag,
    producer,
    tile,
    wait,
):
    """Acquire and load a tile of words: until each of them is of this call.

    Returns a tile of ``shape`` and ``dtype``, zero where it is not there. The wait is bounded as one for a flag
    is: ``flag``, a word number of the arena, stands for the tile in the error record, ``producer`` is the rank
    that stores it; ``tile`` and ``wait`` go there too. The others are those of :func:`store_words`.
    """
    return _gathered(
        ctx, words, start, step, shape, dtype, height, width, pair, 1, 0, False, dtype,
        flag, 0, producer, tile, wait,
    )  # fmt: skip


@triton.jit
def sum_words(
    ctx,
    words,
    start,
    step,
    shape: tl.constexpr,
    dtype: tl.constexpr,
    height,
    width,
    pair: tl.constexpr,
    parts: tl.constexpr,
    apart: tl.constexpr,
    result: tl.constexpr,
    flag,
    flag_step,
    tile,
    wait,
):
    """Acquire and add tiles of words of all ranks: in rank order, in fp32, rounded once to ``result``.

    The tile of rank r lies r times ``apart`` elements behind that of rank 0; there are ``parts`` of them, which
    are polled together. ``flag + r * flag_step`` stands for it in the error record. The others are those of
    :func:`load_words`.
    """
    return _gathered(
        ctx, words, start, step, shape, dtype, height, width, pair, parts, apart, True, result,
        flag, flag_step, ctx.rank, tile, wait,
    )  # fmt: skip
