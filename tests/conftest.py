"""Small random models of every supported architecture, in memory and as Hugging Face folders."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frugal_rl.decoder import Decoder
from frugal_rl.rollout import Rollout
from frugal_rl.weights import Weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are too small for more

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python: pip install '.[llama]'"
)


def _kernels_lack() -> str | None:
    """What the tests of kernels would need here."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install '.[test]'"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if os.environ.get("TRITON_INTERPRET") == "1" and triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton before 3.7 needs numpy before 2.4"
    return None


needs_triton = pytest.mark.skipif(_kernels_lack() is not None, reason=str(_kernels_lack()))
KINDS = ("llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 90


def make_config(kind: str, *, tied: bool = True, layers: int = 3, **changes: Any) -> Any:
    """A config of real shape ratios, small: 2 KV heads for 4 heads, 128 positions."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 5,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    config = AutoConfig.for_model(kind, **{**sizes, **changes})
    if kind == "mistral":
        config.sliding_window = None
    return config


def make_model(config: Any, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A transformers model with random weights everywhere, norms and biases included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype)


def weights_of(model: Any) -> Weights:
    """A copy of a model's tensors, a tied head counted once."""
    tied = model.config.tie_word_embeddings
    state = model.state_dict().items()
    return Weights({k: v.clone() for k, v in state if not (tied and k == "lm_head.weight")})


def make_decoder(
    kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, layers: int = 3
) -> tuple[Any, Decoder]:
    """The same random model twice: transformers' own, and ours."""
    config = make_config(kind, tied=tied, layers=layers)
    model = make_model(config, dtype=dtype)
    return model, Decoder(config, weights_of(model))


def make_rollouts(count: int, seed: int = 0, *, longest: int = 20) -> list[Rollout]:
    """Ragged random prompts (2 to 8 tokens) and responses (1 to `longest` tokens)."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for _ in range(count):
        prompt = tuple(rng.integers(6, VOCABULARY, rng.integers(2, 9)).tolist())
        response = rng.integers(6, VOCABULARY, rng.integers(1, longest + 1))
        nothing = np.zeros(len(response), np.float32)
        rollouts.append(Rollout(prompt, response, nothing, False, nothing))
    return rollouts


def save_folder(model: Any, folder: Path, tokenizer_from: Path) -> Path:
    """A Hugging Face folder of `model` with another folder's tokenizer."""
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The embedded model."""
    from frugal_rl.models import EMBEDDED

    return EMBEDDED["tiny"]
