"""A patch on the parameters of a live `torch.nn.Module`, on any device.

Law: apply_patch(model, p) gives the parameters the bits that applying p to the model's folder would;
revert_patch takes them back, bit for bit.
Invariants: touched entries are compared with the patch's hashes before any is written; parameters
that share storage (tied embeddings) must change alike; only touched entries leave their device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from frugal_rl.container import some
from frugal_rl.patch import BITS, AlreadyApplied, NotApplied, Patch, PatchError, TensorPatch, WrongBase

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = npt.NDArray[Any]


def apply_patch(model: nn.Module, patch: Patch | str | os.PathLike[str]) -> nn.Module:
    """Apply a patch (or the file of one) to a model's parameters, in place; returns the model.

    The model must hold the patch's own dtypes: load it with dtype="auto". Raises WrongBase,
    AlreadyApplied, DamagedPatch; then no parameter has changed.
    """
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    entries = _touched(model, patch)
    if _state(entries, patch) == "applied":
        raise AlreadyApplied(f"the model already holds the patch for {patch.base.name!r}")
    _write_(entries, {name: patch.tensors[name].applied(entry.bits_N()) for name, entry in entries.items()})
    return model


def revert_patch(model: nn.Module, patch: Patch | str | os.PathLike[str]) -> nn.Module:
    """Take a patch off a model's parameters, in place; returns the model. Raises NotApplied, WrongBase."""
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    entries = _touched(model, patch)
    if patch.tensors and _state(entries, patch) == "base":
        raise NotApplied(f"the model is the base {patch.base.name!r} itself; there is nothing to take off")
    _write_(entries, {name: patch.tensors[name].reverted(entry.bits_N()) for name, entry in entries.items()})
    return model


@contextlib.contextmanager
def patched(model: nn.Module, patch: Patch | str | os.PathLike[str]) -> Iterator[nn.Module]:
    """The model with a patch, taken off again at the end. Raises WrongBase where its entries changed."""
    patch = patch if isinstance(patch, Patch) else Patch.load(patch)
    apply_patch(model, patch)
    try:
        yield model
    finally:
        revert_patch(model, patch)


class _Entries:
    """The entries of one parameter that a patch touches."""

    def __init__(self, name: str, parameter: torch.Tensor, tensor: TensorPatch) -> None:
        if parameter.is_meta:
            raise PatchError(f"the model's {name} is on the meta device; load its weights first")
        expected = DTYPES.get(tensor.dtype)
        if (parameter.dtype, tuple(parameter.shape)) != (expected, tensor.shape):
            raise WrongBase(
                f"the model's {name} is {parameter.dtype} {list(parameter.shape)}, the patch is for "
                f'{tensor.dtype} {list(tensor.shape)}; load the model with dtype="auto"',
                [name],
            )
        self.unsigned = BITS[tensor.dtype]
        integers = parameter.detach().view(SIGNED[self.unsigned.itemsize])
        flat = torch.from_numpy(np.array(tensor.positions)).to(parameter.device)
        self.storage = _storage(parameter)
        if integers.is_contiguous():
            self.view, self.index = integers.view(-1), [flat]
        else:
            self.view, self.index = integers, list(torch.unravel_index(flat, parameter.shape))

    def bits_N(self) -> Array:
        """Syncs."""
        return np.asarray(self.view[tuple(self.index)].cpu().numpy().view(self.unsigned))

    def write_(self, bits_N: Array) -> None:
        signed = torch.from_numpy(np.array(bits_N).view(f"<i{self.unsigned.itemsize}"))
        self.view[tuple(self.index)] = signed.to(self.view.device)


def _touched(model: nn.Module, patch: Patch) -> dict[str, _Entries]:
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the module whose names count
    found = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    missing = [name for name in patch.tensors if name not in found]
    if missing:
        raise WrongBase(
            f"the model has no parameter {some(missing)}, which the patch for {patch.base.name!r} changes; "
            "give a model of the same architecture, loaded by the class that its config names",
            missing,
        )
    entries = {name: _Entries(name, found[name], tensor) for name, tensor in patch.tensors.items()}
    _check_tied(entries, {name: found[name] for name in patch.base.fingerprints if name in found}, patch)
    return entries


def _storage(parameter: torch.Tensor) -> tuple[Any, ...]:
    return parameter.data_ptr(), parameter.device


def _check_tied(entries: dict[str, _Entries], others: dict[str, torch.Tensor], patch: Patch) -> None:
    """Tensors that are one in the model must change alike, or writing one would change the other wrongly."""
    storages = {name: _storage(parameter) for name, parameter in others.items()}
    storages.update({name: entry.storage for name, entry in entries.items()})
    for name, entry in entries.items():
        for other, storage in storages.items():
            if storage == entry.storage and patch.tensors.get(other) != patch.tensors[name]:
                raise WrongBase(
                    f"the model ties {name} and {other}, which the patch changes differently; "
                    "load the model untied (tie_word_embeddings=False)",
                    [name, other],
                )


def _state(entries: dict[str, _Entries], patch: Patch) -> str:
    return patch.state_of(lambda name: entries[name].bits_N(), "the model")


def _write_(entries: dict[str, _Entries], bits: dict[str, Array]) -> None:
    for name, entry in entries.items():
        entry.write_(bits[name])
