"""Every way in which a patch's file can be wrong, one file for each: refused by name, at no cost."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from frugal_rl.container import pack
from frugal_rl.errors import InputError
from frugal_rl.patch import KEYS, PLAIN, STREAMS, BaseInfo, DamagedPatch, Patch, PatchError, TensorPatch

from .test_patch import H, header_of, small_patch


def forged(patch: Patch, change_streams: Any = None, change_metadata: Any = None) -> bytes:
    """A file whose content was changed and whose checksums are right again."""
    data = patch.encode()
    head = header_of(data)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    texts = head.pop("__metadata__")
    streams = {}
    for name, info in head.items():
        raw = data[start + info["data_offsets"][0] : start + info["data_offsets"][1]]
        streams[name.removesuffix(".zst")] = zstandard.decompress(raw) if name.endswith(".zst") else raw
    metadata = {key: json.loads(texts[key]) for key in KEYS}
    if change_streams:
        change_streams(streams)
    if change_metadata:
        change_metadata(metadata)
    return pack(metadata, streams, PLAIN)


def resealed(data: bytes, change: Any) -> bytes:
    """A file whose header object was changed and whose checksum is right again."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    head = header_of(data)
    change(head)
    seal(head)
    return framed(head, data[start:])


def seal(head: dict[str, Any]) -> None:
    head["__metadata__"]["checksum"] = "0" * 32
    head["__metadata__"]["checksum"] = H(framed(head, b"")[8:])


def framed(head: dict[str, Any], body: bytes) -> bytes:
    raw = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


def test_the_forgers_are_honest_where_nothing_changes() -> None:
    patch = small_patch()
    assert forged(patch) == patch.encode()
    assert resealed(patch.encode(), lambda head: None) == patch.encode()


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        for read in (Patch.load, Patch.header):
            with pytest.raises(PatchError, match=r"cannot be read .*give a patch file"):
                read(path)
    assert issubclass(PatchError, InputError)


def test_every_single_byte_that_changes_is_seen() -> None:
    data = small_patch(entries=20, size=2000).encode()
    for at in range(len(data)):
        for flip in (1, 0x80):
            broken = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with pytest.raises(PatchError):
                Patch.decode(broken)


def test_every_truncation_and_appended_bytes_are_seen() -> None:
    data = small_patch(entries=20, size=2000).encode()
    for size in range(len(data)):
        with pytest.raises(DamagedPatch):
            Patch.decode(data[:size])
    with pytest.raises(DamagedPatch):
        Patch.decode(data + b"\0")


