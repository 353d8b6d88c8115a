"""Norms, rotations and gates in one launch each, against what transformers computes step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from frugal_rl.generate import graphs
from frugal_rl.generate.engine import Engine
from frugal_rl.kernels import choice
from frugal_rl.rollout import Request

from .conftest import needs_triton
from .test_kernel_sampling import DEVICE, check, make_decoder

pytestmark = needs_triton
# the interpreter cuts float32 to bf16 instead of rounding it
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


def near(got: Tensor, want: Tensor) -> None:
    """Equal but for the last bit, where a sum or a function has another one."""
    assert got.dtype == want.dtype
    ulp = 2.0 ** (-23 if got.dtype == torch.float32 else -7)
    torch.testing.assert_close(got.float(), want.float(), rtol=4 * ulp if ulp < 1e-6 else ulp, atol=1e-6)
    if got.dtype == torch.bfloat16:
        assert (got == want).float().mean() > 0.99


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


def reference_norm(weight_D: Tensor, eps: float) -> Qwen3RMSNorm:
    module = Qwen3RMSNorm(len(weight_D), eps)
    module.weight.data = weight_D
    return module


@pytest.mark.parametrize("size", [1, 70, 128, 1100])
def test_a_norm_is_that_of_transformers(size: int, dtype: torch.dtype) -> None:
    from frugal_rl.kernels.fused import norm

    x = torch.randn(2, 3, size, device=DEVICE).to(dtype) * 3
    weight_D = torch.randn(size, device=DEVICE).to(dtype)
    with torch.no_grad():
        near(norm(x, weight_D, 1e-3), reference_norm(weight_D, 1e-3)(x))


def test_a_sum_is_rounded_kept_and_normed(dtype: torch.dtype) -> None:
    from frugal_rl.kernels.fused import add_norm

    x, added = (torch.randn(5, 96, device=DEVICE).to(dtype) for _ in range(2))
    weight_D = torch.randn(96, device=DEVICE).to(dtype)
    before = x.clone()
    total, normed = add_norm(x, added, weight_D, 1e-6)
    assert torch.equal(total, x + added)
    assert torch.equal(x, before)
    with torch.no_grad():
        near(normed, reference_norm(weight_D, 1e-6)(x + added))


def test_a_row_of_zeros_stays_finite() -> None:
    from frugal_rl.kernels.fused import norm

    zeros = torch.zeros(2, 8, device=DEVICE)
    assert torch.equal(norm(zeros, torch.ones(8, device=DEVICE), 1e-6), zeros)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 16), (8, 2, 128), (7, 1, 80)])
def test_queries_and_keys_are_rotated_and_kept_where_they_belong(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype
) -> None:
    from frugal_rl.kernels.fused import rotate_and_keep

    slots, entries = 3, 9
    query, key, value = (
        torch.randn(slots, n, size, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads)
    )
    cos, sin = (torch.randn(slots, 1, size, device=DEVICE).to(dtype) for _ in range(2))
    cache = torch.randn(2, slots + 1, kv_heads, entries + 2, size, device=DEVICE).to(dtype)
    want = cache.clone()
    entry_S = torch.tensor([0, 8, 4], device=DEVICE)
    views = [part[:slots, :, :entries] for part in cache]
    rotated = rotate_and_keep(query, key, value, cos[:, 0], sin[:, 0], views[0], views[1], entry_S)
    turned, kept = apply_rotary_pos_emb(query[:, :, None], key[:, :, None], cos, sin)
    place = torch.arange(slots, device=DEVICE)
    want[0][place, :, entry_S] = kept[:, :, 0]
    want[1][place, :, entry_S] = value
    near(rotated, turned[:, :, 0])
    near(cache, want)
    elsewhere = torch.ones_like(cache, dtype=torch.bool)
    elsewhere[:, place, :, entry_S] = False
    assert torch.equal(cache[elsewhere], want[elsewhere])


def test_one_row_of_cosines_may_serve_all_slots() -> None:
    from frugal_rl.kernels.fused import rotate_and_keep

    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 16, device=DEVICE) for _ in range(3))
    cos, sin = (torch.randn(1, 16, device=DEVICE) for _ in range(2))
    caches = [torch.zeros(2, 3, 2, 4, 16, device=DEVICE) for _ in range(2)]
    entry_S = torch.tensor([0, 1, 2], device=DEVICE)
    one = rotate_and_keep(query, key, value, cos.expand(3, -1), sin.expand(3, -1), *caches[0], entry_S)
    repeated = cos.repeat(3, 1), sin.repeat(3, 1)
    assert torch.equal(one, rotate_and_keep(query, key, value, *repeated, *caches[1], entry_S))
    assert torch.equal(caches[0], caches[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 700)])
def test_a_gate_is_silu_of_it_times_the_other(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from frugal_rl.kernels.fused import gated

    gate, up = (torch.randn(shape, device=DEVICE).to(dtype) * 4 for _ in range(2))
    near(gated(gate, up), torch.nn.functional.silu(gate) * up)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    from frugal_rl.kernels.fused import add_norm

    torch.manual_seed(0)
    x, added = torch.randn(4, 96, device=DEVICE), torch.randn(4, 96, device=DEVICE)
    weight_D = torch.randn(96, device=DEVICE)
    together, alone = (add_norm(x[i:j], added[i:j], weight_D, 1e-6) for i, j in ((0, 4), (2, 3)))
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("kind", "launches"), [("mistral", 4), ("qwen3", 6)])
def test_a_decode_step_is_products_attention_and_these(
    monkeypatch: pytest.MonkeyPatch, kind: str, launches: int
) -> None:
    """Transformers' own layers run for the prompt alone; around the products there are `launches` a layer."""
    from frugal_rl.kernels import fused

    layers = 2
    decoder = make_decoder(kind, tied=True, changed=0.0, layers=layers)
    forwards, launched = [], []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda *_: forwards.append(0))
    for name in ("_norm", "_rotate", "_gated"):
        monkeypatch.setattr(fused, name, Counting(getattr(fused, name), launched))
    monkeypatch.setenv(choice.CHOICE, "triton")
    monkeypatch.setenv(graphs.SWITCH, "off")  # a replay launches nothing here
    engine = Engine(decoder, slots=2, stop_ids=frozenset(), prefill_tokens=64)
    list(engine.generate([Request((7, 8, 9), (0,))], max_tokens=3, temperature=0))
    steps = 2  # the first token comes from the prompt
    assert len(forwards) == layers
    assert len(launched) == steps * (launches * layers + 1)  # and the norm before the head


class Counting:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launched: list[int]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(0)
        return self.kernel[grid]


def test_a_model_with_another_gate_goes_through_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal_rl.kernels import fused

    decoder = make_decoder("llama", tied=True, changed=0.0)
    for layer in decoder.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    monkeypatch.setattr(fused, "add_norm", None)  # a call would fail
    check(monkeypatch, decoder)
