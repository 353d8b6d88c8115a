"""Reinforcement learning of all parameters of a language model on one consumer GPU.

    import frugal_rl
    frugal_rl.apply_patch(model, "patch.safetensors")       # in place, bit for bit the trained model
    with frugal_rl.patched(model, "patch.safetensors"): ...   # and off again at the end

Importing the package loads no torch; each name loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import apply, diff, merge, revert, verify
    from .config import load_recipe
    from .errors import FrugalError, InputError
    from .live import apply_patch, patched, revert_patch
    from .patch import AlreadyApplied, DamagedPatch, NotApplied, Patch, PatchError, WrongBase

_HOME = {
    "apply": "checkpoint",
    "diff": "checkpoint",
    "merge": "checkpoint",
    "revert": "checkpoint",
    "verify": "checkpoint",
    "load_recipe": "config",
    "FrugalError": "errors",
    "InputError": "errors",
    "apply_patch": "live",
    "patched": "live",
    "revert_patch": "live",
    "AlreadyApplied": "patch",
    "DamagedPatch": "patch",
    "NotApplied": "patch",
    "Patch": "patch",
    "PatchError": "patch",
    "WrongBase": "patch",
}

__all__ = [
    "AlreadyApplied",
    "DamagedPatch",
    "FrugalError",
    "InputError",
    "NotApplied",
    "Patch",
    "PatchError",
    "WrongBase",
    "apply",
    "apply_patch",
    "diff",
    "load_patch",
    "load_recipe",
    "merge",
    "patched",
    "revert",
    "revert_patch",
    "verify",
]


def load_patch(path: str) -> Patch:
    """Read and check a patch file. Raises PatchError."""
    from .patch import Patch

    return Patch.load(path)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'frugal_rl' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
