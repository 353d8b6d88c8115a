"""Patches on live modules: the same bits as on folders, tied parameters once, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frugal_rl.live import apply_patch, patched, revert_patch
from frugal_rl.patch import (
    AlreadyApplied,
    BaseInfo,
    DamagedPatch,
    NotApplied,
    Patch,
    PatchError,
    TensorPatch,
    WrongBase,
)

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}


class Tiny(nn.Module):
    """Embeddings, a head that may be tied to them, a parameter that is not contiguous, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8, dtype=dtype)
        self.head = nn.Linear(8, 20, bias=False, dtype=dtype)
        self.turned = nn.Parameter(torch.randn(6, 4).to(dtype).t())
        self.register_buffer("scale", torch.randn(3).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        if tied:
            self.head.weight = self.embed.weight


def bits(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.detach().cpu().contiguous().view(signed).numpy().view(f"u{size}").reshape(-1).copy()


def state(model: nn.Module) -> dict[str, list[int]]:
    return {name: bits(tensor).tolist() for name, tensor in model.state_dict().items()}


def random_patch(model: nn.Module, names: list[str], seed: int = 0, fingerprints: Any = None) -> Patch:
    """Random changes of some tensors, NaNs and zeros of both signs among them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in names:
        tensor = model.state_dict()[name]
        before = bits(tensor)
        positions = np.flatnonzero(rng.random(len(before)) < 0.3) if len(before) > 1 else np.array([0])
        after = rng.integers(0, 2 ** (8 * before.itemsize) - 1, len(positions), before.dtype)
        tensors[name] = TensorPatch.from_bits(
            NAMES[tensor.dtype], tuple(tensor.shape), positions, before[positions], after
        )
    return Patch(tensors, BaseInfo("tiny", fingerprints or {}))


ALL = ["embed.weight", "turned", "scale", "scalar"]


@pytest.mark.parametrize("dtype", list(NAMES))
def test_a_patched_module_has_the_patchs_bits_and_reverts_to_its_own(dtype: torch.dtype) -> None:
    model = Tiny(dtype)
    patch = random_patch(model, ALL)
    before = state(model)
    assert apply_patch(model, patch) is model
    after = state(model)
    for name, tensor in patch.tensors.items():
        expected = np.array(before[name], tensor.difference.dtype)
        expected[tensor.positions] += tensor.difference
        assert after[name] == expected.tolist()
    assert after["head.weight"] == after["embed.weight"]
    assert revert_patch(model, patch) is model
    assert state(model) == before


def test_a_patch_file_is_applied_without_a_warning(tmp_path: Path) -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    patch.save(tmp_path / "p.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_patch(model, tmp_path / "p.safetensors")
    with pytest.raises(AlreadyApplied):
        apply_patch(model, patch)


def test_parameters_stay_the_same_objects_that_an_optimizer_holds() -> None:
    model = Tiny()
    parameters = [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    apply_patch(model, random_patch(model, ALL))
    assert [(id(p), p.data_ptr(), p.requires_grad) for p in model.parameters()] == parameters


def test_a_patch_of_both_tied_names_is_written_once() -> None:
    model = Tiny()
    one = random_patch(model, ["embed.weight"])
    both = Patch({**one.tensors, "head.weight": one.tensors["embed.weight"]}, one.base)
    before = state(model)
    apply_patch(model, both)
    tied = state(model)
    revert_patch(model, both)
    assert state(model) == before
    apply_patch(model, one)
    assert state(model) == tied


def test_a_tied_module_refuses_a_patch_that_unties_it() -> None:
    model, untied = Tiny(), Tiny(tied=False)
    untied.head.weight.data.copy_(untied.embed.weight.data)
    known = dict.fromkeys(state(untied), "0" * 32)
    before = state(model)
    different = random_patch(untied, ["embed.weight", "head.weight"])
    one_of_two = random_patch(untied, ["head.weight"], fingerprints=known)
    for patch in (different, one_of_two):
        with pytest.raises(WrongBase, match="load the model untied"):
            apply_patch(model, patch)
        assert state(model) == before
        apply_patch(untied, patch)
        revert_patch(untied, patch)


def test_the_context_manager_takes_the_patch_off_even_after_an_error() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    before = state(model)
    with patched(model, patch) as inside:
        assert inside is model
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(KeyError), patched(model, patch):
        raise KeyError
    assert state(model) == before
    with patched(model, Patch({}, BaseInfo("tiny", {}))):
        assert state(model) == before


def test_the_context_manager_names_entries_that_were_changed_inside() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    with pytest.raises(WrongBase, match=r"touched entries of embed\.weight"), patched(model, patch):
        model.embed.weight.data.zero_()


def test_states_are_told_apart_and_nothing_is_written() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    with pytest.raises(NotApplied, match="nothing to take off"):
        revert_patch(model, patch)
    other = Tiny()
    other.scalar.data.fill_(7)
    before = state(other)
    for use in (apply_patch, revert_patch):
        with pytest.raises(WrongBase, match="touched entries of scalar differ"):
            use(other, patch)
    assert state(other) == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: m.float(),
            WrongBase,
            r'embed.weight is torch.float32 \[20, 8\], the patch is for BF16 .*dtype="auto"',
        ),
        (lambda m: m.to("meta"), PatchError, "is on the meta device"),
        (lambda m: nn.Linear(2, 2), WrongBase, r"has no parameter embed\.weight, scalar, turned"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(
    change: Callable[[nn.Module], nn.Module], error: type[PatchError], message: str
) -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    with pytest.raises(error, match=message):
        apply_patch(change(model), patch)


def test_differences_that_miss_their_hash_write_nothing() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    good = patch.tensors["scalar"]
    bad = replace(good, difference=good.difference ^ np.uint16(0x40))
    before = state(model)
    with pytest.raises(DamagedPatch):
        apply_patch(model, Patch({**patch.tensors, "scalar": bad}, patch.base))
    assert state(model) == before


def test_a_compiled_module_is_the_module() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    compiled = torch.compile(model)  # wraps; compiles only when called
    apply_patch(compiled, patch)  # type: ignore[arg-type]
    with pytest.raises(AlreadyApplied):
        apply_patch(model, patch)


def test_bits_agree_with_a_folder_that_the_patch_was_applied_to(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from frugal_rl import checkpoint

    model = Tiny(tied=False)
    for name in ("base", "trained"):
        (tmp_path / name).mkdir()
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / name / "model.safetensors"
        )
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape).to(tensor.dtype) * 1e-3)
    patch = checkpoint.diff(tmp_path / "base", tmp_path / "trained")
    model.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    apply_patch(model, patch)
    expected = load_file(tmp_path / "trained" / "model.safetensors")
    assert state(model) == {name: bits(tensor).tolist() for name, tensor in expected.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_module_on_a_gpu_is_patched_in_place() -> None:
    model = Tiny()
    patch = random_patch(model, ALL)
    expected = state(apply_patch(Tiny(), patch))
    on_gpu = Tiny().to("cuda")
    before = state(on_gpu)
    with patched(on_gpu, patch):
        assert state(on_gpu) == expected
    assert state(on_gpu) == before
