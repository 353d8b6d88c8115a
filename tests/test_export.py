"""What leaves a run: each form is the base with the run's patch, exactly, and says how to use it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from frugal_rl import checkpoint
from frugal_rl.checkpoint import Checkpoint
from frugal_rl.cli import cli
from frugal_rl.config import load_recipe, read_recipe
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.export import Turns, finished, go_template
from frugal_rl.gguf import change
from frugal_rl.gguf.file import Gguf
from frugal_rl.gguf.write import convert
from frugal_rl.journal import Journal
from frugal_rl.models import find_model, load_tokenizer
from frugal_rl.patch import Patch
from frugal_rl.session import Reporter, open_session
from frugal_rl.train import train

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "+ '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('no') }}"
    "{% endif %}{% endfor %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
BRACES = CHATML.replace("You are kind.", "{{ '{{' }} x }}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    recipe = load_recipe(
        "tiny", ["train.steps=2", "rollout.prompts=4", "rollout.samples=4", "data.heldout=16"]
    )
    report = Reporter(lambda text: None, lambda row: None)
    with open_session(recipe, report) as session:
        train(session, Journal.create(folder, recipe, force=False), report, lambda: False)
    return folder


def command(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["export", *map(str, arguments)])
    error = result.exception
    if isinstance(error, FrugalError):
        return 2 if isinstance(error, InputError) else 1, str(error)
    assert error is None or isinstance(error, SystemExit), error
    return result.exit_code, result.output


def bits(folder: Path) -> dict[str, bytes]:
    found = Checkpoint(folder)
    return {name: found.bits(name).tobytes() for name in found.tensors}


def test_hf_is_the_checkpoint_with_the_patch_and_all_its_other_files(run: Path, tmp_path: Path) -> None:
    assert command(run, "--format", "hf", "-o", tmp_path / "out")[0] == 0
    base = find_model("tiny").folder
    checkpoint.apply(base, run / "patch.safetensors", tmp_path / "expected")
    assert bits(tmp_path / "out") == bits(tmp_path / "expected") != bits(base)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in base.iterdir()}


@pytest.mark.parametrize("kind", [None, "bf16"])
def test_gguf_is_what_the_trained_checkpoint_converts_to(run: Path, kind: str | None, tmp_path: Path) -> None:
    chosen = ["--type", kind] if kind else []
    code, text = command(run, "--format", "gguf", *chosen, "-o", tmp_path / "out")
    path = tmp_path / "out" / f"tiny-my-run-{kind or 'q8_0'}.gguf"
    assert code == 0 and "ollama create tiny" in text
    checkpoint.apply(find_model("tiny").folder, run / "patch.safetensors", tmp_path / "hf")
    convert(find_model(str(tmp_path / "hf")), tmp_path / "expected.gguf", kind or "q8_0", None)
    ours, expected = Gguf.read(path), Gguf.read(tmp_path / "expected.gguf")
    for name, tensor in expected.tensors.items():
        assert ours.blocks(ours.tensors[name], "r").tobytes() == expected.blocks(tensor, "r").tobytes()
    patch = Patch.load(run / "patch.safetensors")
    assert change.verify(path, patch, find_model("tiny").folder, full=True).state == "applied"
    assert ours.metadata["tokenizer.ggml.model"] == "gpt2" and "tokenizer.chat_template" in ours.metadata


def test_the_modelfile_has_template_and_stops(run: Path, tmp_path: Path) -> None:
    command(run, "--format", "gguf", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        "FROM ./tiny-my-run-q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}Q:{{ .Content }}\n'
        '{{ else if eq .Role "assistant" }}A:{{ .Content }}<eos>\n'
        '{{ end }}{{ end }}A:"""\n'
        'PARAMETER stop "<eos>"\n'
        "PARAMETER temperature 1\n"
    )


def test_patch_comes_with_a_card_that_says_base_scores_and_use(run: Path, tmp_path: Path) -> None:
    assert command(run, "--format", "patch", "-o", tmp_path / "out")[0] == 0
    out = tmp_path / "out"
    assert (out / "patch.safetensors").read_bytes() == (run / "patch.safetensors").read_bytes()
    text = (out / "README.md").read_text(encoding="utf-8")
    patch = Patch.load(run / "patch.safetensors")
    after = patch.meta["metrics"]["accuracy_after"]
    assert text.startswith("---\nlibrary_name: frugal_rl\n")
    assert f"| trained | {after['value']:.1%} |" in text and f"{patch.entries:,} entries" in text
    assert str(patch.base.fingerprint) in text and "frugal-rl patch apply" in text
    recipe = re.search(r"```toml\n(.*?)```", text, re.S)
    assert recipe is not None and tomllib.loads(recipe[1])["data"]["source"] == "last-digit"
    assert read_recipe((out / "recipe.toml").read_text()).train.steps == 2
    assert "base_model" not in text  # it is no model of the hub


