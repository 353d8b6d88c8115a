"""10,000 damaged patch files: each is refused with PatchError, or leads to the right bits."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import struct
import time
from collections.abc import Callable

import numpy as np
import zstandard

from frugal_rl.patch import BaseInfo, Patch, PatchError, TensorPatch, fingerprint_of_tensor

CASES = 10_000
MAX_SECONDS_OF_A_CASE = 2.0  # a hang, not a slow machine: a case takes under a millisecond
MAX_GROWTH_BYTES = 200 * 2**20  # over all cases, of files of a few KiB

Weights = dict[str, tuple[str, tuple[int, ...], np.ndarray, np.ndarray]]


def weights(seed: int) -> Weights:
    """Tensors with sparse, dense, columnar and wide changes: every stream and code is in use."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**16, (40, 60)).astype("u2")
    column, sparse, dense = a.copy(), a.copy(), a.copy()
    column[:, [3, 17]] += 1
    sparse[rng.random(a.shape) < 0.03] -= 1
    dense[rng.random(a.shape) < 0.9] ^= 0x4321
    wide = rng.integers(0, 2**64, 50, "u8")
    far = np.zeros(200_000, "u4")
    far[[0, 1, 2, 3, 199_999]] = [1, 2, 2**31, 2**32 - 1, 7]
    return {
        "column": ("BF16", a.shape, a.ravel(), column.ravel()),
        "sparse": ("F16", a.shape, a.ravel(), sparse.ravel()),
        "dense": ("BF16", (2400,), a.ravel(), dense.ravel()),
        "wide": ("F64", (50,), wide, wide[::-1].copy()),
        "far": ("F32", (200_000,), np.zeros_like(far), far),
        "scalar": ("F8_E4M3", (), np.array([0x80], "u1"), np.array([0], "u1")),
    }


def patch_of(model: Weights, known: bool) -> Patch:
    tensors = {
        name: TensorPatch.from_bits(dtype, shape, np.arange(len(before)), before, after)
        for name, (dtype, shape, before, after) in model.items()
    }
    prints = {name: fingerprint_of_tensor(d, s, [before]) for name, (d, s, before, _) in model.items()}
    return Patch(tensors, BaseInfo("base", prints if known else {}), {"lr": 0.1, "steps": [1, 2]})


def check(data: bytes, model: Weights) -> str:
    """What became of a file: "refused", or "right" after it was used."""
    try:
        patch = Patch.decode(data)
        for name, tensor in patch.tensors.items():
            dtype, shape, before, after = model.get(name, ("", (), None, None))
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                return "refused"  # as a checkpoint does: another tensor is another base
            touched = before[tensor.positions]
            if tensor.state_of(touched) != "base":
                return "refused"
            assert np.array_equal(tensor.applied(touched), after[tensor.positions]), f"{name} is wrong"
            whole = before.copy()
            whole[tensor.positions] = after[tensor.positions]
            assert np.array_equal(whole, after), f"{name} lacks changes"
    except PatchError:
        return "refused"
    return "right"


# ------------------------------------------------------------------------------------------ damage


def flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 20)) + data[at:]


def remove(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 20) :]


PLAIN_DAMAGE = (flip, cut, insert, remove)
NUMBERS = (0, 1, -1, 7, 127, 255, 2**16, 2**31, 2**32, 2**40, 2**47, 2**63, 2**64, 10**30)


def header_number(data: bytes, rng: random.Random) -> bytes:
    """One number of the header changed, the checksum made right again."""
    size = struct.unpack("<Q", data[:8])[0]
    raw, body = data[8 : 8 + size].rstrip(b" "), data[8 + size :]
    numbers = [match for match in re.finditer(rb"\d+", raw) if len(match[0]) < 32]
    match = rng.choice(numbers)
    number = rng.choice([*NUMBERS, int(match[0]) + 1, int(match[0]) - 1, int(match[0]) * 2])
    changed = raw[: match.start()] + str(number).encode() + raw[match.end() :]
    return sealed(changed, body)


