"""Learning on a GPU: what it needs of cuBLAS and of attention there; as far as a CPU can tell, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from frugal_rl import decoder as decoders
from frugal_rl.decoder import let_products_repeat

from .conftest import make_decoder

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


@pytest.mark.gpu
@needs_gpu
def test_a_process_that_generates_before_it_learns_can_learn() -> None:
    """As a resumed run does. torch remembers for good what cuBLAS was told before its first product."""
    words, root = [sys.executable, "-c", GENERATE_THEN_LEARN], Path(__file__).parents[1]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 0
