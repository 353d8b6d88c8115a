"""Sampling through the kernels, against sampling without them."""

from __future__ import annotations

import pytest
import torch

from frugal_rl.decoder import Decoder
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generate.graphs import SWITCH
from frugal_rl.kernels import choice
from frugal_rl.rollout import Request
from frugal_rl.storage import Changed, Quantised, bits_of
from frugal_rl.weights import Weights

from .conftest import make_config, make_model, needs_triton, weights_of

pytestmark = needs_triton
if torch.cuda.is_available():
    DEVICE, DTYPE, TOLERANCE = torch.device("cuda"), torch.bfloat16, 0.1  # nats; activations have 8 bits
else:
    DEVICE, DTYPE, TOLERANCE = torch.device("cpu"), torch.float32, 1e-4  # only sums have another order


def make_decoder(kind: str, *, tied: bool, changed: float, layers: int = 1) -> Decoder:
    """A random model with int8 matrices and a patch over that share of their entries."""
    config = make_config(kind, tied=tied, layers=layers)
    tensors = weights_of(make_model(config, dtype=torch.bfloat16)).tensors
    held = {name: Quantised.of(t.to(DEVICE)) if t.dim() == 2 else t.to(DEVICE) for name, t in tensors.items()}
    for matrix in held.values():
        if isinstance(matrix, Quantised):
            position_N = torch.nonzero(torch.rand(matrix.code_OI.numel()) < changed)[:, 0].to(DEVICE)
            before_N = matrix.at(position_N)
            after_N = before_N + torch.randn(len(position_N)).to(before_N) * 0.02
            if len(position_N):
                matrix.write_(Changed(position_N, bits_of(before_N), bits_of(after_N)))
    return Decoder(config, Weights(held, compute_dtype=DTYPE))


def sample(decoder: Decoder, *, temperature: float, **options: object):
    """Three sequences on two slots, their prompts of different lengths."""
    prompts = [tuple(range(7, 20)), (13, 14, 15), (12,)]
    requests = [Request(prompt, (index,)) for index, prompt in enumerate(prompts)]
    engine = Engine(decoder, slots=2, stop_ids=frozenset({5}), prefill_tokens=64, **options)
    rollouts = dict(engine.generate(requests, max_tokens=4, temperature=temperature))
    assert bool(engine.stats.evictions) == (engine.eviction is not None)
    return [rollouts[index] for index in range(len(prompts))]


def check(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, *, temperature: float = 0, **options) -> None:
    monkeypatch.setenv(choice.CHOICE, "plain")
    plain = sample(decoder, temperature=temperature, **options)
    monkeypatch.setenv(choice.CHOICE, "triton")
    kernels = sample(decoder, temperature=temperature, **options)
    for a, b in zip(plain, kernels, strict=True):
        equal = a.response_ids.tolist() == b.response_ids.tolist()
        assert equal or torch.float32 != DTYPE  # in bf16 near ties may go either way
        if equal:
            got, want = torch.from_numpy(b.logprob_T), torch.from_numpy(a.logprob_T)
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "tied", "temperature"), [("qwen2", True, 0), ("qwen3", False, 0), ("llama", True, 1.0)]
)
def test_sampling_through_the_kernels_gives_the_same_tokens(monkeypatch, kind, tied, temperature):
    """Greedy, and at the requests' own uniform numbers; with a patch over every matrix."""
    layers = 2 if kind == "qwen2" else 1  # the interpreter is slow
    check(monkeypatch, make_decoder(kind, tied=tied, changed=0.01, layers=layers), temperature=temperature)


@pytest.mark.parametrize("method", ["rkv", "h2o"])
def test_eviction_sees_what_it_saw(monkeypatch, method):
    decoder = make_decoder("llama", tied=True, changed=0.0)
    check(monkeypatch, decoder, eviction=Eviction(method, 9 if method == "rkv" else 4, 2))


