"""`frugal-rl plan` as a person and as a script use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from frugal_rl.cli import cli
from frugal_rl.config import load_recipe
from frugal_rl.errors import InputError


def run_plan(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["plan", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_what_fits_is_said_with_exit_code_0() -> None:
    code, text = run_plan("Qwen2.5-7B", "--memory", "24GiB", "--host-memory", "64GiB")
    assert code == 0
    assert text.startswith(
        "Qwen2.5-7B: 7.62 G parameters; gpu, 24.0 GiB, its host 64.0 GiB; 16 prompts x 8 samples, "
        "up to 512 + 1024"
    )
    for word in ("KV pool", "boundary states", "gradient scratch", "micro-batch tokens", "slots", "fits"):
        assert word in text, word


def test_what_does_not_fit_is_said_with_exit_code_2_and_what_would() -> None:
    code, text = run_plan("Qwen2.5-7B", "--memory", "18GiB")
    assert code == 2
    assert "does not fit" in text
    assert "bf16: " in text
    assert "would fit" in text


def test_the_budget_it_names_does_fit() -> None:
    code, text = run_plan("Qwen2.5-14B", "--memory", "24GiB", "--json")
    assert code == 2
    least = json.loads(text)["forms"]["bf16"]["least_bytes"]
    assert run_plan("Qwen2.5-14B", "--memory", f"{least / 2**30 + 0.001:.3f}GiB")[0] == 0


def test_json_is_one_object_with_every_part() -> None:
    code, text = run_plan("Qwen3-4B", "--json", "--prompts", "4", "--samples", "4", "--max-tokens", "256")
    value = json.loads(text)
    assert code == 0
    assert (value["prompts"], value["samples"], value["max_tokens"]) == (4, 4, 256)
    assert set(value["forms"]) == {"bf16", "int8", "host"}
    for form in value["forms"].values():
        assert form["learning_bytes"] == sum(form["learning"].values())


def test_values_come_from_the_recipe_unless_given() -> None:
    value = json.loads(run_plan("--recipe", "gsm8k-qwen2.5-0.5b", "--json")[1])
    assert value["model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    again = json.loads(run_plan("--recipe", "gsm8k-qwen2.5-0.5b", "--samples", "3", "--json")[1])
    assert again["samples"] == 3
    assert again["prompts"] == value["prompts"]


def test_on_a_cpu_arithmetic_is_float32() -> None:
    value = json.loads(run_plan("tiny", "--device", "cpu", "--json")[1])
    assert set(value["forms"]) == {"bf16", "int8", "host"}
    assert value["forms"]["bf16"]["learning"]["layer copies"] > 0
    assert value["forms"]["bf16"]["host_bytes"] == 0


@pytest.mark.parametrize(
    "words,expected",
    [
        (["no-such-model"], "no-such-model"),
        (["tiny", "--memory", "24GB"], "24GiB"),
        (["--recipe", "tinny"], "tiny"),
    ],
)
def test_bad_input_is_refused_by_name(words: Sequence[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        run_plan(*words)


def test_a_host_with_less_memory_keeps_fewer_boundary_states() -> None:
    words = ["Qwen2.5-7B", "--memory", "24GiB", "--json", "--host-memory"]
    most, less = (json.loads(run_plan(*words, room)[1])["forms"]["int8"] for room in ("96GiB", "24GiB"))
    assert most["boundary_every"] == 1 < less["boundary_every"]
    assert less["host_bytes"] <= 24 * 2**30 < most["host_bytes"]


def test_a_recipe_with_an_optimizer_is_planned_with_its_states_in_the_forms_that_it_can_have(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "adamw.toml"
    recipe.write_text(
        load_recipe("math-qwen2.5-7b-24gib")
        .to_toml()
        .replace('kind = "sgd"', 'kind = "adamw"')
        .replace('weights = "int8"', 'weights = "bf16"')
    )
    code, text = run_plan("Qwen2.5-7B", "--recipe", str(recipe), "--memory", "200GiB", "--json")
    value = json.loads(text)
    assert code == 0 and list(value["forms"]) == ["bf16"]
    learning = value["forms"]["bf16"]["learning"]
    assert learning["optimizer"] == 12 * value["parameters"]
    assert learning["gradients"] == 4 * value["parameters"]
    assert run_plan("Qwen2.5-7B", "--recipe", str(recipe), "--memory", "80GiB")[0] == 2