def test_another_version_and_a_model_file_are_refused_by_name() -> None:
    data = resealed(small_patch().encode(), lambda h: h["__metadata__"].update(format="frugal_rl patch 2"))
    with pytest.raises(PatchError, match="'frugal_rl patch 2', expected 'frugal_rl patch 1'") as error:
        Patch.decode(data, "p.safetensors")
    assert not isinstance(error.value, DamagedPatch)
    model = framed({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"x")
    with pytest.raises(PatchError, match=r"m\.safetensors: is no patch"):
        Patch.decode(model, "m.safetensors")


STREAM_LIES: dict[str, tuple[str, Any]] = {
    "fewer signs than entries": ("stream signs", lambda s: s.update(signs=s["signs"][:-1])),
    "more signs than entries": ("stream signs", lambda s: s.update(signs=s["signs"] + b"\0")),
    "signs beyond the entries": ("stream signs", lambda s: s.update(signs=s["signs"][:-1] + b"\xff")),
    "no hashes": ("stream hashes", lambda s: s.pop("hashes")),
    "another fingerprint": ("fingerprint", lambda s: s.update(hashes=b"\0" + s["hashes"][1:])),
    "too few blocks": ("stream gaps.k", lambda s: s.update({"gaps.k": s["gaps.k"][:-1]})),
    "impossible widths": ("63 bits", lambda s: s.update({"gaps.k": b"\xff" * len(s["gaps.k"])})),
    "low bits cut": ("stream gaps.low", lambda s: s.update({"gaps.low": s["gaps.low"][:-1]})),
    "high bits all ones": (
        "numbers, expected",
        lambda s: s.update({"gaps.high": b"\xff" * len(s["gaps.high"])}),
    ),
    "high bits all zeros": (
        "numbers, expected",
        lambda s: s.update({"gaps.high": b"\0" * len(s["gaps.high"])}),
    ),
    "a high number too long": ("above 20", lambda s: s.update({"gaps.high": b"\0\0\0\0" + s["gaps.high"]})),
    "big numbers without need": ("stream gaps.big", lambda s: s.update({"gaps.big": b"\0" * 8})),
    "more bits than entries": ("stream more", lambda s: s.update(more=s["more"][:-1] + b"\xff")),
    "lengths of zero": ("1 to 63", lambda s: s.update({"lengths.low": b"\0" * len(s["lengths.low"])})),
    "lengths cut": ("stream lengths.low", lambda s: s.update({"lengths.low": s["lengths.low"][:-1]})),
    "sizes cut": ("stream sizes", lambda s: s.update(sizes=s["sizes"][:-1])),
}


@pytest.mark.parametrize("lie", STREAM_LIES)
def test_a_stream_that_contradicts_the_header_is_refused(lie: str) -> None:
    message, change = STREAM_LIES[lie]
    with pytest.raises(DamagedPatch, match=message):
        Patch.decode(forged(small_patch(), change_streams=change))


def test_a_stream_with_a_byte_of_zeros_too_many_is_refused() -> None:
    names: list[str] = []
    assert Patch.decode(forged(small_patch(), change_streams=names.extend)) == small_patch()
    assert set(names) == set(STREAMS)
    for name in names:
        with pytest.raises(DamagedPatch, match=f"stream {name}"):
            Patch.decode(forged(small_patch(), lambda s, n=name: s.update({n: s[n] + b"\0"})))


def row(index: int, value: Any) -> Any:
    return lambda m: m["tensors"]["a"].__setitem__(index, value)


METADATA_LIES: dict[str, tuple[str, Any]] = {
    "an unknown dtype": ("dtype is 'Q4'", row(0, "Q4")),
    "a dtype that is no text": ("dtype is", row(0, ["BF16"])),
    "a narrower dtype": ("wider than", row(0, "F8_E4M3")),
    "a negative size": ("shape is", row(1, [-100, -100])),
    "a size that is no integer": ("shape is", row(1, [100.0, 100])),
    "a smaller shape": ("gap|beyond", row(1, [100, 5])),
    "fewer entries than streams": ("expected", row(2, 299 - 8)),
    "more entries than streams": ("expected", row(2, 9_000)),
    "more entries than the shape": ("changed entries in shape", row(2, 10_001)),
    "no entries": ("is described by", row(2, 0)),
    "entries that are true": ("shape is", row(2, True)),
    "an enormous tensor": ("changed entries in shape", row(1, [2**40, 2**40])),
    "an enormous count": ("expected", lambda m: m["tensors"].update(a=["BF16", [2**40], 2**39, "rows"])),
    "an unknown order": ("is described by", row(3, "diagonals")),
    "a row too short": ("is described by", lambda m: m["tensors"].update(a=["BF16"])),
    "tensors that are a list": ("canonical form", lambda m: m.update(tensors=[])),
    "an untouched name that is touched": (
        "base is not one",
        lambda m: m["base"].update(untouched=["a", "c"]),
    ),
    "names out of order": ("base is not one", lambda m: m["base"].update(untouched=["d", "c"])),
    "a base without name": ("base is not one", lambda m: m["base"].pop("name")),
    "another fingerprint": ("fingerprint", lambda m: m["base"].update(fingerprint="0" * 32)),
    "no fingerprint": ("base is not one", lambda m: m["base"].update(fingerprint=None)),
}


@pytest.mark.parametrize("lie", METADATA_LIES)
def test_metadata_that_contradict_the_streams_are_refused(lie: str) -> None:
    message, change = METADATA_LIES[lie]
    with pytest.raises(DamagedPatch, match=message):
        Patch.decode(forged(small_patch(), change_metadata=change))


HEADER_LIES: dict[str, Any] = {
    "a stream that is not U8": lambda h: h["signs"].update(dtype="I8"),
    "a stream of another size": lambda h: h["signs"].update(shape=[1]),
    "a stream beyond the file": lambda h: h["signs"].update(
        shape=[2**40], data_offsets=[h["signs"]["data_offsets"][0], h["signs"]["data_offsets"][0] + 2**40]
    ),
    "a stream before the file": lambda h: h["signs"].update(data_offsets=[-8, 8]),
    "an unknown stream": lambda h: h.update(other=h.pop("signs")),
    "streams that overlap": lambda h: h["signs"].update(data_offsets=h["hashes"]["data_offsets"]),
    "metadata of another name": lambda h: h["__metadata__"].update(extra=""),
    "metadata that is no text": lambda h: h["__metadata__"].update(meta={}),
    "metadata that is no JSON": lambda h: h["__metadata__"].update(meta="{"),
    "metadata that is not canonical": lambda h: h["__metadata__"].update(meta='{"a": 1}'),
    "a key twice": lambda h: h["__metadata__"].update(meta='{"a":1,"a":1}'),
    "a number that is none": lambda h: h["__metadata__"].update(meta='{"a":NaN}'),
    "a number of 5000 digits": lambda h: h["__metadata__"].update(meta='{"a":' + "1" * 5000 + "}"),
    "lists as deep as a well": lambda h: h["__metadata__"].update(
        meta='{"a":' + "[" * 50_000 + "]" * 50_000 + "}"
    ),
    "no hash of a stream": lambda h: h["__metadata__"].update(streams="{}"),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_header_that_lies_is_refused(lie: str) -> None:
    with pytest.raises(DamagedPatch):
        Patch.decode(resealed(small_patch().encode(), HEADER_LIES[lie]))


def test_a_header_in_another_form_is_refused() -> None:
    data = small_patch().encode()
    head = header_of(data)
    raw = json.dumps(head).encode()
    with pytest.raises(DamagedPatch, match="canonical"):
        Patch.decode(struct.pack("<Q", len(raw)) + raw + data[8 + struct.unpack("<Q", data[:8])[0] :])


def replaced_stream(data: bytes, name: str, stored: bytes) -> bytes:
    """The file with other stored bytes of a stream, offsets and hashes made right."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    head = header_of(data)
    texts = head.pop("__metadata__")
    old = {key: data[start + i["data_offsets"][0] : start + i["data_offsets"][1]] for key, i in head.items()}
    streams = {
        **{key: value for key, value in old.items() if key.removesuffix(".zst") != name},
        f"{name}.zst": stored,
    }
    layout, end = {}, 0
    for key in sorted(streams):
        layout[key] = {
            "dtype": "U8",
            "shape": [len(streams[key])],
            "data_offsets": [end, end + len(streams[key])],
        }
        end += len(streams[key])
    texts["streams"] = json.dumps({key: H(streams[key]) for key in sorted(streams)}, separators=(",", ":"))
    whole = {"__metadata__": texts, **layout}
    seal(whole)
    return framed(whole, b"".join(streams[key] for key in sorted(streams)))


FRAMES: dict[str, bytes] = {
    "no frame": b"x" * 30,
    "a bomb": zstandard.compress(b"\0" * 2**26),
    "a bomb of unknown size": zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 2**26),
    "two frames": zstandard.compress(b"\0\0") * 2,
    "a skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "a cut frame": zstandard.compress(bytes(range(256)))[:-9],
    "a size that lies": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**60) + b"\x01\0\0",
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    "stream", ["gaps.k", "gaps.low", "gaps.high", "gaps.big", "more", "lengths.low", "sizes", "signs"]
)
def test_a_bad_frame_is_refused_whatever_its_stream(frame: str, stream: str) -> None:
    with pytest.raises(DamagedPatch):
        Patch.decode(replaced_stream(small_patch().encode(), stream, FRAMES[frame]))


def test_bytes_after_a_whole_frame_are_refused() -> None:
    content: list[bytes] = []
    data = small_patch().encode()
    forged(small_patch(), change_streams=lambda s: content.append(s["more"]))
    assert Patch.decode(replaced_stream(data, "more", zstandard.compress(content[0]))) == small_patch()
    with pytest.raises(DamagedPatch, match="no zstandard frame"):
        Patch.decode(replaced_stream(data, "more", zstandard.compress(content[0]) + b"x"))


@pytest.mark.parametrize("size", [0, 1001, 2**30, 2**63])
def test_a_header_that_is_none_or_longer_than_the_file_is_refused_by_its_size(
    size: int, tmp_path: Path
) -> None:
    data = struct.pack("<Q", size) + b"{" * 1000
    (tmp_path / "p").write_bytes(data)
    for read in (lambda: Patch.decode(data), lambda: Patch.header(tmp_path / "p")):
        with pytest.raises(DamagedPatch, match=f"1008 bytes and its header claims {size} of them"):
            read()


def test_a_gap_that_would_wrap_around_is_refused_and_so_is_a_part_of_one() -> None:
    positions = np.array([*range(200), 100_000])
    bits = np.zeros(201, "u2")
    tensor = TensorPatch.from_bits("BF16", (200_000,), positions, bits, bits + np.uint16(1))
    patch = Patch({"a": tensor}, BaseInfo("x", {}))

    def wrap(streams: dict[str, bytes]) -> None:
        assert len(streams["gaps.big"]) == 8
        streams["gaps.big"] = b"\xff" * 8

    with pytest.raises(DamagedPatch, match="a gap of a is 18446744073709551615"):
        Patch.decode(forged(patch, change_streams=wrap))
    for cut in (b"", b"\0" * 7, b"\0" * 9):
        with pytest.raises(DamagedPatch, match=r"stream gaps\.big has \d bytes, expected 8 to 8"):
            Patch.decode(forged(patch, change_streams=lambda s, cut=cut: s.update({"gaps.big": cut})))


def test_a_position_just_beyond_the_tensor_is_refused() -> None:
    bits = np.zeros(3, "u2")
    tensor = TensorPatch.from_bits("BF16", (100,), np.array([5, 40, 80]), bits, bits + np.uint16(1))
    patch = Patch({"a": tensor}, BaseInfo("x", {}))
    assert len(Patch.decode(forged(patch, change_metadata=row(1, [81]))).tensors["a"]) == 3
    with pytest.raises(DamagedPatch, match="a position of a is beyond its 80 entries"):
        Patch.decode(forged(patch, change_metadata=row(1, [80])))


def test_lying_sizes_allocate_next_to_nothing() -> None:
    lies = [
        forged(
            small_patch(), change_metadata=lambda m: m["tensors"].update(a=["BF16", [2**40], 2**39, "rows"])
        ),
        replaced_stream(small_patch().encode(), "gaps.low", FRAMES["a bomb"]),
        replaced_stream(small_patch().encode(), "gaps.high", FRAMES["a bomb of unknown size"]),
        struct.pack("<Q", 90_000_000) + b"{" * 1000,
    ]
    for data in lies:
        tracemalloc.start()
        with pytest.raises(DamagedPatch):
            Patch.decode(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, f"{peak} bytes"


def test_differences_that_miss_the_hash_are_refused_when_they_are_used() -> None:
    patch = small_patch(ulp=True)
    broken = Patch.decode(
        forged(patch, change_streams=lambda s: s.update(signs=bytes([s["signs"][0] ^ 1]) + s["signs"][1:]))
    )
    before = np.random.default_rng(0).integers(0, 2**16, 10_000, "u2")[patch.tensors["a"].positions]
    assert broken.tensors["a"].state_of(before) == "base"
    patch.tensors["a"].applied(before)
    with pytest.raises(DamagedPatch, match="do not lead"):
        broken.tensors["a"].applied(before)


BAD_TENSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "positions that fall": ("ascend strictly", {"positions": np.array([5, 3])}),
    "positions twice": ("ascend strictly", {"positions": np.array([3, 3])}),
    "a position beyond": ("within 0 to 9", {"positions": np.array([3, 10])}),
    "a negative position": ("within 0 to 9", {"positions": np.array([-1, 3])}),
    "positions of another type": ("int64", {"positions": np.array([1, 3], np.int32)}),
    "a difference of zero": ("is 0", {"difference": np.array([1, 0], "u2")}),
    "differences of another width": ("differences are", {"difference": np.array([1, 1], "u4")}),
    "too few differences": ("differences are", {"difference": np.array([1], "u2")}),
    "an unknown dtype": ("dtype is 'F4'", {"dtype": "F4"}),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_a_tensor_that_breaks_an_invariant_cannot_be_made(bad: str) -> None:
    good = {
        "dtype": "BF16",
        "shape": (10,),
        "positions": np.array([1, 3]),
        "difference": np.array([1, 1], "u2"),
    }
    TensorPatch(**good, before_hash=b"", after_hash=b"")  # type: ignore[arg-type]
    message, change = BAD_TENSORS[bad]
    with pytest.raises(PatchError, match=message):
        TensorPatch(**{**good, **change}, before_hash=b"", after_hash=b"")


def test_bits_of_another_width_and_unknown_dtypes_are_refused() -> None:
    with pytest.raises(PatchError, match="bits are"):
        TensorPatch.from_bits("F32", (2,), np.arange(2), np.zeros(2, "u2"), np.ones(2, "u2"))
    with pytest.raises(PatchError, match="'F4' is not supported"):
        TensorPatch.from_bits("F4", (2,), np.arange(2), np.zeros(2, "u1"), np.ones(2, "u1"))


def test_meta_that_is_no_json_and_unknown_tensors_are_refused() -> None:
    tensors = small_patch().tensors
    for meta in ({"loss": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(PatchError, match="meta"):
            Patch(tensors, BaseInfo("x", {}), meta)
    with pytest.raises(PatchError, match="has no tensor a, b"):
        Patch(tensors, BaseInfo("x", {"c": "0" * 32}))
    with pytest.raises(PatchError, match="32 hex digits"):
        BaseInfo("x", {"c": "0"})