def header_text(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header changed, the checksum made right again."""
    size = struct.unpack("<Q", data[:8])[0]
    raw, body = data[8 : 8 + size].rstrip(b" "), data[8 + size :]
    damage = rng.choice(PLAIN_DAMAGE)
    return sealed(damage(raw, rng), body)


def sealed(raw: bytes, body: bytes) -> bytes:
    zeros = re.sub(rb'("checksum":")[0-9a-f]{32}"', rb"\g<1>" + b"0" * 32 + b'"', raw)
    zeros += b" " * (-len(zeros) % 8)
    digest = hashlib.blake2b(zeros, digest_size=16).hexdigest().encode()
    header = zeros.replace(b'"checksum":"' + b"0" * 32, b'"checksum":"' + digest)
    return struct.pack("<Q", len(header)) + header + body


def stream_damage(inside: bool) -> Callable[[bytes, random.Random], bytes]:
    """One stream changed (its content, or its frame); offsets, hashes and checksum made right again."""

    def damage(data: bytes, rng: random.Random) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + size])
        texts = head.pop("__metadata__")
        spans = {name: info["data_offsets"] for name, info in head.items()}
        stored = {name: data[8 + size + a : 8 + size + b] for name, (a, b) in spans.items()}
        name = rng.choice(sorted(stored))
        content = stored.pop(name)
        if inside and name.endswith(".zst"):
            content = zstandard.compress(rng.choice(PLAIN_DAMAGE)(zstandard.decompress(content), rng))
        elif rng.random() < 0.9:
            content = rng.choice(PLAIN_DAMAGE)(content, rng)
        else:
            name = rng.choice(["signs", "sizes", "more.zst", "gaps.low.zst", "gaps.big", "lengths.high"])
        stored[name] = content
        stored = {key: stored[key] for key in sorted(stored) if stored[key]}
        layout, end = {}, 0
        for key, value in stored.items():
            layout[key] = {"dtype": "U8", "shape": [len(value)], "data_offsets": [end, end + len(value)]}
            end += len(value)
        hashes = {key: hashlib.blake2b(value, digest_size=16).hexdigest() for key, value in stored.items()}
        texts["streams"] = json.dumps(hashes, separators=(",", ":"), sort_keys=True)
        whole = {"__metadata__": texts, **layout}
        raw = json.dumps(whole, separators=(",", ":"), sort_keys=True).encode()
        return sealed(raw, b"".join(stored.values()))

    return damage


DAMAGE = (*PLAIN_DAMAGE, header_number, header_number, header_text, stream_damage(True), stream_damage(True))
DAMAGE = (*DAMAGE, stream_damage(False))


def test_ten_thousand_damaged_files_are_refused_or_lead_to_the_right_bits() -> None:
    model = weights(0)
    files = [patch_of(model, known).encode() for known in (True, False)]
    for data in files:
        assert check(data, model) == "right"
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outcomes = {damage: {"refused": 0, "right": 0} for damage in DAMAGE}
    for case in range(CASES):
        rng = random.Random(case)
        damage = DAMAGE[case % len(DAMAGE)]
        data = damage(rng.choice(files), rng)
        start = time.perf_counter()
        outcomes[damage][check(data, model)] += 1
        seconds = time.perf_counter() - start
        assert seconds < MAX_SECONDS_OF_A_CASE, f"case {case} took {seconds:.1f} s"
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    assert growth < MAX_GROWTH_BYTES, f"{growth} bytes"
    for damage in PLAIN_DAMAGE:
        assert outcomes[damage]["right"] == 0, f"{damage.__name__} went unnoticed"
    assert sum(outcome["refused"] for outcome in outcomes.values()) > 0.95 * CASES, outcomes


def test_the_damage_reaches_the_deeper_checks() -> None:
    """Damage that is always caught by the checksum would test nothing but the checksum."""
    model = weights(0)
    data = patch_of(model, True).encode()
    messages: list[str] = []
    for case in range(600):
        rng = random.Random(case)
        try:
            Patch.decode(DAMAGE[4 + case % 6](data, rng))
        except PatchError as error:
            messages.append(re.sub(r"[\d\W]+|'.*?'", " ", str(error)))
    assert len(set(messages)) > 25, set(messages)
    assert sum("match its checksum" in message for message in messages) < 0.1 * len(messages)
