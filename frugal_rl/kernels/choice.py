"""GPU kernels in Triton, each beside the plain PyTorch that gives the same numbers within rounding.

A caller asks `use_triton(device)` and imports the module of its kernel only then: without a GPU nothing
here needs the triton package. The environment variable FRUGAL_RL_KERNELS says which path runs:

- auto (default): the kernels on a CUDA device of compute capability 8.0 or more, else plain PyTorch;
- plain: plain PyTorch everywhere;
- triton: the kernels, on a CPU too if TRITON_INTERPRET=1 was set before the start (slow: for tests).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from shutil import which

import torch

from ..errors import InputError

CHOICE = "FRUGAL_RL_KERNELS"
CHOICES = ("auto", "plain", "triton")
LEAST_CAPABILITY = (8, 0)  # bf16 products and asynchronous copies


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(device: torch.device) -> bool:
    """Whether the kernels run on that device. Raises InputError where they were demanded and cannot."""
    choice = os.environ.get(CHOICE, "auto")
    if choice not in CHOICES:
        raise InputError(f"{CHOICE} is {choice!r}, expected one of {', '.join(CHOICES)}")
    if choice == "plain":
        return False
    missing = _missing(device)
    if choice == "triton" and missing:
        raise InputError(f"{CHOICE}=triton, but {missing}; set {CHOICE}=auto or plain")
    runs = not missing and (choice == "triton" or not interpreted())
    if runs and device.type == "cuda" and not has_compiler():
        raise InputError(
            "Triton's kernels need a C compiler, to be launched with, and there is none: install gcc (and "
            f"Python's headers), or set {CHOICE}=plain, which is slower"
        )
    return runs


@cache
def has_compiler() -> bool:
    """What Triton looks for: CC, clang, gcc (triton/runtime/build.py)."""
    return "CC" in os.environ or any(map(which, ("clang", "gcc")))


def _missing(device: torch.device) -> str | None:
    """What the kernels lack on that device."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the weights are on {device.type} and TRITON_INTERPRET=1 is not set"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}, below 8.0"
    return None
