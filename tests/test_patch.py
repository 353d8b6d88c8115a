"""The patch's content, its file, and every way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_rl import codes
from frugal_rl.patch import (
    BITS,
    BaseInfo,
    DamagedPatch,
    Patch,
    PatchError,
    TensorPatch,
    WrongBase,
    fingerprint_of_tensor,
    hash_of_entries,
)

H = lambda data: hashlib.blake2b(data, digest_size=16).hexdigest()  # noqa: E731


def changed(rng: np.random.Generator, bits: np.ndarray, density: float, ulp: bool) -> np.ndarray:
    """Bits of which about `density` change, by one ULP or by anything."""
    mask = rng.random(bits.shape) < density
    step = rng.choice([1, -1], bits.shape).astype(f"i{bits.itemsize}").view(bits.dtype)
    other = bits + step if ulp else rng.integers(0, 2 ** (8 * bits.itemsize) - 1, bits.shape, bits.dtype)
    return np.where(mask, other, bits)


Model = dict[str, tuple[str, tuple[int, ...], np.ndarray, np.ndarray]]
"""name -> dtype, shape, bits before, bits after."""


@st.composite
def models(draw: st.DrawFn) -> Model:
    """A few tensors of any dtype and shape, with NaN payloads and zeros of both signs, and any density."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    model = {}
    for i in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL"]))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        width = 8 * BITS[dtype].itemsize
        before = rng.integers(0, 2**width - 1, math.prod(shape), BITS[dtype], endpoint=True)
        special = draw(st.lists(st.sampled_from([0, 1 << (width - 1), (1 << width) - 1]), max_size=3))
        before[: len(special)] = special[: len(before)]
        density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9, 1.0]))
        after = changed(rng, before, density, draw(st.booleans()))
        model[f"layers.{i}.ü"] = (dtype, shape, before, after)
    return model


def patch_of(model: Model, meta: dict[str, Any] | None = None, known: bool = True) -> Patch:
    tensors, fingerprints = {}, {}
    for name, (dtype, shape, before, after) in model.items():
        positions = np.arange(len(before))
        tensors[name] = TensorPatch.from_bits(dtype, shape, positions, before, after)
        fingerprints[name] = fingerprint_of_tensor(dtype, shape, [before])
    return Patch(tensors, BaseInfo("base", fingerprints if known else {}), meta or {})


