"""Folders: reading them, and diff, apply, revert, merge and verify on them, crashes included."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_rl import checkpoint as folders
from frugal_rl import undo
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.errors import InputError
from frugal_rl.patch import (
    BITS,
    AlreadyApplied,
    BaseInfo,
    DamagedPatch,
    NotApplied,
    Patch,
    PatchError,
    WrongBase,
)

Tensors = Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]
"""name -> dtype, shape, bits."""


def write_file(path: Path, tensors: Tensors, **metadata: str) -> None:
    """A safetensors file, written without the code under test."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, bits) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits.nbytes]}
        end += bits.nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(raw)) + raw + b"".join(b.tobytes() for _, _, b in tensors.values())
    )


def write_folder(folder: Path, tensors: Tensors, shards: int = 0) -> Path:
    """A folder of one file or of shards, with the other files that a model's folder has."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "extra").mkdir()
    (folder / "extra" / "tokenizer.json").write_text("{}")
    if not shards:
        write_file(folder / "model.safetensors", tensors, format="pt")
        return folder
    index = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(index.values()):
        write_file(folder / file, {name: tensors[name] for name in tensors if index[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def bits_of(folder: Path) -> dict[str, list[int]]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.bits(name).tolist() for name in checkpoint.tensors}


def step(tensors: Tensors, seed: int, density: float) -> Tensors:
    """The tensors after a random change."""
    rng = np.random.default_rng(seed)
    after = {}
    for name, (dtype, shape, bits) in tensors.items():
        noise = rng.integers(0, 2 ** (8 * bits.itemsize), bits.shape, bits.dtype)
        after[name] = (dtype, shape, np.where(rng.random(bits.shape) < density, bits ^ noise, bits))
    return after


def some_tensors(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "BF16", (30, 16)),
        ("model.norm.weight", "F32", (16,)),
        ("model.odd", "F8_E4M3", (3, 1, 5)),  # an odd number of bytes: what follows is not aligned
        ("model.layers.0.weight", "BF16", (16, 64)),
        ("model.scalar", "F64", ()),
        ("model.empty", "F16", (0, 4)),
    ]
    return {
        n: (d, s, rng.integers(0, 2 ** (8 * BITS[d].itemsize) - 1, math.prod(s), BITS[d]))
        for n, d, s in shapes
    }


class Case:
    """A base, a trained folder, and the patch between them."""

    def __init__(self, root: Path, shards: int = 0, density: float = 0.1) -> None:
        self.root, self.tensors = root, some_tensors()
        self.base = write_folder(root / "base", self.tensors, shards)
        self.trained = write_folder(root / "trained", step(self.tensors, 1, density), shards)
        self.patch = folders.diff(self.base, self.trained)
        self.file = root / "p.safetensors"
        self.patch.save(self.file)


@pytest.fixture(params=[0, 2], ids=["one file", "two shards"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return Case(tmp_path, request.param)


# ------------------------------------------------------------------------------------------ laws


def test_a_new_folder_is_durable_before_it_has_its_name_and_the_name_before_the_end(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename, synced = os.fsync, os.rename, set[int]()
    out = case.root / "deep" / "out"

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        assert (target, bytes_of(source)) == (out, bytes_of(case.trained))
        assert {p.stat().st_ino for p in [source, *source.rglob("*")]} <= synced
        assert out.parent.stat().st_ino not in synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    folders.apply(case.base, case.patch, out)
    assert out.parent.stat().st_ino in synced
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([0, 1, 3]),
    st.lists(
        st.tuples(
            st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E5M2"]),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_apply_of_diff_is_trained_and_revert_is_base_for_any_model(
    seed: int, density: float, shards: int, kinds: list[tuple[str, tuple[int, ...]]]
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        width = 8 * BITS[dtype].itemsize
        bits = rng.integers(0, 2**width - 1, math.prod(shape), BITS[dtype], endpoint=True)
        bits[:2] = [0, 1 << (width - 1)][: len(bits[:2])]  # zeros of both signs
        tensors[f"t{i}"] = (dtype, shape, bits)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        base = write_folder(root / "base", tensors, shards)
        trained = write_folder(root / "trained", step(tensors, seed, density), shards)
        patch = folders.diff(base, trained)
        folders.apply(base, patch, root / "out")
        assert bits_of(root / "out") == bits_of(trained)
        if patch.tensors:
            folders.revert(root / "out", patch, root / "back")
            assert bytes_of(root / "back") == bytes_of(base)
        old = bytes_of(base)
        folders.apply_in_place(base, patch)
        assert bits_of(base) == bits_of(trained)
        if patch.tensors:
            folders.revert_in_place(base, patch)
        assert bytes_of(base) == old


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.02, 0.3, 1.0])), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_merge_is_composition(steps: list[tuple[int, float]]) -> None:
    tensors = some_tensors()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_folder(root / "0", tensors)
        patches = []
        for i, (seed, density) in enumerate(steps):
            tensors = step(tensors, seed, density)
            write_folder(root / str(i + 1), tensors)
            patches.append(folders.diff(root / str(i), root / str(i + 1)))
        merged = folders.merge(root / "0", patches)
        direct = folders.diff(root / "0", root / str(len(steps)), {"merged": [{}] * len(steps)})
        assert merged == direct
        assert merged.encode() == direct.encode()
        if len(patches) > 2:
            paired = folders.merge(root / "0", [folders.merge(root / "0", patches[:2]), *patches[2:]])
            assert paired.tensors == merged.tensors


def test_entries_that_come_back_vanish_from_a_merged_patch(case: Case) -> None:
    back = folders.diff(case.trained, case.base)
    assert folders.merge(case.base, [case.file, back]).tensors == {}


def test_applying_copies_every_other_file_and_changes_nothing_of_the_base(case: Case) -> None:
    old = bytes_of(case.base)
    result = folders.apply(case.base, case.file, case.root / "new" / "out")
    assert (result.state, result.entries) == ("applied", case.patch.entries)
    assert bytes_of(case.base) == old
    assert bytes_of(case.root / "new" / "out") == bytes_of(case.trained)
    assert sorted(p.name for p in case.root.iterdir()) == ["base", "new", "p.safetensors", "trained"]


def test_numbers_are_those_of_the_safetensors_library(case: Case) -> None:
    folders.apply(case.base, case.patch, case.root / "out")
    for file in sorted((case.root / "out").glob("*.safetensors")):
        with (
            safetensors.safe_open(file, "numpy") as ours,
            safetensors.safe_open(case.trained / file.name, "numpy") as expected,
        ):
            assert set(ours.keys()) == set(expected.keys())
            for name in set(ours.keys()):
                if "norm" in name or "scalar" in name:  # numpy knows no bfloat16
                    a, b = ours.get_tensor(name), expected.get_tensor(name)
                    assert a.tobytes() == b.tobytes()


def test_verify_tells_base_applied_and_strangers_apart(case: Case) -> None:
    assert folders.verify(case.base, case.file).state == "base"
    assert folders.verify(case.trained, case.file, full=True).state == "applied"
    assert folders.verify(case.base, case.patch, full=True).full
    stranger = write_folder(case.root / "stranger", some_tensors(seed=5))
    with pytest.raises(WrongBase, match="neither the base 'base'") as error:
        folders.verify(stranger, case.patch)
    assert set(error.value.tensors) == set(case.patch.tensors)


def test_only_a_full_verify_sees_a_change_beside_the_touched_entries(tmp_path: Path) -> None:
    case = Case(tmp_path, density=0.02)
    for folder, state in ((case.base, "base"), (case.trained, "applied")):
        info = Checkpoint(folder).tensors["model.layers.0.weight"]
        touched = case.patch.tensors["model.layers.0.weight"].positions
        free = next(i for i in range(1024) if i not in touched)
        with open(info.file, "r+b") as file:
            file.seek(info.offset + 2 * free)
            file.write(b"\xaa\xbb")
        assert folders.verify(folder, case.patch).state == state
        with pytest.raises(WrongBase, match=r"model\.layers\.0\.weight differ elsewhere") as error:
            folders.verify(folder, case.patch, full=True)
        assert error.value.tensors == ("model.layers.0.weight",)


def test_full_verify_across_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "CHUNK_ENTRIES", 7)
    assert folders.verify(case.base, case.file, full=True).state == "base"
    assert folders.verify(case.trained, case.file, full=True).state == "applied"
    assert folders.diff(case.base, case.trained) == case.patch


def test_full_verify_needs_fingerprints(case: Case) -> None:
    bare = Patch(case.patch.tensors, BaseInfo("base", {}))
    assert folders.verify(case.base, bare).state == "base"
    with pytest.raises(PatchError, match="without --full"):
        folders.verify(case.base, bare, full=True)


def test_base_info_names_the_folder_and_every_tensor(case: Case) -> None:
    info = folders.base_info(case.base)
    assert info.name == "base"
    assert sorted(info.fingerprints) == sorted(case.tensors)
    assert info == case.patch.base
    assert folders.base_info(case.trained, "name").name == "name"
    assert folders.base_info(case.trained).fingerprint != info.fingerprint


# ------------------------------------------------------------------------------------------ refusals


def test_nothing_is_written_for_a_wrong_base(case: Case) -> None:
    stranger = write_folder(case.root / "stranger", some_tensors(seed=5))
    old = bytes_of(stranger)
    for attempt in (
        lambda: folders.apply(stranger, case.patch, case.root / "out"),
        lambda: folders.revert(stranger, case.patch, case.root / "out"),
        lambda: folders.apply_in_place(stranger, case.patch),
        lambda: folders.revert_in_place(stranger, case.patch),
        lambda: folders.merge(stranger, [case.patch]),
    ):
        with pytest.raises(WrongBase):
            attempt()
    assert bytes_of(stranger) == old
    assert not (case.root / "out").exists()


def test_applying_twice_and_reverting_a_base_are_named(case: Case) -> None:
    for apply in (
        lambda: folders.apply(case.trained, case.patch, case.root / "out"),
        lambda: folders.apply_in_place(case.trained, case.patch),
    ):
        with pytest.raises(AlreadyApplied, match="already holds"):
            apply()
    for revert in (
        lambda: folders.revert(case.base, case.patch, case.root / "out"),
        lambda: folders.revert_in_place(case.base, case.patch),
    ):
        with pytest.raises(NotApplied, match="nothing to take off"):
            revert()
    with pytest.raises(AlreadyApplied, match="first 1 of 2 patches: already holds patch 2"):
        folders.merge(case.base, [case.patch, case.patch])
    assert not (case.root / "out").exists()


def test_merging_in_the_wrong_order_or_nothing_is_refused(case: Case) -> None:
    later = write_folder(
        case.root / "later",
        step(
            {
                n: (d, s, np.array(b, BITS[d]))
                for (n, (d, s, _)), b in zip(
                    case.tensors.items(), (bits_of(case.trained)[n] for n in case.tensors), strict=True
                )
            },
            9,
            0.9,
        ),
    )
    second = folders.diff(case.trained, later)
    assert folders.merge(case.base, [case.patch, second]).tensors == folders.diff(case.base, later).tensors
    with pytest.raises(WrongBase):
        folders.merge(case.base, [second, case.patch])
    with pytest.raises(PatchError, match="no patch to merge"):
        folders.merge(case.base, [])


def test_a_half_patched_base_is_told(case: Case) -> None:
    name = "model.norm.weight"
    only = Patch({name: case.patch.tensors[name]}, case.patch.base)
    folders.apply_in_place(case.base, only)
    with pytest.raises(WrongBase, match=r"holds the patch in model\.norm\.weight but not in all"):
        folders.apply_in_place(case.base, case.patch)


def test_differences_that_miss_their_hash_write_nothing(case: Case) -> None:
    name = "model.layers.0.weight"
    good = case.patch.tensors[name]
    bad = replace(good, difference=good.difference ^ np.uint16(0x10))
    old = bytes_of(case.base)
    with pytest.raises(DamagedPatch, match="fetch it again"):
        folders.apply_in_place(case.base, Patch({name: bad}, case.patch.base))
    assert bytes_of(case.base) == old


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"has no tensor model\.norm\.weight"),
        (
            lambda t: t.update({"model.norm.weight": ("F32", (4, 4), t["model.norm.weight"][2])}),
            r"is F32 \[4, 4\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": ("I32", (16,), t["model.norm.weight"][2])}),
            r"is I32 \[16\]",
        ),
    ],
)
def test_tensors_of_another_kind_are_named(case: Case, change: Callable[[Any], Any], message: str) -> None:
    tensors = dict(case.tensors)
    change(tensors)
    other = write_folder(case.root / "other", tensors)
    with pytest.raises(WrongBase, match=message):
        folders.verify(other, case.patch)
    with pytest.raises(PatchError, match=r"model\.norm\.weight"):
        folders.diff(case.base, other)
    with pytest.raises(PatchError, match=r"model\.norm\.weight"):
        folders.diff(other, case.base)


def tied(tensors: Tensors, head: bool, equal: bool = True) -> Tensors:
    dtype, shape, bits = tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": (dtype, shape, bits if equal else bits ^ np.uint16(1))}
    return {**tensors, **(extra if head else {})}


def test_a_tied_head_may_be_in_one_folder_alone(tmp_path: Path) -> None:
    before, after = some_tensors(), step(some_tensors(), 1, 0.1)
    bare = write_folder(tmp_path / "bare", tied(before, head=False))
    whole = write_folder(tmp_path / "whole", tied(before, head=True))
    bare_after = write_folder(tmp_path / "bare after", tied(after, head=False))
    whole_after = write_folder(tmp_path / "whole after", tied(after, head=True))
    assert folders.diff(bare, whole_after).tensors == folders.diff(bare, bare_after).tensors
    folders.apply(whole, folders.diff(whole, bare_after), tmp_path / "out")
    assert bits_of(tmp_path / "out") == bits_of(whole_after)
    untied = write_folder(tmp_path / "untied", tied(after, head=True, equal=False))
    for a, b in ((bare, untied), (untied, bare)):
        with pytest.raises(PatchError, match=r"lacks lm_head\.weight"):
            folders.diff(a, b)


def test_output_folders_are_never_overwritten_without_force(case: Case) -> None:
    out = case.root / "out"
    folders.apply(case.base, case.patch, out)
    (out / "note").write_text("mine")
    with pytest.raises(InputError, match="exists; give another folder, or --force"):
        folders.apply(case.base, case.patch, out)
    assert (out / "note").exists()
    folders.apply(case.base, case.patch, out, force=True)
    assert bytes_of(out) == bytes_of(case.trained)
    home = case.root / "home"
    home.mkdir()
    (home / "diary").write_text("mine")
    with pytest.raises(InputError, match="is not a checkpoint's folder"):
        folders.apply(case.base, case.patch, home, force=True)
    assert (home / "diary").exists()
    for inside in (case.base, case.base / "out", case.root):
        with pytest.raises(InputError, match="is, holds or lies within"):
            folders.apply(case.base, case.patch, inside, force=True)
    assert bits_of(case.base) != bits_of(case.trained)


def test_a_failure_while_writing_leaves_no_trace(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(undo, "sync_file", full)
    before = sorted(p.name for p in case.root.iterdir())
    with pytest.raises(OSError, match="No space"):
        folders.apply(case.base, case.patch, case.root / "out")
    assert sorted(p.name for p in case.root.iterdir()) == before


def test_links_are_not_changed_in_place(case: Case) -> None:
    linked = case.root / "linked"
    shutil.copytree(case.base, linked)
    for file in linked.glob("*.safetensors"):
        file.unlink()
        file.symlink_to(case.base / file.name)
    with pytest.raises(InputError, match="is a link to a file that others share"):
        folders.apply_in_place(linked, case.patch)
    folders.apply(linked, case.patch, case.root / "out")
    assert bits_of(case.root / "out") == bits_of(case.trained)
    assert bits_of(case.base) != bits_of(case.trained)


# ------------------------------------------------------------------------------------------ reading


def test_folders_without_safetensors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the folder"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match=r"holds no weights; only safetensors is supported"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds pytorch_model\.bin; only safetensors .*save_pretrained"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        Checkpoint(tmp_path / "pytorch_model.bin")


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4], **changes}}


HEADERS: dict[str, tuple[Any, str]] = {
    "a list": ([], "no JSON object"),
    "no shape": ({"w": {"dtype": "BF16"}}, "is described by"),
    "a shape that does not fit": (entry(shape=[3]), "in 4 bytes"),
    "a negative shape": (entry(shape=[-1, -2]), "has shape"),
    "an offset before the data": (entry(data_offsets=[-4, 0]), "has shape"),
    "an offset beyond the data": (entry(data_offsets=[4, 8]), "overlap or leave gaps"),
    "fewer bytes than there are": (entry(shape=[1], data_offsets=[0, 2]), "its header says"),
    "more bytes than there are": (entry(shape=[2**40], data_offsets=[0, 2**41]), "its header says"),
    "tensors that overlap": ({**entry(), "v": entry()["w"]}, "overlap or leave gaps"),
    "an unknown dtype": (entry(dtype="F4"), "w is F4; supported are"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_safetensors_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    header, message = HEADERS[kind]
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"abcd")
    with pytest.raises(InputError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"abc", struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 4) + b"{x}}"]
)
def test_a_file_without_a_header_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="fetch the checkpoint again"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index"),
        ("{}", "is no index"),
        ('{"weight_map": {"w": "../model-0.safetensors"}}', "expected a file beside it"),
        ('{"weight_map": {"w": 3}}', "is no index"),
        ('{"weight_map": {"w": "model-0.safetensors"}}', "lacks w"),
        ('{"weight_map": {"w": "none.safetensors"}}', "cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "sharded", some_tensors(), shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        Checkpoint(folder)


# ------------------------------------------------------------------------------------------ memory

MEASURE = """
import resource, sys
from frugal_rl import checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
patch = checkpoint.diff(sys.argv[1], sys.argv[2])
checkpoint.apply(sys.argv[1], patch, sys.argv[3])
checkpoint.verify(sys.argv[3], patch, full=True)
checkpoint.revert_in_place(sys.argv[3], patch)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_is_a_few_tensors_and_never_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, 4 * 2**20).astype("u2")  # 8 MiB; the model has 20 of them
    tensors = {f"t{i:02}": ("BF16", (2048, 2048), bits) for i in range(20)}
    base = write_folder(tmp_path / "base", tensors, 2)
    trained = write_folder(tmp_path / "trained", step(tensors, 1, 0.001), 2)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, base, trained, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert int(result.stdout) < 6 * bits.nbytes
