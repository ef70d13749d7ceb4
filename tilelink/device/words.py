"""Words: data that is its own signal.

Every four bytes of a tile travel as an aligned word, which is read and written whole, so a reader polls the data
itself until each word that it wants is there. Nothing is released and no flag is raised: a store and its flight
are all that lies between two ranks. The type of a pointer to words says which of two encodings they have:

int64: a word is eight bytes, four of data and the epoch of the call that stored it, and is there when that is this
call (the idea of NCCL's protocol LL). Whoever stores it again must know that its reader is done.

int32: a word is the data alone, and is there when it is not EMPTY (the idea of the Lamport all-reduce of
TensorRT-LLM). Its one reader puts EMPTY back; whoever stores it again must know that this is done. Data of the
very bits of EMPTY, a NaN that no arithmetic makes, is stored as another NaN.

With two slots, which alternate with the epoch, data of the call between says that the reader is done. A buffer of
words lies in memory that nothing but words of its encoding is ever written to; see :mod:`tilelink.ir.layout`.
Element e of it, of s bytes, is in word e * s // 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilelink.device.places import (
    EMPTY,
    agreed,
    at_once,
    empty_places,
    look_places,
    put_places,
    together,
)
from tilelink.device.signal import overdue
from tilelink.ir import layout

QUIET = tl.constexpr(layout.QUIET)


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
    # A place of a row holds an element of every piece, word by word, in a word half by half. Of n pieces the
    # ones n / 2 apart are joined first, so that the last to be joined are neighbours.
    for _ in tl.static_range(3):
        if len(pieces) > 1:
            pairs = ()
            for piece in tl.static_range(len(pieces) // 2):
                other = pieces[piece + len(pieces) // 2].to(dtype)
                pairs = pairs + (tl.join(pieces[piece].to(dtype), other),)  # type: ignore[assignment]  # noqa: RUF005
            pieces = pairs
    return tl.reshape(pieces[0].to(dtype), shape)


@triton.constexpr_function
def _most(tagged, vector):
    # Words that lie in sixteen bytes, where rows are of whole ones.
    return (2 if tagged else 4) if vector else 1


@triton.jit
def _places(
    words,
    start,
    step,
    shape: tl.constexpr,
    size: tl.constexpr,
    tagged: tl.constexpr,
    width: tl.constexpr,
):
    # Addresses of the tile's places, of ``width`` words each: int64 (rows, places), and the column of each.
    each: tl.constexpr = 4 * width // size
    bytes: tl.constexpr = 2 * size if tagged else size
    rows = tl.arange(0, shape[0])[:, None]
    columns = tl.arange(0, shape[1] // each)[None, :] * each
    first = words.to(tl.int64, bitcast=True) + tl.cast(start, tl.int64) * bytes
    return first + (rows * step + columns) * bytes, rows, columns


@triton.jit
def _inside(rows, columns, height, width):
    found = (rows >= 0) & (columns >= 0)
    if height is not None:
        found = found & (rows < height)
    if width is not None:
        found = found & (columns < width)
    return found


@triton.jit
def store_words(words, epoch, value, start, step, height, width, vector: tl.constexpr):
    """Store a tile as words, of call ``epoch`` where they hold one, else None.

    ``words``: a pointer to the first word of the buffer, on any rank, int64 if words hold an epoch and int32 if
    they are there when they are not EMPTY. ``value``: a tile of two axes, of 16 or 32 bits an element. ``start``:
    the element of the buffer that is its first, ``step`` elements from one row to the next. ``height`` and
    ``width``: of its rows and columns, only the first so many are there; None: all. ``vector``: rows begin and
    end at whole sixteen bytes of words, so that as many are stored at a time; else at whole words. Nothing else
    is to be done for the reader.
    """
    shape: tl.constexpr = value.shape
    size: tl.constexpr = value.dtype.primitive_bitwidth // 8
    tagged: tl.constexpr = words.dtype.element_ty.primitive_bitwidth == 64
    count: tl.constexpr = shape[1] * size // 4
    held: tl.constexpr = at_once(shape[0] * count, _most(tagged, vector))
    address, rows, columns = _places(words, start, step, shape, size, tagged, held)
    data = _payload(value, shape[0], shape[1])
    if not tagged:
        data = tl.where(data == EMPTY, QUIET, data)
    inside = _inside(rows, columns, height, width)
    if held == 4:
        even, odd = _halves(data, shape[0], count)
        first, third = _halves(even, shape[0], count // 2)
        second, fourth = _halves(odd, shape[0], count // 2)
        put_places(address, (first, second, third, fourth), epoch, inside, tagged)
    elif held == 2:
        put_places(address, _halves(data, shape[0], count), epoch, inside, tagged)
    else:
        put_places(address, (data,), epoch, inside, tagged)


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
    vector: tl.constexpr,
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
    tagged: tl.constexpr = words.dtype.element_ty.primitive_bitwidth == 64
    held: tl.constexpr = at_once(shape[0] * shape[1] * size // 4, _most(tagged, vector))
    between: tl.constexpr = (2 * size if tagged else size) * apart
    address, rows, columns = _places(words, start, step, shape, size, tagged, held)
    inside = _inside(rows, columns, height, width)
    some: tl.constexpr = together(address, parts)
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
        for begin in tl.static_range(0, parts, some):
            data = look_places(
                address,
                ctx.epoch,
                inside,
                between,
                begin,
                some if begin + some < parts else parts - begin,
                held,
                tagged,
            )
            missing |= tl.max(data[len(data) - 1])
            added = _added(added, data, held, 4 // size, dtype, single)
        missing = agreed(missing, parts)
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
    vector: tl.constexpr,
    flag,
    producer,
    tile,
    wait,
):
    """Acquire and load a tile of words: until each of them is there.

    Returns a tile of ``shape`` and ``dtype``, zero where it is not there. The wait is bounded as one for a flag
    is: ``flag``, a word number of the arena, stands for the tile in the error record, ``producer`` is the rank
    that stores it; ``tile`` and ``wait`` go there too. All threads have read all of it when
    it returns. The others are those of :func:`store_words`.
    """
    return _gathered(
        ctx, words, start, step, shape, dtype, height, width, vector, 1, 0, False, dtype,
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
    vector: tl.constexpr,
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
        ctx, words, start, step, shape, dtype, height, width, vector, parts, apart, True, result,
        flag, flag_step, ctx.rank, tile, wait,
    )  # fmt: skip


@triton.jit
def empty_words(
    words,
    start,
    step,
    shape: tl.constexpr,
    dtype: tl.constexpr,
    height,
    width,
    vector: tl.constexpr,
    parts: tl.constexpr,
    apart: tl.constexpr,
):
    """Put EMPTY back into the words of a tile, or of ``parts`` tiles ``apart`` elements apart, that were read.

    Of this rank's words of four bytes, behind the :func:`load_words` or :func:`sum_words` with the same arguments
    and before this call of the kernel ends. Nobody waits for it in this call, so it may stand behind what
    others wait for.
    """
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    held: tl.constexpr = at_once(shape[0] * shape[1] * size // 4, _most(False, vector))
    address, rows, columns = _places(words, start, step, shape, size, False, held)
    inside = _inside(rows, columns, height, width)
    for part in tl.static_range(parts):
        empty_places(address, inside, held, part * size * apart)