def small_patch(entries: int = 300, size: int = 10_000, ulp: bool = False) -> Patch:
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2**16, size, "u2")
    positions = np.sort(rng.choice(size, entries, replace=False))
    after = before.copy()
    after[positions] = changed(rng, before[positions], 1.0, ulp)
    model: Model = {
        "a": ("BF16", (100, size // 100), before, after),
        "b": ("F32", (2,), np.zeros(2, "u4"), np.array([0, 1 << 31], "u4")),
        "c": ("F32", (1,), np.zeros(1, "u4"), np.zeros(1, "u4")),
    }
    return patch_of(model, {"recipe": "tiny"})


def header_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


# ------------------------------------------------------------------------------------------ laws


@given(models())
@settings(max_examples=150, deadline=None)
def test_a_patch_leads_from_before_to_after_and_back_bit_for_bit(model: Model) -> None:
    patch = patch_of(model)
    for name, (_, _, before, after) in model.items():
        if name not in patch.tensors:
            assert np.array_equal(before, after)
            continue
        tensor = patch.tensors[name]
        ours = before.copy()
        ours[tensor.positions] = tensor.applied(before[tensor.positions])
        assert np.array_equal(ours, after)
        ours[tensor.positions] = tensor.reverted(after[tensor.positions])
        assert np.array_equal(ours, before)


@given(models(), st.booleans())
@settings(max_examples=250, deadline=None)
def test_a_loaded_patch_is_the_saved_one_and_its_file_is_the_same_again(model: Model, known: bool) -> None:
    patch = patch_of(model, {"a": [1, None, 0.1, "ü"]}, known)
    data = patch.encode()
    loaded = Patch.decode(data)
    assert loaded == patch
    assert loaded.encode() == data


@given(models())
@settings(max_examples=100, deadline=None)
def test_the_state_is_told_from_the_touched_entries(model: Model) -> None:
    patch = patch_of(model)
    if not patch.tensors:
        return
    before = {name: model[name][2][t.positions] for name, t in patch.tensors.items()}
    after = {name: model[name][3][t.positions] for name, t in patch.tensors.items()}
    assert patch.state_of(before.__getitem__, "x") == "base"
    assert patch.state_of(after.__getitem__, "x") == "applied"
    name = next(iter(before))
    other = {**before, name: before[name] ^ np.array(1, before[name].dtype)}
    if not np.array_equal(other[name], after[name]):
        with pytest.raises(WrongBase, match="neither the base 'base'") as error:
            patch.state_of(other.__getitem__, "x")
        assert error.value.tensors == (name,)
    if len(before) > 1:
        with pytest.raises(WrongBase, match="holds the patch in"):
            patch.state_of({**before, name: after[name]}.__getitem__, "x")


def test_equal_patches_from_other_orders_are_equal_files() -> None:
    patch = small_patch()
    tensors = dict(reversed(patch.tensors.items()))
    fingerprints = dict(reversed(patch.base.fingerprints.items()))
    again = Patch(tensors, BaseInfo("base", fingerprints), {"recipe": "tiny"})
    assert again.encode() == patch.encode()
    metas = [{"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}]
    assert Patch(tensors, patch.base, metas[0]).encode() == Patch(tensors, patch.base, metas[1]).encode()
    assert Patch(tensors, BaseInfo("other", fingerprints), {}).encode() != patch.encode()


def test_one_ulp_is_one_whatever_the_sign_and_tensors_without_a_change_are_left_out() -> None:
    before = np.array([0x3F80, 0xBF80, 0x0000], "u2")
    tensor = TensorPatch.from_bits("BF16", (3,), np.arange(3), before, before + np.array([1, 1, 0], "u2"))
    assert tensor.difference.tolist() == [1, 1]
    assert tensor.positions.tolist() == [0, 1]
    same = TensorPatch.from_bits("BF16", (3,), np.arange(3), before, before)
    assert list(Patch({"a": tensor, "b": same}, BaseInfo("x", {})).tensors) == ["a"]


def test_minus_zero_and_nan_payloads_are_changes() -> None:
    before = np.array([0.0, np.nan], "f4").view("u4")
    after = np.array([0x8000_0000, 0x7FC0_0001], "u4")
    tensor = TensorPatch.from_bits("F32", (2,), np.arange(2), before, after)
    assert tensor.applied(before).tolist() == after.tolist()


# ------------------------------------------------------------------------------------------ codes


def slow_gap_streams(values: list[int], ks: list[int]) -> dict[str, bytes]:
    """The streams of gaps by the letter of the format, a bit at a time."""
    low, high, big = [], [], b""
    padded = values + [0] * (-len(values) % 128)
    for block, k in enumerate(ks):
        width = k % 128
        for bit in range(width):
            low += [v >> bit & 1 for v in padded[block * 128 : block * 128 + 128]]
        for v in values[block * 128 : block * 128 + 128] if k < 128 else []:
            zeros = min(v >> width, 20)
            high += [0] * zeros + [1]
            big += struct.pack("<Q", v) if zeros == 20 else b""
    return {"gaps.k": bytes(ks), "gaps.low": packed(low), "gaps.high": packed(high), "gaps.big": big}


def packed(bits: list[int]) -> bytes:
    bits = bits + [0] * (-len(bits) % 8)
    return bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


def slow_size_streams(sizes: list[int]) -> dict[str, bytes]:
    lengths = [size.bit_length() for size in sizes if size]
    streams = {"more": packed([int(size > 0) for size in sizes])}
    streams["lengths.low"] = packed([n % 16 >> bit & 1 for n in lengths for bit in range(4)])
    if any(n > 15 for n in lengths):
        streams["lengths.high"] = packed([n // 16 >> bit & 1 for n in lengths for bit in range(4)])
    rest = b""
    for n in range(2, 64):
        rest += packed([size >> bit & 1 for size in sizes if size.bit_length() == n for bit in range(n - 1)])
    return {**streams, "sizes": rest}


numbers = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 5000), st.integers(0, 2**63 - 1)), max_size=400
)


def reader(streams: dict[str, bytes]) -> codes.Stream:
    def read(name: str, least: int, most: int) -> bytes:
        data = streams.get(name, b"")
        assert least <= len(data) <= most, (name, len(data), least, most)
        return data

    return read


@given(numbers)
@settings(max_examples=300, deadline=None)
def test_gap_streams_are_the_formats_and_decode_to_the_gaps(values: list[int]) -> None:
    streams = codes.encode_gaps(np.array(values, np.uint64))
    assert streams == slow_gap_streams(values, list(streams["gaps.k"]))
    assert codes.decode_gaps(reader(streams), len(values)).tolist() == values


@given(numbers)
@settings(max_examples=300, deadline=None)
def test_size_streams_are_the_formats_and_decode_to_the_sizes(values: list[int]) -> None:
    streams = codes.encode_sizes(np.array(values, np.uint64))
    assert streams == slow_size_streams(values)
    assert codes.decode_sizes(reader(streams), len(values)).tolist() == values


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_bit_lengths_are_exact(values: list[int]) -> None:
    edges = [2**n + d for n in range(64) for d in (-1, 0)]
    numbers = np.array(values + edges, np.uint64)
    assert codes.bit_length(numbers).tolist() == [v.bit_length() for v in values + edges]


def test_golden_streams() -> None:
    gaps = codes.encode_gaps(np.array([5, 0, 3, 9], np.uint64))
    assert {name: data.hex() for name, data in gaps.items()} == {
        "gaps.k": "00",
        "gaps.low": "",
        "gaps.high": "600410",
        "gaps.big": "",
    }
    sizes = codes.encode_sizes(np.array([0, 1, 5, 0, 2, 40000], np.uint64))
    assert {name: data.hex() for name, data in sizes.items()} == {
        "more": "36",
        "lengths.low": "3102",
        "lengths.high": "0010",
        "sizes": "0001401c",
    }


# ------------------------------------------------------------------------------------------ format


def read_by_the_docstring(data: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The format's own text in numpy: name -> positions, signed differences."""
    n = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + n])
    meta, s = head.pop("__metadata__"), {}
    for name, info in head.items():
        raw = data[8 + n + info["data_offsets"][0] : 8 + n + info["data_offsets"][1]]
        raw = zstandard.decompress(raw) if name.endswith(".zst") else raw
        s[name.removesuffix(".zst")] = np.frombuffer(raw, np.uint8)
    bits = lambda name: np.unpackbits(s.get(name, np.empty(0, np.uint8)), bitorder="little")  # noqa: E731
    low, ones = bits("gaps.low").reshape(-1, 128).astype(int), np.flatnonzero(bits("gaps.high"))
    zeros, big, v = iter(np.diff(ones, prepend=-1) - 1), iter(s.get("gaps.big", ones[:0]).view("<u8")), []
    table = json.loads(meta["tensors"])
    listed = [min(k, math.prod(shape) - k) for _, shape, k, _ in table.values()]
    for i, k in enumerate(s.get("gaps.k", ())):
        block, low = sum(low[j] << j for j in range(k % 128)) + np.zeros(128, int), low[k % 128 :]
        for x in block[: sum(listed) - 128 * i]:
            q = next(zeros) if k < 128 else 0
            v.append(int(next(big)) if q == 20 else (int(q) << int(k % 128)) + int(x))
    length = np.zeros(len(bits("signs")), int)
    high, more = bits("lengths.high"), np.flatnonzero(bits("more"))
    nibble = lambda b: (b.reshape(-1, 4) @ [1, 2, 4, 8])[: len(more)]  # noqa: E731
    length[more] = nibble(bits("lengths.low")) + (16 * nibble(high) if len(high) else 0)
    size, rest = (length > 0).astype(object), bits("sizes")
    for n in range(2, 64):
        at = np.flatnonzero(length == n)
        used = len(at) * (n - 1)
        size[at] = rest[:used].reshape(-1, n - 1).astype(object) @ [1 << j for j in range(n - 1)] + (
            1 << n - 1
        )
        rest = rest[-(-used // 8) * 8 :]
    difference, found = np.where(bits("signs"), -size - 1, size + 1), {}
    for (name, (_, shape, k, order)), m in zip(table.items(), listed, strict=True):
        (here, v), (d, difference) = (v[:m], v[m:]), (difference[:k], difference[k:])
        p, total = np.cumsum(np.array(here, int) + 1) - 1, math.prod(shape)
        if order == "columns":
            p = np.sort(p % shape[0] * (total // shape[0]) + p // shape[0])
        found[name] = (p if 2 * k <= total else np.setdiff1d(np.arange(total), p), d)
    return found


@given(models())
@settings(max_examples=150, deadline=None)
def test_the_docstring_is_enough_to_read_a_file(model: Model) -> None:
    patch = patch_of(model)
    found = read_by_the_docstring(patch.encode())
    assert list(found) == list(patch.tensors)
    for name, tensor in patch.tensors.items():
        positions, difference = found[name]
        assert positions.tolist() == tensor.positions.tolist()
        signed = tensor.difference.view(f"i{tensor.difference.itemsize}")
        assert difference.tolist() == signed.tolist()


def test_columns_and_majorities_are_written_in_their_own_way() -> None:
    before = np.zeros((200, 300), "u2")
    column, most = before.copy(), before.copy()
    column[:, [3, 70]] = 1
    most[1:] = 1
    model: Model = {
        "column": ("BF16", (200, 300), before.ravel(), column.ravel()),
        "most": ("BF16", (200, 300), before.ravel(), most.ravel()),
    }
    patch = patch_of(model)
    data = patch.encode()
    assert Patch.decode(data) == patch
    found = read_by_the_docstring(data)
    assert found["column"][0].tolist() == patch.tensors["column"].positions.tolist()
    assert found["most"][0].tolist() == patch.tensors["most"].positions.tolist()
    table = json.loads(header_of(data)["__metadata__"]["tensors"])
    assert table["column"] == ["BF16", [200, 300], 400, "columns"]
    assert len(data) - 8 - struct.unpack("<Q", data[:8])[0] < (400 + 59_700) / 8 + 300


def test_hashes_are_the_formats() -> None:
    positions, bits = np.array([1, 4]), np.array([7, 9], "u2")
    expected = H(b"BF16 2,3\n" + struct.pack("<qq", 1, 4) + struct.pack("<HH", 7, 9))
    assert [digest.hex() for digest in hash_of_entries("BF16", (2, 3), positions, bits)] == [expected]
    assert fingerprint_of_tensor("BF16", (2,), [bits[:1], bits[1:]]) == H(b"BF16 2\n" + bits.tobytes())
    info = BaseInfo("x", {"b": H(b"1"), "a": H(b"2")})
    assert info.fingerprint == H(b'"a"' + bytes.fromhex(H(b"2")) + b'"b"' + bytes.fromhex(H(b"1")))


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    small_patch().save(tmp_path / "p.safetensors")
    with safetensors.safe_open(tmp_path / "p.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "frugal_rl patch 1"
        assert json.loads(file.metadata()["base"])["name"] == "base"
        assert file.get_tensor("signs").dtype == np.uint8


def test_the_header_alone_says_what_the_patch_holds(tmp_path: Path) -> None:
    patch = small_patch()
    path = tmp_path / "p.safetensors"
    size = patch.save(path)
    with open(path, "r+b") as file:  # the streams are not read, so what they hold does not matter
        file.seek(size - 50)
        file.write(b"x" * 50)
    header = Patch.header(path)
    assert (header.base_name, header.base_fingerprint) == ("base", patch.base.fingerprint)
    assert header.entries == patch.entries == 301
    assert header.tensors["b"].shape == (2,)
    assert header.untouched == ("c",)
    assert header.meta == {"recipe": "tiny"}
    assert header.file_bytes == size
    assert header.stream_bytes == size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]
    with pytest.raises(DamagedPatch):
        Patch.load(path)


# Issue 2 and FACTS.md section 11: bytes over the entropy bound, headers apart.
@pytest.mark.parametrize(
    ("density", "most"),
    [(0.00002, 1.10), (0.0002, 1.05), (0.002, 1.05), (0.02, 1.05), (0.3, 1.05), (0.8, 1.05)],
)
@pytest.mark.parametrize("ulp", [True, False])
def test_bytes_stay_near_the_entropy_bound(density: float, most: float, ulp: bool) -> None:
    size = 64 * 2**20 if density < 0.01 else 2**22
    rng = np.random.default_rng(3)
    count = int(size * density)
    positions = (
        np.unique(rng.integers(0, size, count))
        if density < 0.1
        else np.flatnonzero(rng.random(size) < density)
    )
    count = len(positions)
    before = rng.integers(0, 2**16, count, "u2")
    after = before + (rng.choice([1, 2**16 - 1], count) if ulp else rng.integers(1, 2**16, count)).astype(
        "u2"
    )
    tensor = TensorPatch.from_bits("BF16", (2**11, size // 2**11), positions, before, after)
    data = Patch({"w": tensor}, BaseInfo("x", {})).encode()
    streams = len(data) - 8 - struct.unpack("<Q", data[:8])[0]
    ways = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    assert streams <= most * (ways / math.log(2) + count * (1 if ulp else 16)) / 8


def test_the_largest_tensor_is_patched_and_a_larger_one_is_refused() -> None:
    """At no cost: what is not listed is nowhere."""
    position_N, bits_N = np.array([0, 2**48 - 1]), np.zeros(2, "u2")
    for shape in ((2**48,), (2**24, 2**24)):
        tensor = TensorPatch.from_bits("BF16", shape, position_N, bits_N, bits_N + np.uint16(1))
        patch = Patch({"a": tensor}, BaseInfo("x", {}))
        assert Patch.decode(patch.encode()) == patch
    with pytest.raises(PatchError, match="changed entries in shape"):
        TensorPatch.from_bits("BF16", (2**48 + 1,), position_N, bits_N, bits_N + np.uint16(1))


def test_a_save_is_whole_and_durable_before_it_has_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, fsync = tmp_path / "p.safetensors", [], os.fsync

    def noted(descriptor: int) -> None:
        status = os.fstat(descriptor)
        folder = status.st_ino == tmp_path.stat().st_ino
        seen.append(("folder" if folder else status.st_size, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    os.close(free := os.dup(0))  # the lowest descriptor that nobody has
    size = small_patch().save(path)
    assert seen == [(size, False), ("folder", True)]
    os.close(still := os.dup(0))
    assert still == free


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"old")

    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 1:  # the file; the folder could be synced
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        small_patch().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    assert path.read_bytes() == b"old"
