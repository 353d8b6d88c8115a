"""Two codes for the integers of a patch: gaps between positions, and sizes of differences.

Law: decode(encode(v)) == v, and equal integers have equal streams on every machine (only integer
arithmetic decides). The streams are specified in `patch.py`. Gaps of random positions are
geometric, which Rice codes of the right parameter meet within 1 %; a parameter for each block of
128 keeps up with rows, columns and layers of different density. Sizes have heavy tails (small
weights move by many ULPs), which lengths under an entropy coder, and plain bits, suit better.
Invariant of decoding: a stream's size is compared with what was decoded before it, then allocated.

Source: Golomb 1966 with powers of two (Rice); low bits apart from unary high bits as in
Elias-Fano; lengths as in Elias gamma.
Differs: outliers of a block escape to whole integers, so that no unary code is long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 128
ESCAPE = 20

Array = npt.NDArray[Any]
Stream = Callable[[str, int, int], bytes]
"""(name, least bytes, most bytes) -> the bytes of a stream; raises where they are fewer or more."""


class CodeError(ValueError):
    """Streams that are not the code of any integers."""


# --------------------------------------------------------------------------------------------- gaps


def bit_length(values: Array) -> Array:
    """The bits that each uint64 needs; exact, unlike a logarithm."""
    exponent = np.frexp(values.astype(np.float64))[1].astype(np.uint64)
    if not values.size or values.max() < 2**53:
        return exponent
    # Beyond 2**53 a conversion to float64 may round 2**n - 1 up to 2**n, which needs a bit more.
    below = np.maximum(exponent, 1).astype(np.uint64) - np.uint64(1)
    return exponent - ((exponent > 0) & (values >> below == 0))


def encode_gaps(values: Array) -> dict[str, bytes]:
    """The streams of uint64 gaps below 2**63."""
    blocks = -(-len(values) // BLOCK)
    v = np.zeros((blocks, BLOCK), np.uint64)
    v.reshape(-1)[: len(values)] = values
    k = _choose_k(v)
    rice = k < 128
    width = (k & 127).astype(np.uint64)
    start = np.cumsum(width) - width
    low = np.empty((int(width.sum()), BLOCK // 8), np.uint8)
    for w in np.unique(width[width > 0]):
        rows = np.flatnonzero(width == w)
        some = v[rows]
        for bit in range(int(w)):
            plane = (some >> np.uint64(bit)).astype(np.uint8) & np.uint8(1)
            low[start[rows].astype(np.intp) + bit] = np.packbits(plane, axis=1, bitorder="little")
    real = np.zeros((blocks, BLOCK), bool)
    real.reshape(-1)[: len(values)] = True
    coded = (v[rice] >> width[rice, None])[real[rice]]
    big = v[rice][real[rice]][coded >= ESCAPE]
    ends = np.cumsum(np.minimum(coded, ESCAPE).astype(np.int64) + 1)
    unary = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    return {
        "gaps.k": k.tobytes(),
        "gaps.low": low.tobytes(),
        "gaps.high": np.packbits(unary, bitorder="little").tobytes(),
        "gaps.big": big.astype("<u8").tobytes(),
    }


def _choose_k(v: Array) -> Array:
    """For each block of [blocks, 128] the byte k that costs about the fewest bits."""
    length = bit_length(v)
    width = length.max(axis=1, initial=0)
    cost = width * np.uint64(BLOCK)
    k = (width + np.uint64(128)).astype(np.uint8)
    mean = (length.sum(axis=1) // np.uint64(BLOCK)).astype(np.int64)
    for shift in (-2, -1, 0, 1):
        candidate = np.clip(mean + shift, 0, 58).astype(np.uint64)
        high = v >> candidate[:, None]
        escapes = (high >= ESCAPE).sum(axis=1).astype(np.uint64)
        bits = np.minimum(high, np.uint64(ESCAPE)).sum(axis=1) + np.uint64(BLOCK) * (candidate + np.uint64(1))
        bits += escapes * np.uint64(32)  # what 8 bytes of `big` come to after zstandard, roughly
        better = bits < cost
        k[better] = candidate[better].astype(np.uint8)
        cost[better] = bits[better]
    return k


def decode_gaps(stream: Stream, count: int) -> Array:
    """Those `count` gaps again. Raises CodeError."""
    blocks = -(-count // BLOCK)
    k = np.frombuffer(stream("gaps.k", blocks, blocks), np.uint8)
    rice, width = k < 128, k & 127
    if (width > 63).any():
        raise CodeError("stream gaps.k holds a width of more than 63 bits")
    v = _low(stream, width).reshape(-1)[:count]
    index = np.flatnonzero(np.repeat(rice, BLOCK)[:count])
    high = _high(stream, len(index))
    v[index] |= high << np.repeat(width, BLOCK)[index].astype(np.uint64)
    escaped = index[high == ESCAPE]
    v[escaped] = np.frombuffer(stream("gaps.big", 8 * len(escaped), 8 * len(escaped)), "<u8")
    return v


def _low(stream: Stream, width: Array) -> Array:
    size = BLOCK // 8 * int(width.sum(dtype=np.int64))
    low = np.frombuffer(stream("gaps.low", size, size), np.uint8).reshape(-1, BLOCK // 8)
    start = np.cumsum(width, dtype=np.int64) - width
    v = np.zeros((len(width), BLOCK), np.uint64)
    for w in np.unique(width[width > 0]):
        rows = np.flatnonzero(width == w)
        some = np.zeros((len(rows), BLOCK), np.uint64)
        for bit in range(int(w)):
            plane = np.unpackbits(low[start[rows] + bit], axis=1, bitorder="little")
            some |= plane.astype(np.uint64) << np.uint64(bit)
        v[rows] = some
    return v


def _high(stream: Stream, count: int) -> Array:
    packed = stream("gaps.high", -(-count // 8), -(-count * (ESCAPE + 1) // 8))
    unary = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
    ones = np.flatnonzero(unary.view(bool))
    filling = len(unary) - (int(ones[-1]) + 1 if len(ones) else 0)
    if len(ones) != count or filling > 7:
        raise CodeError(f"stream gaps.high holds {len(ones)} numbers, expected {count}")
    high = np.diff(ones, prepend=-1) - 1
    if (high > ESCAPE).any():
        raise CodeError(f"stream gaps.high holds a number above {ESCAPE}")
    return high.astype(np.uint64)


# -------------------------------------------------------------------------------------------- sizes


def encode_sizes(sizes: Array) -> dict[str, bytes]:
    """The streams of |difference| - 1, uint64 below 2**63."""
    more = sizes > 0
    v = sizes[more]
    length = bit_length(v).astype(np.uint8)
    streams = {
        "more": np.packbits(more, bitorder="little").tobytes(),
        "lengths.low": _nibbles(length & 15),
    }
    if (length > 15).any():
        streams["lengths.high"] = _nibbles(length >> 4)
    rest = []
    for bits in np.unique(length[length > 1]):
        some = v[length == bits, None] >> np.arange(bits - 1, dtype=np.uint64)
        rest.append(np.packbits(some.astype(np.uint8) & np.uint8(1), bitorder="little").tobytes())
    return {**streams, "sizes": b"".join(rest)}


def _nibbles(values: Array) -> bytes:
    even = np.append(values, np.zeros(len(values) % 2, np.uint8))
    return (even[0::2] | even[1::2] << 4).tobytes()


def _from_nibbles(stream: Stream, name: str, count: int, least: int) -> Array:
    packed = np.frombuffer(stream(name, least, -(-count // 2)), np.uint8)
    if len(packed) not in (least, -(-count // 2)):
        raise CodeError(f"stream {name} has {len(packed)} bytes for {count} numbers")
    values = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    if values[count:].any():
        raise CodeError(f"stream {name} holds more than {count} numbers")
    return values[:count] if len(packed) else np.zeros(count, np.uint8)


def decode_sizes(stream: Stream, count: int) -> Array:
    """Those `count` sizes again. Raises CodeError."""
    packed = stream("more", -(-count // 8), -(-count // 8))
    more = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").view(bool)
    if more[count:].any():
        raise CodeError("stream more holds more bits than entries")
    index = np.flatnonzero(more)
    length = _from_nibbles(stream, "lengths.low", len(index), -(-len(index) // 2))
    length = length | _from_nibbles(stream, "lengths.high", len(index), 0) << 4
    number = np.bincount(length, minlength=64)
    if number[0] or len(number) > 64:
        raise CodeError("stream lengths holds a length beyond 1 to 63")
    need = [-(-int(number[bits]) * (bits - 1) // 8) for bits in range(2, 64)]
    rest = np.frombuffer(stream("sizes", sum(need), sum(need)), np.uint8)
    v = np.ones(len(index), np.uint64)
    for bits, part in zip(range(2, 64), np.split(rest, np.cumsum(need)), strict=False):
        if len(part):
            some = np.unpackbits(part, bitorder="little", count=int(number[bits]) * (bits - 1)).reshape(
                -1, bits - 1
            )
            value = np.full(len(some), 1 << (bits - 1), np.uint64)
            for bit in range(bits - 1):
                value |= some[:, bit].astype(np.uint64) << np.uint64(bit)
            v[length == bits] = value
    sizes = np.zeros(count, np.uint64)
    sizes[index] = v
    return sizes
