"""A patch on a GGUF: the file that the patched checkpoint converts to, and back, byte for byte."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from frugal_rl import checkpoint, undo
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.cli import cli
from frugal_rl.errors import InputError
from frugal_rl.gguf import change
from frugal_rl.gguf.file import Gguf, write
from frugal_rl.gguf.formats import FORMATS
from frugal_rl.gguf.write import convert
from frugal_rl.models import find_model
from frugal_rl.patch import AlreadyApplied, BaseInfo, NotApplied, Patch, WrongBase

from .conftest import KINDS, make_config, make_model

TYPES = ("q8_0", "bf16", "f16", "f32")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class Case:
    """A base, a training of it, the patch between the two, and a GGUF of each."""

    folder: Path
    kind: str = "llama"
    form: str = "q8_0"
    dtype: str = "BF16"
    tied: bool = False
    density: float = 0.01

    def __post_init__(self) -> None:
        config = make_config(self.kind, tied=self.tied, layers=2, intermediate_size=96)
        model = make_model(config, dtype=DTYPES[self.dtype])
        if self.kind == "llama":  # numbers that float16 rounds
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(1e-6)
        model.save_pretrained(self.folder / "base")
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                chosen = torch.rand(parameter.shape) < self.density
                parameter[chosen] = (parameter[chosen].float() * 1.01 + 1e-4).to(parameter.dtype)
        model.save_pretrained(self.folder / "trained")
        self.base = self.folder / "base"
        self.patch = checkpoint.diff(self.base, self.folder / "trained", name="some base")
        self.file, self.expected = self.folder / "base.gguf", self.folder / "trained.gguf"
        convert(find_model(str(self.base)), self.file, self.form, None)
        convert(find_model(str(self.folder / "trained")), self.expected, self.form, None)
        # equal but for the name that each has of its folder
        self.original = self.file.read_bytes()

    def tensors(self, path: Path) -> dict[str, bytes]:
        gguf = Gguf.read(path)
        return {name: gguf.blocks(tensor, "r").tobytes() for name, tensor in gguf.tensors.items()}

    def is_trained(self, path: Path) -> bool:
        return self.tensors(path) == self.tensors(self.expected) != self.tensors_of_base()

    def tensors_of_base(self) -> dict[str, bytes]:
        copy = self.folder / "original.gguf"
        copy.write_bytes(self.original)
        return self.tensors(copy)


def never(name: str) -> Path:
    raise InputError(f"nobody has {name}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", TYPES)
def test_applied_to_a_gguf_it_is_the_gguf_of_the_patched_checkpoint(
    kind: str, form: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, kind, form, tied=kind == "qwen2")
    assert change.verify(case.file, case.patch, case.base, full=True).state == "base"
    assert change.apply(case.file, case.patch, case.base).state == "applied"
    assert case.is_trained(case.file)
    assert change.verify(case.file, case.patch, case.base, full=True).state == "applied"
    assert change.revert(case.file, case.patch, case.base).state == "base"
    assert case.file.read_bytes() == case.original


@pytest.mark.parametrize("dtype", ["F16", "F32"])
@pytest.mark.parametrize("form", TYPES)
def test_checkpoints_in_other_formats_are_patched_as_exactly(dtype: str, form: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", form, dtype)
    change.apply(case.file, case.patch, case.base)
    assert case.is_trained(case.file)
    change.revert(case.file, case.patch, case.base)
    assert case.file.read_bytes() == case.original


@pytest.mark.parametrize(
    ("form", "dtype"), [("bf16", "BF16"), ("f32", "BF16"), ("f16", "F16"), ("f32", "F16"), ("f32", "F32")]
)
def test_formats_without_rounding_need_no_base(form: str, dtype: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", form, dtype)
    change.apply(case.file, case.patch, never)
    assert case.is_trained(case.file)
    change.revert(case.file, case.patch, never)
    assert case.file.read_bytes() == case.original


def test_rounded_numbers_need_the_base_and_the_message_says_how(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(InputError, match=r"nobody has some base; give its folder with --base"):
        change.apply(case.file, case.patch, never)
    with pytest.raises(InputError, match=r"trained: is not the base of this patch"):
        change.apply(case.file, case.patch, tmp_path / "trained")
    assert case.file.read_bytes() == case.original


def test_a_copy_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    case = Case(tmp_path)
    out = tmp_path / "deep" / "new.gguf"
    change.apply(case.file, case.patch, case.base, out=out)
    assert case.is_trained(out) and case.file.read_bytes() == case.original
    with pytest.raises(InputError, match="exists; give another name, or --force"):
        change.apply(case.file, case.patch, case.base, out=out)
    change.apply(case.file, case.patch, case.base, out=out, force=True)
    for change_it, file, error in (
        (change.apply, out, AlreadyApplied),
        (change.revert, case.file, NotApplied),
    ):
        with pytest.raises(error):
            change_it(file, case.patch, case.base, out=tmp_path / "not.gguf")
    assert not (tmp_path / "not.gguf").exists()
    back = tmp_path / "back.gguf"
    change.revert(out, case.patch, case.base, out=back)
    assert back.read_bytes() == case.original
    for bad, why in ((case.file, "is the file itself"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=why):
            change.apply(case.file, case.patch, case.base, out=bad)


@pytest.mark.parametrize("form", ["q8_0", "bf16"])
def test_applying_twice_and_taking_off_a_base_are_named(form: str, tmp_path: Path) -> None:
    case = Case(tmp_path, form=form)
    with pytest.raises(NotApplied, match="nothing to take off"):
        change.revert(case.file, case.patch, case.base)
    change.apply(case.file, case.patch, case.base)
    with pytest.raises(AlreadyApplied):
        change.apply(case.file, case.patch, case.base)
    assert case.is_trained(case.file)


@pytest.mark.parametrize("form", ["q8_0", "f16", "bf16", "f32"])
def test_one_other_block_under_the_patch_is_another_base(form: str, tmp_path: Path) -> None:
    case = Case(tmp_path, form=form)
    gguf = Gguf.read(case.file)
    tensor = gguf.tensors["blk.1.ffn_gate.weight"]
    own = case.patch.tensors["model.layers.1.mlp.gate_proj.weight"].positions[0]
    gguf.blocks(tensor, "r+")[own // FORMATS[form.upper()].block, -1] ^= 1
    for full in (False, True):
        with pytest.raises(WrongBase, match=r"touched blocks of blk\.1\.ffn_gate\.weight differ"):
            change.verify(case.file, case.patch, case.base, full=full)
    damaged = case.file.read_bytes()
    with pytest.raises(WrongBase):
        change.apply(case.file, case.patch, case.base)
    assert case.file.read_bytes() == damaged


def test_only_a_full_verify_sees_a_change_beside_the_touched_blocks(tmp_path: Path) -> None:
    case = Case(tmp_path, density=0.002)
    gguf = Gguf.read(case.file)
    touched = {p // 32 for p in case.patch.tensors["model.layers.1.mlp.gate_proj.weight"].positions}
    other = next(block for block in range(100) if block not in touched)
    gguf.blocks(gguf.tensors["blk.1.ffn_gate.weight"], "r+")[other, 5] ^= 1
    assert change.verify(case.file, case.patch, case.base).state == "base"
    with pytest.raises(
        WrongBase, match=r"1 blocks of blk\.1\.ffn_gate\.weight that the patch does not touch"
    ):
        change.verify(case.file, case.patch, case.base, full=True)


def test_a_half_patched_file_is_told(tmp_path: Path) -> None:
    case = Case(tmp_path, form="bf16")
    patched = Gguf.read(case.expected)
    target = Gguf.read(case.file)
    name = "blk.0.attn_v.weight"
    target.blocks(target.tensors[name], "r+")[:] = patched.blocks(patched.tensors[name], "r")
    with pytest.raises(WrongBase, match=rf"holds the patch in {name} but not in all"):
        change.verify(case.file, case.patch, case.base)


def test_a_k_quant_is_refused_by_name_with_what_would_do(tmp_path: Path) -> None:
    case = Case(tmp_path)
    data = bytearray(case.original)
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at : at + 4] == (8).to_bytes(4, "little")
    data[at : at + 4] = (12).to_bytes(4, "little")
    case.file.write_bytes(data)
    with pytest.raises(InputError, match=r"blk\.0\.attn_v\.weight is Q4_K; .*llama-quantize"):
        change.apply(case.file, case.patch, case.base)
    assert case.file.read_bytes() == data


def test_one_part_of_a_file_is_refused_with_what_would_do(tmp_path: Path) -> None:
    case = Case(tmp_path)
    write(case.file, {"general.architecture": (8, "llama"), "split.count": (2, 3)}, [])
    with pytest.raises(InputError, match=r"is one of 3 parts of a GGUF; .*--merge"):
        change.apply(case.file, case.patch, case.base)


def test_a_gguf_of_another_shape_or_without_a_tensor_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    other = tmp_path / "other"
    make_model(make_config("llama", tied=False, layers=1, intermediate_size=96)).save_pretrained(other)
    convert(find_model(str(other)), tmp_path / "other.gguf", "q8_0", None)
    with pytest.raises(WrongBase, match=r"has no tensor blk\.1"):
        change.apply(tmp_path / "other.gguf", case.patch, case.base)
    wide = tmp_path / "wide"
    make_model(make_config("llama", tied=False, layers=2, intermediate_size=128)).save_pretrained(wide)
    convert(find_model(str(wide)), tmp_path / "wide.gguf", "q8_0", None)
    with pytest.raises(WrongBase, match="the patch is for"):
        change.apply(tmp_path / "wide.gguf", case.patch, case.base)


# --- tied heads


def untied_gguf(case: Case) -> None:
    """As if its converter had written the tied head out as a tensor of its own."""
    config = {**find_model(str(case.base)).config, "tie_word_embeddings": False}
    from frugal_rl.gguf.write import values_of_checkpoint, write_gguf

    for folder, path in ((case.base, case.file), (case.folder / "trained", case.expected)):
        values = values_of_checkpoint(Checkpoint(folder))
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
        write_gguf(path, config, values, case.form, name="some")
    case.original = case.file.read_bytes()


@pytest.mark.parametrize("form", ["q8_0", "bf16"])
def test_a_tied_head_written_out_changes_with_the_embedding(form: str, tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen2", form, tied=True)
    untied_gguf(case)
    change.apply(case.file, case.patch, case.base)
    assert case.is_trained(case.file)
    change.revert(case.file, case.patch, case.base)
    assert case.file.read_bytes() == case.original


def test_a_patch_that_does_not_know_whether_its_base_ties_is_refused_there(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen2", "bf16", tied=True)
    untied_gguf(case)
    step = Patch(case.patch.tensors, BaseInfo("a step", {}))
    with pytest.raises(InputError, match="does not say whether its base has one"):
        change.apply(case.file, step, case.base)


def test_a_head_that_changes_otherwise_than_its_tied_embedding_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen2", "bf16", tied=False)
    tied = Case(tmp_path / "tied", "qwen2", "bf16", tied=True)
    with pytest.raises(WrongBase, match="ties its head to its embedding"):
        change.apply(tied.file, case.patch, case.base)


# --- in place


class Stopped(Exception):
    """Stands for the process being killed."""


@pytest.mark.parametrize("direction", ["apply", "revert"])
@pytest.mark.parametrize("writes_done", [0, 1, 7])
def test_a_change_in_place_that_stops_anywhere_is_taken_back(
    direction: str, writes_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path)
    make = change.apply if direction == "apply" else change.revert
    if direction == "revert":
        change.apply(case.file, case.patch, case.base)
    before, original, count = case.file.read_bytes(), Gguf.blocks, 0

    def stopping(self: Gguf, tensor: Any, mode: str) -> np.ndarray:
        nonlocal count
        if mode == "r+":
            if count == writes_done:
                raise Stopped
            count += 1
        return original(self, tensor, mode)

    monkeypatch.setattr(Gguf, "blocks", stopping)
    with pytest.raises(Stopped):
        make(case.file, case.patch, case.base)
    monkeypatch.undo()
    assert (tmp_path / undo.UNDO_FILE).exists()
    with pytest.raises(InputError, match="was interrupted"):
        change.verify(case.file, case.patch, case.base)
    with undo.locked(tmp_path):
        assert undo.recover_(tmp_path)
    assert case.file.read_bytes() == before
    make(case.file, case.patch, case.base)
    assert not (tmp_path / undo.UNDO_FILE).exists()
    assert case.is_trained(case.file) == (direction == "apply")


def test_links_are_not_changed_in_place(tmp_path: Path) -> None:
    case = Case(tmp_path)
    (tmp_path / "soft.gguf").symlink_to(case.file)
    with pytest.raises(InputError, match="is a link"):
        change.apply(tmp_path / "soft.gguf", case.patch, case.base)
    (tmp_path / "hard.gguf").hardlink_to(case.file)
    with pytest.raises(InputError, match="is a link"):
        change.apply(case.file, case.patch, case.base)


# --- the command line


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    error = result.exception
    if isinstance(error, InputError):
        return 2, str(error)
    assert error is None or isinstance(error, SystemExit), error
    return result.exit_code, result.output


def test_commands_take_a_gguf_where_they_take_a_folder(tmp_path: Path) -> None:
    case = Case(tmp_path)
    patch = tmp_path / "p.safetensors"
    case.patch.save(patch)
    base = ("--base", case.base)
    assert "is the base of this patch" in run("patch", "verify", case.file, patch, *base, "--full")[1]
    code, text = run("patch", "apply", case.file, patch, *base, "-o", tmp_path / "new.gguf")
    assert (code, "entries of" in text) == (0, True) and case.is_trained(tmp_path / "new.gguf")
    assert run("patch", "apply", case.file, patch, *base, "--in-place")[0] == 0
    assert case.is_trained(case.file)
    assert "has this patch applied" in run("patch", "verify", case.file, patch, *base)[1]
    assert run("patch", "revert", case.file, patch, *base, "--in-place")[0] == 0
    assert case.file.read_bytes() == case.original


def test_commands_refuse_what_is_no_gguf_by_name(tmp_path: Path) -> None:
    case = Case(tmp_path)
    patch = tmp_path / "p.safetensors"
    case.patch.save(patch)
    code, text = run("patch", "apply", tmp_path / "missing.gguf", patch, "-o", tmp_path / "x.gguf")
    assert code == 2 and "missing.gguf: cannot be read" in text
    (tmp_path / "text.gguf").write_text("hello")
    code, text = run("patch", "verify", tmp_path / "text.gguf", patch)
    assert code == 2 and "is no GGUF file" in text
    code, text = run("patch", "apply", case.base, patch, "--base", case.base, "-o", tmp_path / "out")
    assert code == 2 and "--base is for a GGUF" in text


def test_the_base_is_found_by_the_name_that_the_patch_has_of_it(tmp_path: Path) -> None:
    files = find_model("tiny")
    trained = shutil.copytree(files.folder, tmp_path / "trained")
    file = trained / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    patch = checkpoint.diff(files.folder, trained, name="tiny")
    patch.save(tmp_path / "p.safetensors")
    convert(files, tmp_path / "tiny.gguf", "q8_0", None)
    assert "is the base" in run("patch", "verify", tmp_path / "tiny.gguf", tmp_path / "p.safetensors")[1]