def test_a_hub_model_is_named_in_the_cards_metadata(run: Path) -> None:
    from dataclasses import replace

    from frugal_rl.export import card

    done = finished(run, None)
    text = card(replace(done, files=replace(done.files, name="Qwen/Qwen2.5-0.5B")))
    assert "\nbase_model: Qwen/Qwen2.5-0.5B\n" in text.partition("\n---\n")[0] + "\n"
    assert "frugal-rl patch apply Qwen/Qwen2.5-0.5B patch.safetensors -o trained" in text


def test_an_earlier_step_is_its_own_patch(run: Path, tmp_path: Path) -> None:
    assert command(run, "--format", "patch", "--step", 1, "-o", tmp_path / "one")[0] == 0
    assert command(run, "--format", "patch", "--step", 2, "-o", tmp_path / "two")[0] == 0
    one, two, last = (Patch.load(p / "patch.safetensors") for p in (tmp_path / "one", tmp_path / "two", run))
    assert two.tensors == last.tensors != one.tensors and one.base == last.base


@pytest.mark.parametrize("form", ["hf", "gguf", "patch"])
def test_an_output_is_replaced_only_where_it_is_an_export_and_only_with_force(
    run: Path, form: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command(run, "--format", form, "-o", out)[0] == 0
    code, text = command(run, "--format", form, "-o", out)
    assert code == 2 and "exists; give another folder, or --force" in text
    assert command(run, "--format", form, "-o", out, "--force")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, text = command(run, "--format", form, "-o", tmp_path / "mine", "--force")
    assert code == 2 and "does not replace it" in text
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_what_is_no_finished_run_is_refused_with_what_would_do(run: Path, tmp_path: Path) -> None:
    code, text = command(tmp_path, "--format", "hf", "-o", tmp_path / "out")
    assert code == 2 and "is not a run folder" in text
    code, text = command(run, "--format", "hf", "--step", 9, "-o", tmp_path / "out")
    assert code == 2 and "has 2 steps, not 9" in text
    Journal.create(tmp_path / "begun", load_recipe("tiny"), force=False)
    code, text = command(tmp_path / "begun", "--format", "hf", "-o", tmp_path / "out")
    assert code == 2 and "has not ended" in text and "--step N" in text
    code, text = command(run, "--format", "hf", "--type", "bf16", "-o", tmp_path / "out")
    assert code == 2 and "--type is for --format gguf" in text
    assert not (tmp_path / "out").exists()


def test_pushing_without_a_network_keeps_the_folder_and_says_how_to_go_on(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = command(run, "--format", "patch", "-o", out, "--push", "me/patch")
    assert code == 1 and "is written but was not pushed" in text and f"hf upload me/patch {out}" in text
    assert (out / "patch.safetensors").exists()


@pytest.mark.parametrize(("name", "why"), [("me", "OWNER/me"), ("a/b/c", "is no name of the hub")])
def test_a_bad_name_is_refused_before_anything_is_written(
    run: Path, name: str, why: str, tmp_path: Path
) -> None:
    code, text = command(run, "--format", "patch", "-o", tmp_path / "out", "--push", name)
    assert code == 2 and why in text
    assert not (tmp_path / "out").exists()


# --- templates


def tokenizer_with(template: str) -> Any:
    tokenizer = load_tokenizer(find_model("tiny"))
    tokenizer.bos_token, tokenizer.chat_template = "<pad>", template
    return tokenizer


def test_chatml_with_a_default_system_message() -> None:
    assert go_template(tokenizer_with(CHATML), begins=False) == (
        "{{ if not .System }}<|im_start|>system\nYou are kind.<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_a_template_that_trims_what_is_said_is_written_as_if_it_did_not() -> None:
    texts = {go_template(tokenizer_with(template), begins=False) for template in (CHATML, TRIMS)}
    assert len(texts) == 1 and None not in texts


def test_a_beginning_that_comes_by_itself_is_not_said_again() -> None:
    text = go_template(tokenizer_with(LLAMA3), begins=True)
    assert text is not None and "<pad>" not in text and "{{ if not .System }}" not in text
    assert '{{ if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>\n\n{{ .Content }}' in text


def test_a_template_without_system_messages_has_no_place_for_them() -> None:
    text = go_template(tokenizer_with(MISTRAL), begins=True)
    assert text == (
        '{{ range .Messages }}{{ if eq .Role "user" }}[INST] {{ .Content }} [/INST]'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<eos>{{ end }}{{ end }}'
    )


@pytest.mark.parametrize("template", [BRACES, "{{ raise_exception('never') }}", "no turns at all"])
def test_what_is_no_row_of_turns_is_not_written_down(template: str) -> None:
    assert go_template(tokenizer_with(template), begins=False) is None


def test_pieces_put_together_are_the_conversation() -> None:
    turns = Turns("h|", {"system": ("s(", ")"), "user": ("u(", ")"), "assistant": ("a(", ")")}, "a(")
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    assert turns.render([user, answer, user]) == "h|u(x)a(y)u(x)a("
    assert turns.render([{"role": "system", "content": "z"}, user]) == "s(z)u(x)a("
