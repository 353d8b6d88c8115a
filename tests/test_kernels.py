"""Which kernels run."""

from __future__ import annotations

import pytest
import torch

from frugal_rl.errors import InputError
from frugal_rl.kernels import choice

from .conftest import needs_triton

CPU = torch.device("cpu")


def test_a_cpu_runs_plain_pytorch_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv(choice.CHOICE, raising=False)
    assert not choice.use_triton(CPU)
    monkeypatch.setenv(choice.CHOICE, "plain")
    assert not choice.use_triton(CPU)


@needs_triton
def test_the_interpreter_runs_the_kernels_on_a_cpu_when_they_are_demanded(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(choice.CHOICE, "triton")
    assert choice.use_triton(CPU)


@needs_triton
def test_kernels_demanded_where_they_cannot_run_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(choice.CHOICE, "triton")
    with pytest.raises(InputError, match=r"weights are on cpu.*set FRUGAL_RL_KERNELS=auto or plain"):
        choice.use_triton(CPU)


def test_kernels_demanded_without_triton_are_refused(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    monkeypatch.setenv(choice.CHOICE, "triton")
    with pytest.raises(InputError, match="package triton is not installed"):
        choice.use_triton(CPU)


@pytest.mark.parametrize(
    ("capability", "runs"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)]
)
def test_a_gpu_runs_the_kernels_from_capability_8(monkeypatch, capability, runs):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(choice.CHOICE, raising=False)
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choice, "has_compiler", lambda: True)
    assert choice.use_triton(torch.device("cuda")) == runs


def test_a_gpu_without_a_c_compiler_is_told_before_a_kernel_is_launched(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(choice.CHOICE, raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for found, runs in (("gcc", True), ("clang", True), (None, False)):
        choice.has_compiler.cache_clear()
        monkeypatch.setattr(choice, "which", lambda name, found=found: found if name == found else None)
        if runs:
            assert choice.use_triton(torch.device("cuda"))
            continue
        with pytest.raises(InputError, match=r"install gcc.*FRUGAL_RL_KERNELS=plain"):
            choice.use_triton(torch.device("cuda"))
        monkeypatch.setenv(choice.CHOICE, "plain")
        assert not choice.use_triton(torch.device("cuda"))
    choice.has_compiler.cache_clear()


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv(choice.CHOICE, "fast")
    with pytest.raises(InputError, match="'fast', expected one of auto, plain, triton"):
        choice.use_triton(CPU)