def test_int8_matrices_are_used_as_they_are(monkeypatch):
    """Each through the kernel, none dequantised; attention through its kernel once a token and layer."""
    from frugal_rl.kernels import attention, matmul

    decoder = make_decoder("qwen2", tied=True, changed=0.0)
    products, attentions = [], []
    product, attend = matmul.Matrix.product, attention.decode_attention
    monkeypatch.setattr(matmul.Matrix, "product", lambda *a, **k: products.append(0) or product(*a, **k))
    monkeypatch.setattr(attention, "decode_attention", lambda *a: attentions.append(0) or attend(*a))
    monkeypatch.setattr(decoder.weights, "load", lambda name, scratch=None: _only_small(decoder, name))
    monkeypatch.setenv(choice.CHOICE, "triton")
    monkeypatch.setenv(SWITCH, "off")  # a captured step is called twice, and then never
    engine = Engine(decoder, slots=2, stop_ids=frozenset(), prefill_tokens=64)
    list(engine.generate([Request((7, 8, 9), (0,))], max_tokens=3, temperature=0))
    assert len(attentions) == 2  # the first token comes from the prompt
    assert len(products) == 3 * (7 + 1)
    assert not decoder._matrices


def test_nothing_of_a_step_is_held_when_it_is_over(monkeypatch):
    """What a captured step leaves alive keeps a part of the graphs' pool from being given back."""
    decoder = make_decoder("qwen2", tied=True, changed=0.05)
    monkeypatch.setenv(choice.CHOICE, "triton")
    with torch.no_grad(), decoder.sampling():
        (inputs,) = {matrix.inputs for matrix in decoder._matrices.values()}
        decoder.logits(torch.randn(5, 64).to(DEVICE, DTYPE))  # more tokens than are gathered as they are
    assert inputs._last is None


def _only_small(decoder: Decoder, name: str) -> torch.Tensor:
    whole = decoder.weights.seen(name).whole(decoder.dtype)
    if whole is None:
        assert not isinstance(decoder.weights.seen(name), Quantised), name
        whole = decoder.weights.seen(name).tensor.to(decoder.dtype)
    return whole


def test_many_tokens_at_a_time_are_multiplied_by_a_dequantised_copy(monkeypatch):
    from frugal_rl.kernels import matmul

    monkeypatch.setattr(matmul, "MOST_TOKENS", 3)
    check(monkeypatch, make_decoder("qwen2", tied=True, changed=0.01))


def test_plain_sampling_has_no_kernel_in_it(monkeypatch):
    from frugal_rl.kernels import attention, fused, matmul

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(matmul.Matrix, "product", refuse)
    monkeypatch.setattr(attention, "decode_attention", refuse)
    for name in ("norm", "add_norm", "rotate_and_keep", "gated"):
        monkeypatch.setattr(fused, name, refuse)
    monkeypatch.setenv(choice.CHOICE, "plain")
    sample(make_decoder("llama", tied=True, changed=0.0), temperature=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_product_and_attention_can_be_captured_and_replayed():
    """In a CUDA graph: replayed on new inputs, it gives the bits of a launch."""
    from frugal_rl.kernels.attention import decode_attention
    from frugal_rl.kernels.matmul import Inputs, Matrix

    torch.manual_seed(0)
    held = Quantised.of(torch.randn(512, 3584, device=DEVICE))
    position_N = torch.arange(0, 512 * 3584, 500, device=DEVICE)
    base_N = held.at(position_N)
    matrix = Matrix(held.code_OI, held.absmax_O, (position_N, base_N, -base_N), Inputs())
    x_MI = torch.randn(16, 3584, device=DEVICE, dtype=DTYPE)
    cache = torch.randn(2, 16, 1, 640, 128, device=DEVICE, dtype=DTYPE)
    length_S = torch.randint(1, 641, (16,), device=DEVICE)
    arrived = torch.zeros(16, dtype=torch.int32, device=DEVICE)

    def step() -> torch.Tensor:
        matrix.inputs.forget()  # as after a layer: what was transposed before a capture is no part of it
        query = matrix.product(x_MI).view(16, 4, 128)
        return decode_attention(query, cache[0], cache[1], length_S, arrived, 128**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    x_MI.normal_()
    length_S.random_(1, 641)
    graph.replay()
    assert torch.equal(out, step())
