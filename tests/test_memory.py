"""The plan's arithmetic; its agreement with measured peaks is checked by the tools."""

from __future__ import annotations

from typing import Any

import pytest

from frugal_rl.errors import InputError
from frugal_rl.memory import Plan, Shape, peak_resident_bytes, plan

from .conftest import make_config, make_model, weights_of

QWEN_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
GIB = 2**30


def make_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "budget_bytes": 24 * GIB,
        "storage_bytes": 2,
        "compute_bytes": 2,
        "sequences": 64,
        "prompt_tokens": 256,
        "response_tokens": 768,
        "has_host": True,
    }
    return plan(Shape.from_config(QWEN_7B), **{**settings, **changes})


def test_int8_weights_take_a_byte_an_entry_and_a_layer_in_the_compute_format() -> None:
    low, whole = make_plan(storage_bytes=1), make_plan()
    assert low.weights_bytes * 2 == whole.weights_bytes
    assert low.budget_bytes == whole.budget_bytes
    assert low.micro_tokens >= whole.micro_tokens


def test_parameters_of_a_known_model() -> None:
    # the model card says 7.62 G; norms and biases are left out
    assert Shape.from_config(QWEN_7B).parameters == pytest.approx(7.616e9, rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(kind: str, tied: bool) -> None:
    config = make_config(kind, tied=tied)
    counted = Shape.from_config(config.to_dict()).parameters
    assert weights_of(make_model(config)).parameters == pytest.approx(counted, rel=0.02)


def test_both_phases_stay_within_the_budget() -> None:
    found = make_plan()
    assert found.generating_bytes <= found.budget_bytes
    assert found.learning_bytes <= found.budget_bytes
    assert 1 <= found.slots <= 64
    assert found.micro_tokens >= 1024


def test_more_memory_never_gives_fewer_slots_or_smaller_micro_batches() -> None:
    plans = [make_plan(budget_bytes=b * GIB) for b in (22, 24, 32, 80)]
    assert [p.slots for p in plans] == sorted(p.slots for p in plans)
    on_host = [p for p in plans if p.boundary_on_host]
    assert len(on_host) >= 2
    assert [p.micro_tokens for p in on_host] == sorted(p.micro_tokens for p in on_host)


def test_boundary_states_go_to_the_host_only_when_they_must_and_can() -> None:
    # 30 states of 64 sequences x 1024 tokens x 3584 x 2 bytes are 13.1 GiB, the weights 14.2 GiB
    assert make_plan().boundary_on_host
    assert not make_plan(budget_bytes=40 * GIB).boundary_on_host
    with pytest.raises(InputError):
        make_plan(has_host=False)


def test_what_does_not_fit_is_refused_with_the_figure_that_would() -> None:
    with pytest.raises(InputError, match=r"need \d+\.\d GiB, the budget is 12\.0 GiB"):
        make_plan(budget_bytes=12 * GIB)


def test_the_peak_covers_what_this_process_holds() -> None:
    before = peak_resident_bytes()
    block = b"x" * (64 << 20)
    assert peak_resident_bytes() >= max(before, len(block))
