"""The learner's kernels against the plain path, bit for bit, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from frugal_rl.checkpoint import Checkpoint
from frugal_rl.decoder import Decoder
from frugal_rl.kernels import choice
from frugal_rl.learn import Learner
from frugal_rl.storage import Changed, Overlay, Quantised, Streamed, bits_of
from frugal_rl.stream import Source
from frugal_rl.weights import Transaction, Weights

from .conftest import make_config, make_model, make_rollouts, needs_triton, weights_of

pytestmark = needs_triton
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (5, 33), (2, 2049)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Runs the kernels, or `kernels("plain")` the plain path, from now on."""

    def choose(path: str) -> None:
        monkeypatch.setenv(choice.CHOICE, path)

    return choose


def random_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def some_positions(count: int, share: float, seed: int = 0) -> Tensor:
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share
    return torch.nonzero(chosen).view(-1).to(DEVICE)


def quantised(shape: tuple[int, int], share: float, dtype: torch.dtype = torch.bfloat16) -> Quantised:
    """Random codes, steps of very different sizes, and `share` of the entries changed to any numbers."""
    weight_OI = random_of(*shape) * 8.0 ** (torch.arange(shape[0], device=DEVICE)[:, None] % 5 - 2)
    weight_OI[shape[0] // 2] = 0  # a row of zeros
    held = Quantised.empty(shape, DEVICE, dtype)
    held.quantise_rows_(0, weight_OI)
    position_N = some_positions(weight_OI.numel(), share)
    held.overlay = Overlay(position_N, bits_of(random_of(len(position_N), seed=3).to(dtype)))
    return held


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dequantised_matrix_has_the_bits_of_the_plain_path(kernels, shape, share, dtype) -> None:
    held = quantised(shape, share, dtype)
    outs = []
    for path in ("plain", "triton"):
        kernels(path)
        out = torch.empty(shape, dtype=dtype if dtype != torch.float16 else torch.float32, device=DEVICE)
        outs.append((held.copy_to_(out), held.rows(slice(shape[0] // 3, shape[0]), dtype)))
    for plain, fused in zip(*outs, strict=True):
        assert torch.equal(bits_of(plain), bits_of(fused))


def test_a_change_of_the_overlay_is_seen(kernels) -> None:
    held = quantised((6, 50), 0.1)
    kernels("triton")
    held.rows(slice(0, 6), torch.bfloat16)
    position_M = some_positions(300, 0.3, seed=5)
    held.overlay.put_(position_M, bits_of(random_of(len(position_M)).bfloat16()), overwrite=True)
    after = held.rows(slice(0, 6), torch.bfloat16)
    kernels("plain")
    assert torch.equal(bits_of(after), bits_of(held.rows(slice(0, 6), torch.bfloat16)))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_rounding_is_to_nearest_even_for_every_sign_size_and_tie(kernels) -> None:
    """Codes of +-127 and 1 / 127 leave absmax as it is, or next to it: all bit patterns near ties."""
    exponent = torch.tensor([1, 2, 9, 112, 120, 127, 200, 254], device=DEVICE)[:, None] << 23
    low = torch.tensor([0x0, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF], device=DEVICE)
    absmax_O = (exponent | low).int().view(torch.float32).view(-1)
    code_OI = torch.tensor([[127, -127, 1, 0]], dtype=torch.int8, device=DEVICE).repeat(len(absmax_O), 1)
    for dtype in DTYPES:
        held = Quantised(code_OI, absmax_O, dtype)
        found = []
        for path in ("plain", "triton"):
            kernels(path)
            found.append(bits_of(held.rows(slice(0, len(absmax_O)), dtype)))
        assert torch.equal(*found)


def three_forms(shape: tuple[int, ...], folder: Path) -> dict[str, Weights]:
    """The same policy whole in each format, in int8 with changed entries, and streamed from a checkpoint."""
    forms = {}
    for dtype in DTYPES:
        forms[f"whole {dtype}"] = Weights({"w": (random_of(*shape) * 0.02).to(dtype)})
    if len(shape) == 2:
        for share in (0.0, 0.02, 1.0) if shape[1] < 100 else (0.001,):  # the interpreter is slow
            held = quantised(shape, share)
            held.code_OI[torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3] = 0
            forms[f"int8 {share}"] = Weights({"w": held})
        tensor = (random_of(*shape) * 0.02).bfloat16()
        file = folder / "model.safetensors"
        save_file({"w": tensor.cpu()}, file)
        source = Source(Checkpoint(folder).tensors["w"], torch.bfloat16)
        streamed = Streamed(source, DEVICE)
        position_N = some_positions(tensor.numel(), 0.1)
        streamed.write_(
            Changed(
                position_N,
                bits_of(tensor)[position_N],
                bits_of(random_of(len(position_N), seed=3).bfloat16()),
            )
        )
        streamed.arrive_(tensor)
        forms["streamed"] = Weights({"w": streamed})
    return forms


def proposed(weights: Weights, gradient: Tensor, lr: float, **rows: Any) -> tuple[list[Tensor], float]:
    """What waits for the commit, all of it as integers, and the square of the norm."""
    transaction = Transaction(weights, lr, None)
    transaction.propose("w", gradient, **rows)
    chunks = transaction._proposed["w"]
    parts = [torch.cat([chunk[i] for chunk in chunks]) for i in range(3)]
    assert transaction._square is not None
    return [parts[0].long(), bits_of(parts[1]), parts[2]], float(transaction._square)


@pytest.mark.parametrize("shape", [(5,), (1, 1), (5, 33), (2, 2049)])
@pytest.mark.parametrize("lr", [1e-6, 1e-3, 1e3])
def test_what_is_proposed_is_what_the_plain_path_proposes(kernels, tmp_path, shape, lr) -> None:
    gradient = random_of(*shape, seed=7)
    gradient[0] = 0
    for form, weights in three_forms(shape, tmp_path).items():
        kernels("plain")
        plain, square = proposed(weights, gradient, lr)
        kernels("triton")
        fused, fused_square = proposed(weights, gradient, lr)
        assert all(map(torch.equal, plain, fused)), form
        assert fused_square == pytest.approx(square, rel=1e-6), form
        assert bool((fused[0][1:] > fused[0][:-1]).all())
        count = len(fused[0])
        assert count < gradient.numel() * 0.9 if lr == 1e-6 else count or gradient.numel() < 5


@pytest.mark.parametrize("row_R", [None, [0, 4, 5]])
def test_some_rows_are_proposed_as_by_the_plain_path(kernels, tmp_path, row_R) -> None:
    rows = {"first_row": 2} if row_R is None else {"row_R": torch.tensor(row_R, device=DEVICE)}
    gradient = random_of(3, 40, seed=1)
    for form, weights in three_forms((6, 40), tmp_path).items():
        kernels("plain")
        plain, _ = proposed(weights, gradient, 1e-3, **rows)
        kernels("triton")
        fused, _ = proposed(weights, gradient, 1e-3, **rows)
        assert all(map(torch.equal, plain, fused)), form
        assert len(fused[0])


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_commits_the_changes_of_the_plain_path(kernels, clip) -> None:
    """Several tensors, over several steps: the overlay of one is what the next lies on."""
    results = []
    for path in ("plain", "triton"):
        kernels(path)
        tensor = (random_of(4, 50) * 0.02).bfloat16()
        weights = Weights({"a": tensor, "b": tensor[0].clone(), "w": quantised((4, 33), 0.1)})
        changed = []
        for seed in range(2):
            transaction = Transaction(weights, 0.01, clip)
            for name, held in weights.held.items():
                transaction.propose(name, random_of(*held.shape, seed=seed))
            commit = transaction.commit()
            assert (commit.scale < 1) == (clip is not None)
            changed.append(commit.changed)
        results.append(changed)
    for plain, fused in zip(*results, strict=True):
        assert plain.keys() == fused.keys()
        for name in plain:
            for part in ("position_N", "before_bits_N", "after_bits_N"):
                assert torch.equal(getattr(plain[name], part), getattr(fused[name], part))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_drops_the_step(kernels, bad) -> None:
    kernels("triton")
    weights = Weights({"a": random_of(6, 40).bfloat16(), "w": quantised((6, 40), 0.1)})
    transaction = Transaction(weights, 0.1, 1.0)
    for name in weights.held:
        gradient = random_of(6, 40)
        gradient[2, 3] = bad
        transaction.propose(name, gradient)
    assert transaction.commit().dropped


def test_a_gradient_of_zero_changes_nothing(kernels, tmp_path) -> None:
    kernels("triton")
    for form, weights in three_forms((4, 40), tmp_path).items():
        transaction = Transaction(weights, 1e3, None)
        transaction.propose("w", torch.zeros(4, 40, device=DEVICE))
        # entries that someone has put off the grid are proposed, back onto it
        assert form == "int8 1.0" or not len(transaction._proposed["w"][0][0])
        commit = transaction.commit()
        assert commit.norm == 0 and not commit.changed


def test_a_bf16_gradient_is_read_as_it_is(kernels) -> None:
    weights, gradient = Weights({"w": random_of(5, 40).bfloat16()}), random_of(5, 40, seed=1).bfloat16()
    kernels("triton")
    fused, square = proposed(weights, gradient, 0.01)
    wide, wide_square = proposed(weights, gradient.float(), 0.01)
    assert all(map(torch.equal, fused, wide)) and square == wide_square


def test_the_kernels_compile_for_the_gpus_that_are_meant(tmp_path: Path) -> None:
    """Without a GPU: machine code by ptxas, and no product of the update rule is fused into its sum."""
    root = Path(__file__).parent.parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), "86", "89", "90", "120"],
        env={
            **environment,
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(root),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16
    assert all(line.endswith(" 0 fused multiply-adds") for line in lines)


def test_a_learners_step_with_the_kernels_changes_what_it_changes_without(kernels) -> None:
    """int8 matrices with changed entries, and a tied head, whose rows are proposed by number."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    model = make_model(make_config("qwen2", layers=1, num_key_value_heads=1, **sizes)).bfloat16()
    results = []
    for path in ("plain", "triton"):
        kernels(path)
        tensors = {k: t.to(DEVICE) for k, t in weights_of(model).tensors.items()}
        held = {k: Quantised.of(t) if t.ndim == 2 else t for k, t in tensors.items()}
        weights = Weights(held, compute_dtype=torch.float32)
        for low in (h for h in weights.held.values() if isinstance(h, Quantised)):
            position_N = some_positions(low.code_OI.numel(), 0.05)
            low.overlay = Overlay(position_N, bits_of(random_of(len(position_N), seed=3).bfloat16()))
        learner = Learner(Decoder(model.config, weights), 0.05, None, 1.0, 60)
        step = learner.step(make_rollouts(3), lambda logprob_BT: (logprob_BT.mean(), {}))
        assert step.commit.entries > 50
        results.append(step.commit.changed)
    plain, fused = results
    assert plain.keys() == fused.keys()
    for name, entries in plain.items():
        assert torch.equal(entries.position_N, fused[name].position_N)
        assert torch.equal(entries.after_bits_N, fused[name].after_bits_N)
