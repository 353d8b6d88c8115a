"""models.py and what it stands for: which tokens end a response, and whose weights a checkpoint has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frugal_rl.decoder import Decoder, parameter_names
from frugal_rl.errors import InputError
from frugal_rl.models import ModelFiles, stop_ids
from frugal_rl.policy import Policy
from frugal_rl.rollout import Rollout, micro_batches
from frugal_rl.weights import Weights

from .conftest import make_config, make_model, weights_of


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (2, None, None, {2}),
        (None, None, 7, {7}),
        ([128001, 128008], [128001, 128009], 128009, {128001, 128008, 128009}),  # as Llama 3 has them
        (151643, [151645, 151643], 151645, {151643, 151645}),  # as Qwen2.5-Instruct has them
        (0, None, 0, {0}),  # an id of 0 is an id
    ],
)
def test_every_end_that_any_file_names_ends_a_response(
    tmp_path: Path, config: Any, generation: Any, tokenizer: int | None, expected: set[int]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    files = ModelFiles("m", tmp_path, {"eos_token_id": config})
    assert stop_ids(files, SimpleNamespace(eos_token_id=tokenizer)) == expected


def test_a_model_that_names_no_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model m names no end-of-sequence token"):
        stop_ids(ModelFiles("m", tmp_path, {}), SimpleNamespace(eos_token_id=None))


def test_every_token_of_a_response_is_learned_whatever_its_id_the_end_included() -> None:
    """Ids 0 and 2 are what padding and the end often have; they stand in prompts and responses too."""
    rng = np.random.default_rng(0)
    rollouts = []
    for length in (1, 5, 3, 9):
        response = np.append(rng.integers(0, 3, length), 2)
        nothing = np.zeros(len(response), np.float32)
        prompt = tuple(rng.integers(0, 3, 4).tolist())
        rollouts.append(Rollout(prompt, response, nothing, False, nothing))
    for budget in (1, 30, 1000):
        batches = micro_batches(rollouts, budget, 0.0)
        learned: dict[int, list[int]] = {}
        for batch in batches:
            width = batch.token_BT.shape[1]
            for place, target in zip(batch.place_N, batch.target_N, strict=True):
                learned.setdefault(int(batch.row_R[place // width]), []).append(int(target))
        assert learned == {row: r.response_ids.tolist() for row, r in enumerate(rollouts)}


def test_a_verifier_sees_the_response_without_the_token_that_ends_it() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join("ab.;"[i] for i in ids))
    policy = Policy(None, None, tokenizer, frozenset({2, 3}), 0)  # type: ignore[arg-type]
    assert policy.text([0, 2, 1, 3]) == "a.b"  # only the last one ended it
    assert policy.text([0, 1]) == "ab"  # truncated
    assert policy.text([]) == ""


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(change: str) -> None:
    config = make_config("qwen2", layers=1)
    tensors = dict(weights_of(make_model(config)).tensors)
    name = "model.layers.0.mlp.up_proj.weight" if change == "missing" else "model.layers.0.mlp.spare.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(2, 2)
    with pytest.raises(InputError, match=rf"does not match its config \(qwen2\).*{change} \['{name}'\]"):
        Decoder(config, Weights(tensors))


def test_a_tied_heads_copy_in_the_checkpoint_is_left_there(tmp_path: Path) -> None:
    config = make_config("qwen2", layers=1, tied=True)
    tensors = dict(weights_of(make_model(config)).tensors)
    spare = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": spare}, tmp_path / "model.safetensors")
    names = parameter_names(config)
    weights = Weights.from_checkpoint(tmp_path, torch.device("cpu"), name="m", names=names)
    assert set(weights.held) == names == set(tensors)
    assert Decoder(config, weights).tied
