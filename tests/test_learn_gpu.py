"""Learning on a GPU: what it needs of cuBLAS and of attention there; as far as a CPU can tell, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from frugal_rl import decoder as decoders
from frugal_rl.config import load_recipe
from frugal_rl.decoder import Decoder, add_product_, let_products_repeat, product_in_float32
from frugal_rl.learn import Learner
from frugal_rl.models import find_model
from frugal_rl.session import divide
from frugal_rl.weights import Weights

from .conftest import make_config, make_decoder, make_model, weights_of
from .test_learn import make_groups, policy_gradient

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

GENERATE_THEN_LEARN = """
import os
import tests  # tells cuBLAS, for the tests that have no policy: not here
del os.environ["CUBLAS_WORKSPACE_CONFIG"]
import torch
from frugal_rl.decoder import Decoder
from frugal_rl.generate.engine import Engine
from frugal_rl.learn import Learner
from frugal_rl.rollout import Request
from frugal_rl.weights import Weights
from tests.conftest import make_decoder, weights_of

model, _ = make_decoder("qwen2", dtype=torch.bfloat16)
decoder = Decoder(model.config, Weights({k: v.cuda() for k, v in weights_of(model).tensors.items()}))
requests = [Request((8, 9, 10 + i), (0, i)) for i in range(6)]
sampled = dict(Engine(decoder, 4, frozenset({5}), 30).generate(requests, max_tokens=9, temperature=1.0))
advantage_B = torch.linspace(-1, 1, 6, device="cuda")
step = Learner(decoder, 0.1, 1.0, 1.0, 100).step(
    [sampled[i] for i in range(6)], lambda logprob_BT: (-(logprob_BT.sum(1) * advantage_B).mean(), {})
)
print("changed", step.commit.entries)
"""


class Noted(TorchDispatchMode):
    """Notes the operations that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


def test_cublas_is_told_to_repeat_itself_before_a_policy_on_a_gpu_multiplies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    let_products_repeat(torch.device("cpu"))
    assert WORKSPACE not in os.environ
    let_products_repeat(torch.device("cuda"))
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")  # what a person has chosen stays
    let_products_repeat(torch.device("cuda"))
    assert os.environ[WORKSPACE] == ":16:8"
    asked: list[torch.device] = []
    monkeypatch.setattr(decoders, "let_products_repeat", asked.append)
    _, decoder = make_decoder("qwen2")
    assert asked == [decoder.device]


def on_a_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that says that it is there, and has no numbers."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def test_logits_on_a_gpu_are_never_in_bf16() -> None:
    """At 16 to 32 it keeps an eighth of a nat, and the sampler's kernel gives float32."""
    with FakeTensorMode(), Noted() as noted:
        assert product_in_float32(on_a_gpu(6, 64), on_a_gpu(90, 64).T).dtype == torch.float32
    assert [op for op in noted.ops if "mm" in op] == ["aten.mm.dtype"]


