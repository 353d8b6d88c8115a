"""Known shapes against their model cards, and what is read from a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frugal_rl.errors import InputError
from frugal_rl.memory import Shape
from frugal_rl.shapes import KNOWN, find_shape, known_shape, read_config

from .conftest import KINDS, make_config

# parameters in G: of the checkpoints' tensors, as the hub's model pages count them
CARDS = {
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-3B": 3.086,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-14B": 14.770,
    "Qwen2.5-32B": 32.764,
    "Qwen2.5-Math-1.5B": 1.544,
    "Qwen2.5-Math-7B": 7.616,
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
    "Llama-3.2-1B": 1.236,
    "Llama-3.2-3B": 3.213,
    "Llama-3.1-8B": 8.030,
    "Mistral-7B-v0.1": 7.242,
    "Mistral-7B-v0.3": 7.248,
}


def test_every_known_shape_has_a_card() -> None:
    assert set(KNOWN) == set(CARDS)


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_of_the_model_card(name: str) -> None:
    assert KNOWN[name].parameters / 1e9 == pytest.approx(CARDS[name], rel=1e-3)  # norms, biases, rounding


def test_a_name_may_have_its_owner_and_its_variant() -> None:
    shape = KNOWN["Qwen2.5-7B"]
    for name in ("Qwen2.5-7B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"):
        assert find_shape(name) == (shape, 2)
    assert known_shape("Mistral-7B") == KNOWN["Mistral-7B-v0.3"]
    assert known_shape("meta-llama/Llama-3.2-1B-Instruct") == KNOWN["Llama-3.2-1B"]
    assert known_shape("someone/Qwen2.5-7B") is None
    assert known_shape("Qwen2.5-8B") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_needs_its_config_alone(kind: str, tmp_path: Path) -> None:
    config = make_config(kind)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "float32"}))
    assert find_shape(str(tmp_path)) == (Shape.from_config(config.to_dict()), 4)


def test_the_embedded_model_is_found() -> None:
    assert find_shape("tiny")[0].layers == 4


GOOD = {**make_config("qwen2").to_dict(), "dtype": "bfloat16"}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture": ({"model_type": "gpt2"}, "'gpt2' is not supported"),
    "a quantised checkpoint": ({"quantization_config": {}}, "unquantised"),
    "a format": ({"dtype": "int8"}, "'int8'"),
    "a missing size": ({"hidden_size": None}, "size"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_cannot_be_planned_is_refused(name: str) -> None:
    changes, expected = BAD[name]
    with pytest.raises(InputError, match=expected):
        read_config({**GOOD, **changes}, "m")


def test_a_config_without_a_size_names_it() -> None:
    with pytest.raises(InputError, match="num_hidden_layers"):
        read_config({k: v for k, v in GOOD.items() if k != "num_hidden_layers"}, "m")


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_folder_without_a_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        find_shape(str(tmp_path))
