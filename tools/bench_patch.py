"""Bytes per changed entry of a patch beside the entropy bound and beside int32 + bf16, and its seconds.

    python tools/bench_patch.py

64 Mi entries of bf16 in one tensor, random positions. B/entry: the streams, by changed entry; bound: the
entropy log2 C(N, k) / 8 and 1 bit (one ULP of random sign) or 16 bits (any bits) for each value; plain: bytes
an entry as int32 + bf16; header: bytes of the file that are not streams. Measured on 2 cores of an AMD EPYC,
one thread, numpy 2.4.6, zstandard 0.25.0 (a busy machine: seconds vary by a factor of two):

    changes                  entries  B/entry  bound  ratio  header  plain encode_s decode_s
    one ULP, 0.002%            1,342   2.358  2.256  1.045     944      6    0.002    0.002
    one ULP, 0.020%           13,421   1.858  1.841  1.009   1,064      6    0.006    0.004
    one ULP, 0.200%          134,217   1.438  1.426  1.009     968      6    0.032    0.023
    one ULP, 2.000%        1,342,177   1.013  1.009  1.004   1,096      6    0.276    0.155
    any bits, 0.020%          13,421   3.749  3.716  1.009   1,312      6    0.006    0.005
    any bits, 2.000%       1,342,177   2.892  2.884  1.003   1,360      6    0.545    0.285
    one ULP, 16 %          10,737,418   0.624  0.621  1.006   1,112      6    2.175    0.829
    50 small tensors          50,000   0.849  0.804  1.057   4,320      6    0.012    0.010
    50 small tensors from bits, hashes included: 0.005 s
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable

import numpy as np

from frugal_rl.patch import BaseInfo, Patch, TensorPatch

ENTRIES = 64 * 2**20
SHAPE = (8192, 8192)
PLAIN_BYTES = 6  # an int32 position and a bf16 value
REPEATS = 3


def bound_bytes(size: int, count: int, value_bits: float) -> float:
    """(log2 C(size, count) + count * value_bits) / 8."""
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return (ways / math.log(2) + count * value_bits) / 8


def random_patch(density: float, one_ulp: bool, seed: int = 0) -> Patch:
    """Random positions of one tensor; changes of one ULP of random sign, or by random bits."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(ENTRIES, int(ENTRIES * density), replace=False))
    before = rng.integers(0, 2**16, len(positions)).astype("u2")
    steps = np.array([1, 2**16 - 1]) if one_ulp else np.arange(1, 2**16)
    after = before + rng.choice(steps, len(positions)).astype("u2")
    return Patch({"w": TensorPatch.from_bits("BF16", SHAPE, positions, before, after)}, BaseInfo("x", {}))


def step_patch(tensors: int = 50, entries: int = 50_000, size: int = 2**14) -> tuple[Patch, float]:
    """One training step of a small model: many small tensors. And the seconds to make it from bits."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(tensors):
        positions = np.sort(rng.choice(size, entries // tensors, replace=False))
        before = rng.integers(0, 2**16, len(positions)).astype("u2")
        after = before + rng.choice(np.array([1, 2**16 - 1]), len(positions)).astype("u2")
        made.append((positions, before, after))

    def make() -> Patch:
        patches = {
            f"model.layers.{i // 10}.part_{i % 10}.weight": TensorPatch.from_bits(
                "BF16", (128, size // 128), *m
            )
            for i, m in enumerate(made)
        }
        return Patch(patches, BaseInfo("x", {}))

    return make(), fastest(make)


def fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report(name: str, patch: Patch, size: int, value_bits: float) -> None:
    data = patch.encode()
    header_bytes = 8 + struct.unpack("<Q", data[:8])[0]
    count, stream_bytes = patch.entries, len(data) - header_bytes
    bound = bound_bytes(size, count, value_bits)
    encode_s, decode_s = fastest(patch.encode), fastest(lambda: Patch.decode(data))
    print(
        f"{name:<22} {count:>9,} {stream_bytes / count:>7.3f} {bound / count:>6.3f} "
        f"{stream_bytes / bound:>6.3f} {header_bytes:>7,} {PLAIN_BYTES:>6} {encode_s:>8.3f} {decode_s:>8.3f}"
    )


def main() -> None:
    print("changes                  entries  B/entry  bound  ratio  header  plain encode_s decode_s")
    for density in (0.00002, 0.0002, 0.002, 0.02):
        report(f"one ULP, {density:.3%}", random_patch(density, True), ENTRIES, 1)
    for density in (0.0002, 0.02):
        report(f"any bits, {density:.3%}", random_patch(density, False), ENTRIES, 16)
    report("one ULP, 16 %", random_patch(0.16, True), ENTRIES, 1)
    patch, make_s = step_patch()
    report("50 small tensors", patch, 50 * 2**14, 1)
    print(f"50 small tensors from bits, hashes included: {make_s:.3f} s")


if __name__ == "__main__":
    main()