def attended(
    query: Tensor, key: Tensor, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    """Shapes of what PyTorch's attention is called with."""
    seen: list[list[int]] = []

    def note(*tensors: Tensor, attn_mask: Tensor | None = None, **_: object) -> Tensor:
        seen.extend(list(t.shape) for t in (*tensors, attn_mask) if t is not None)
        return tensors[0]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    out, _ = decoders.attention(torch.nn.Identity(), query, key, key, None, 0.1, slot_mask=mask)
    assert out.shape == query.transpose(1, 2).shape
    return seen


def test_on_a_gpu_a_learners_mask_is_not_repeated_for_the_heads_that_share_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 2048 tokens and 7 heads a group, 42 KiB a token as bits and numbers; keys and values 14 KiB."""
    with FakeTensorMode():
        query, key = on_a_gpu(3, 14, 40, 16), on_a_gpu(3, 2, 40, 16)
        mask = on_a_gpu(3, 1, 40, 40, dtype=torch.bool)
        assert attended(query, key, mask, monkeypatch) == [[3, 14, 40, 16]] * 3 + [[3, 1, 40, 40]]
        # a chunk of a prompt over a cache: its entries are many and its queries few
        query, mask = on_a_gpu(3, 14, 8, 16), on_a_gpu(3, 1, 8, 40, dtype=torch.bool)
        queries, *keys, seen = attended(query, key, mask, monkeypatch)
        assert (queries, keys, seen) == ([3, 2, 56, 16], [[3, 2, 40, 16]] * 2, [3, 1, 56, 40])


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 14), (torch.bfloat16, 2)])
def test_on_a_gpu_keys_are_shared_where_flash_attention_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: int
) -> None:
    """In float32 there is none, and what else shares keys holds a score for each pair of tokens."""
    with FakeTensorMode():
        query, key = on_a_gpu(3, 14, 40, 16, dtype=dtype), on_a_gpu(3, 2, 40, 16, dtype=dtype)
        seen = attended(query, key, None, monkeypatch)
    assert seen == [[3, 14, 40, 16], [3, heads, 40, 16], [3, heads, 40, 16]]


def test_a_plan_leaves_some_of_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what nobody plans: a plan that fills all of it would run out at once, and halve its slots."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: done.append("free") or (24 << 30, 80 << 30)
    )
    files, device = find_model("tiny"), torch.device("cuda")
    assert divide(files, load_recipe("tiny", []), 20, device).budget_bytes == 22 << 30
    assert done == ["empty_cache", "free"]  # what PyTorch has cached is free too
    set_by_hand = load_recipe("tiny", ["memory.budget=24GiB"])
    assert divide(files, set_by_hand, 20, device).budget_bytes == 24 << 30


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(64, 32, 48), (1, 40, 64), (513, 1000, 1024)])
def test_on_a_gpu_products_are_summed_into_float32_and_rounded_nowhere(shape: tuple[int, int, int]) -> None:
    """Into a whole tensor, into rows of one, and with a factor that lies the other way round."""
    rows, inner, columns = shape
    torch.manual_seed(0)
    left, right = (torch.randn(*size, device="cuda").bfloat16() for size in ((inner, rows), (inner, columns)))
    exact = left.double().T @ right.double()
    close = {"rtol": 0, "atol": 1e-6 * inner}
    torch.testing.assert_close(product_in_float32(left.T, right).double(), exact, **close)
    out = torch.ones(rows + 5, columns, device="cuda")
    for _ in range(2):
        add_product_(out[3 : 3 + rows], left.T, right)
    torch.testing.assert_close(out[3 : 3 + rows].double(), 1 + 2 * exact, **close)
    assert bool((out[:3] == 1).all()) and bool((out[3 + rows :] == 1).all())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_on_a_gpu_responses_behind_one_prompt_repeat_and_are_those_of_a_cpu(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "pair_cost", 0.0)
    config = make_config("qwen2", head_dim=head_dim)
    tensors = weights_of(make_model(config, dtype=torch.bfloat16)).tensors
    rollouts, found = make_groups(3, 5), []
    for device in ("cpu", "cuda", "cuda"):
        decoder = Decoder(config, Weights({k: v.to(device, copy=True) for k, v in tensors.items()}))
        advantage_B = torch.linspace(-1, 1, 15, device=device)
        learner = Learner(decoder, 0.1, 1.0, 1.0, 10_000)
        logprob_BT = learner.log_probs(rollouts).cpu()
        step = learner.step(rollouts, policy_gradient(advantage_B))
        found.append((step, logprob_BT, decoder.weights.tensors))
    (cpu, cpu_BT, _), (gpu, gpu_BT, first), (_, again_BT, second) = found
    assert torch.equal(gpu_BT, again_BT)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert gpu.commit.norm == pytest.approx(cpu.commit.norm, rel=0.05)
    torch.testing.assert_close(gpu_BT, cpu_BT, rtol=0, atol=0.1)  # bf16 hidden states on one side


@pytest.mark.gpu
@needs_gpu
def test_a_process_that_generates_before_it_learns_can_learn() -> None:
    """As a resumed run does. torch remembers for good what cuBLAS was told before its first product."""
    words, root = [sys.executable, "-c", GENERATE_THEN_LEARN], Path(__file__).parents[1]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 0
