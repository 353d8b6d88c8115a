"""The recipes that travel with the package: each loads, and its header keeps the promises."""

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from frugal_rl.cli import cli
from frugal_rl.config import list_recipes, load_recipe, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


def upwards(size: int) -> str:
    """In tenths of a GiB that are enough."""
    return f"{math.ceil(size / 2**30 * 10) / 10:.1f} GiB"


def test_the_recipes_of_the_readme_exist():
    expected = {
        "tiny",
        "gsm8k-qwen2.5-0.5b",
        "gsm8k-qwen2.5-1.5b",
        "math-qwen2.5-7b-24gib",
        "math-qwen2.5-14b-24gib",
    }
    assert expected <= set(NAMES)
    assert list(list_recipes()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_comes_back_from_its_own_text(name):
    recipe = load_recipe(name)
    assert read_recipe(recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_may_be_given_as_a_path(name):
    assert load_recipe(str(RECIPES / f"{name}.toml")) == load_recipe(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_hardware_memory_minutes_score_and_command(name):
    header = list_recipes()[name]
    lines = dict(line.split(":", 1) for line in header.splitlines() if ":" in line)
    for key in ("hardware", "peak memory", "minutes", "score"):
        assert lines[key].strip()
    argument = "" if name == "tiny" else f" --recipe {name}"
    assert lines["command"].strip() == f"frugal-rl train{argument}"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_writes_no_key_that_only_repeats_a_default(name):
    """A reader takes every line for a choice; what `shown` lists is written to be seen."""
    tree = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    shown = {("data", "prompt"), ("data", "answer"), ("data", "heldout"), ("loss", "algorithm")}
    recipe = load_recipe(name)
    for section, table in tree.items():
        for key, value in table.items():
            default = type(getattr(recipe, section)).__dataclass_fields__[key].default
            assert (section, key) in shown or value != default, f"[{section}] {key}"


def test_the_14b_recipe_is_the_7b_one_with_another_model():
    """So that the 7B one's trial on random weights (test_train.py) is its own too."""
    small, large = (load_recipe(f"math-qwen2.5-{size}-24gib") for size in ("7b", "14b"))
    assert replace(large, model=replace(large.model, name=small.model.name)) == small


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_what_was_not_measured_on_a_gpu_is_said_in_so_many_words(size):
    header = list_recipes()[f"math-qwen2.5-{size}-24gib"]
    assert "measured peak: not measured yet, no GPU" in header


@pytest.mark.parametrize("size", ["7b", "14b"])
def test_the_plan_in_a_header_is_what_the_command_prints(size):
    name = f"math-qwen2.5-{size}-24gib"
    printed = CliRunner().invoke(cli, ["plan", "--recipe", name, "--host-memory", "64GiB", "--json"])
    planned = json.loads(printed.stdout)["forms"]["int8"]
    header = list_recipes()[name]
    for phase in ("generating", "learning", "host"):
        assert f"{phase} {planned[f'{phase}_bytes'] / 2**30:.1f} GiB" in header
    assert f"{planned['slots']} slots" in header
    assert f"micro-batches of {planned['micro_tokens']:,} tokens" in header
    assert f"fits from {upwards(planned['least_bytes'])} on" in header


def test_the_least_budgets_of_the_readme_are_what_plan_says_for_its_shape():
    readme = " ".join((RECIPES.parent / "README.md").read_text(encoding="utf-8").split())
    assert "128 sequences of 1024 tokens, 512 KV entries a slot and 64 GiB of host memory" in readme
    least = {}
    for size in ("7b", "14b"):
        words = ["plan", "--recipe", f"math-qwen2.5-{size}-24gib", "--host-memory", "64GiB", "--json"]
        printed = CliRunner().invoke(cli, [*words, "--prompt-tokens", "256", "--max-tokens", "768"])
        forms = json.loads(printed.stdout)["forms"]
        least |= {(size, form): upwards(forms[form]["least_bytes"]) for form in ("int8", "bf16")}
    assert (
        f"7B fits from {least['7b', 'int8']} with int8 weights and from {least['7b', 'bf16']} in bf16"
        in readme
    )
    assert f"14B from {least['14b', 'int8']} with int8" in readme


def test_real_models_learn_at_the_rate_of_the_sgd_paper_and_the_tiny_one_at_its_own():
    rates = {name: load_recipe(name).learner.lr for name in NAMES}
    assert rates.pop("tiny") == 0.01
    assert set(rates.values()) == {0.1}
