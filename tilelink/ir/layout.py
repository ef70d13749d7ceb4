"""The fixed part of an arena: where control words, flags, counters and buffers start (bytes)."""

from __future__ import annotations

from typing import Final, NamedTuple

WORD: Final = 4

# Control words, by word number. Every rank's arena has them at the same place.
EPOCH: Final = 0  # calls begun on this arena
ABORT: Final = (
    1  # sticky: 1 once a wait ran out here or on a peer; LOST + r: the host saw rank r die
)
LOST: Final = 2
EXITED: Final = 2  # workers of the running launch that have left; back to 0 by the last
PROGRAM: Final = 3  # number of the program that the last head began
# [2, 2] by the parity of a call's number, of a launch that begins and ends the call: workers that have left, and
# how many but the last of them have stored all that they had to.
LEAVING: Final = 4
ENDED: Final = 8  # calls ended on this arena: beside slots, EPOCH before a call and after it
BEGUN: Final = (
    9  # 1 while a call runs whose launch has heard that every rank has ended the call before
)
RECORD: Final = 16  # error record, RECORD_WORDS words; the first is nonzero once it is written
RECORD_WORDS: Final = 16
ARRIVED: Final = 64  # [MAX_WORLD] epochs: rank r has started its call number so-and-so
ACK: Final = 128  # [MAX_WORLD] epochs: rank r has read all of its call number so-and-so
# [2, MAX_WORLD] of eight bytes, by the parity of a call's number: which call rank r has begun. The low half is the
# number of its program times NUMBERED plus the value of its dynamic extent: of 2^12 programs and 2^20 rows no two
# are alike. The high half is the epoch.
SAID: Final = 192
NUMBERED: Final = 1 << 20
MAX_WORLD: Final = 64

FLAGS: Final = 4 * 1024  # byte offset of the flag area
FLAG_BYTES: Final = 124 * 1024
# Of a program with two slots: how far the flags and the buffers of odd calls lie behind those of even ones.
SLOT_FLAGS: Final = FLAG_BYTES // 2
SLOT_BYTES: Final = 32 << 20
# Words that signal themselves lie behind both slots, those of each encoding in an area of their own, in a slot for
# each parity. PAYLOAD bytes of data lie in a word.
PAYLOAD: Final = 4
# Parts of a sum of words at most: one bit each, but for the sign, says which are not there yet.
POLLED: Final = 31
# Words of eight bytes: the data and the epoch of the call that wrote it. Nothing else is ever written there, so
# no data of any program is taken for an epoch. They are zero at first; the epoch of the first call is 1.
WORDS: Final = 2 * SLOT_BYTES
SLOT_WORDS: Final = 16 << 20
# Epochs come again after 2^32 calls. Once in WORD_AGE calls all words of a slot are marked with an epoch that is
# 2^31 calls away, so that none that was left there long ago is ever met again.
WORD_AGE: Final = 1 << 30
# Words of four bytes, the data alone: EMPTY until it is there, and again once it was read. All are EMPTY at
# first. EMPTY is a NaN, or two, that no arithmetic makes; data of these bits travels as another one, QUIET.
SENTINELS: Final = WORDS + 2 * SLOT_WORDS
SLOT_SENTINELS: Final = 16 << 20
EMPTY: Final = -1  # as an int32
QUIET: Final = 0x7FFF7FFF  # NaN as one fp32, and each half as fp16 and as bf16
SLOT_ARENA: Final = SENTINELS + 2 * SLOT_SENTINELS  # bytes of an arena of slots
COUNTERS: Final = 128 * 1024  # byte offset of the counter area
COUNTER_BYTES: Final = 128 * 1024
DATA: Final = 256 * 1024  # byte offset of buffers
ALIGN: Final = 1024  # alignment of each buffer


class Encoding(NamedTuple):
    """How words that signal themselves hold their data: ``bytes`` each, in the ``slot`` bytes from ``area`` on."""

    bytes: int
    area: int
    slot: int


# By what says that a word is there: the epoch beside its data, or that its data is not the sentinel.
ENCODINGS: Final = {
    "epoch": Encoding(8, WORDS, SLOT_WORDS),
    "sentinel": Encoding(4, SENTINELS, SLOT_SENTINELS),
}
