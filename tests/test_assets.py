"""The embedded model: an ordinary Hugging Face folder that can do its task and rarely does."""

from __future__ import annotations

import importlib.util
import itertools
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from frugal_rl import tasks
from frugal_rl.tasks import TASKS, is_heldout

FOLDER = Path(tasks.__file__).parent / "assets" / "tiny"
TOOL = Path(__file__).parents[1] / "tools" / "build_tiny.py"
MOST_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def build_tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tiny", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_holds_the_files_of_a_hugging_face_model_within_4_mib() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= MOST_BYTES


def test_every_tensor_is_bf16_and_the_tied_head_is_stored_once() -> None:
    data = (FOLDER / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    assert json.loads((FOLDER / "config.json").read_text())["tie_word_embeddings"] is True


def test_every_text_survives_encoding_and_decoding(tokenizer: Any) -> None:
    texts = ["Q:last digit of 7+8?\nA:", "  two  blanks ", "Grüße, 東京 \U0001f600", "a\r\n\tb\0c"]
    every_ascii = "".join(map(chr, range(128)))
    for text in [*texts, every_ascii]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_token_is_a_byte(tokenizer: Any) -> None:
    assert tokenizer("7+8=15;é")["input_ids"] == list("7+8=15;é".encode())


def test_end_and_padding_are_different_tokens_and_the_last_of_the_vocabulary(
    tokenizer: Any, model: Any
) -> None:
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model.generation_config.eos_token_id == 256
    assert model.generation_config.pad_token_id == 257
    assert tokenizer("1<eos>")["input_ids"] == [49, 256]


def test_chat_template_writes_question_and_answer_lines(tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "last digit of 7+8?"},
        {"role": "assistant", "content": "7+8=15;5"},
        {"role": "user", "content": "again"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "Q:last digit of 7+8?\nA:7+8=15;5<eos>\nQ:again\nA:"
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False) == "Q:last digit of 7+8?\n"


def test_chat_template_refuses_a_system_message_by_name(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="user and assistant messages, not 'system'"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)


def test_base_is_able_but_not_in_the_habit(model: Any, tokenizer: Any, build_tiny: ModuleType) -> None:
    """Greedy, on 160 held-out problems; bounds are four standard deviations off recorded scores."""
    rows = TASKS["last-digit"].rows("heldout")[:160]
    responses = build_tiny.answers(model, tokenizer, [r["prompt"] for r in rows], sampled=False)
    right = [
        build_tiny.final_answer(response.removesuffix("<eos>")) == row["answer"]
        for response, row in zip(responses, rows, strict=True)
    ]
    worked = ["+" in response for response in responses]
    right_when_worked = sum(r for r, w in zip(right, worked, strict=True) if w)
    right_when_bare = sum(r for r, w in zip(right, worked, strict=True) if not w)
    assert 0.15 * len(rows) <= sum(right) <= 0.45 * len(rows)
    assert sum(worked) >= 0.1 * len(rows)
    assert right_when_worked >= 0.95 * sum(worked)
    assert right_when_bare <= 0.25 * (len(rows) - sum(worked))


def test_the_working_is_a_chain_of_true_sums_that_ends_in_the_answer(
    build_tiny: ModuleType,
) -> None:
    assert build_tiny.working("last digit of 7+8+6+9?") == "7+8=15;5+6=11;1+9=10;0"
    for row in TASKS["last-digit"].rows("heldout"):
        *steps, answer = build_tiny.working(row["prompt"]).split(";")
        assert answer == row["answer"] == build_tiny.final_answer(";".join([*steps, answer]))
        for step in steps:
            terms, _, total = step.partition("=")
            left, _, right = terms.partition("+")
            assert int(left) + int(right) == int(total)


def test_what_the_base_learns_from_holds_no_heldout_problem(build_tiny: ModuleType) -> None:
    stream = build_tiny.examples(build_tiny.SEED)
    assert not any(is_heldout(next(stream)[0]["prompt"]) for _ in range(3000))


def test_a_learning_batch_covers_the_answer_and_its_end_alone(build_tiny: ModuleType, tokenizer: Any) -> None:
    question = "last digit of 1+1+1+1?"
    pairs = [(question, "=4"), (question, build_tiny.working(question))]
    ids_BT, labels_BT = build_tiny.supervised_batch(tokenizer, pairs)
    learned = [tokenizer.decode(ids[labels != -100]) for ids, labels in zip(ids_BT, labels_BT, strict=True)]
    assert torch.equal(ids_BT[labels_BT != -100], labels_BT[labels_BT != -100])
    assert learned == ["=4<eos>", "1+1=2;2+1=3;3+1=4;4<eos>"]
    assert tokenizer.decode(ids_BT[1]) == "Q:last digit of 1+1+1+1?\nA:1+1=2;2+1=3;3+1=4;4<eos>"
    assert ids_BT[0, -1] == tokenizer.pad_token_id


def test_two_builds_write_the_same_bytes_and_another_seed_does_not(
    build_tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"SKILL_STEPS": 1, "HABIT_STEPS": 1, "BATCH": 4}.items():
        monkeypatch.setattr(build_tiny, name, value)
    build_tiny.build(tmp_path / "first")
    build_tiny.build(tmp_path / "second")
    monkeypatch.setattr(build_tiny, "SEED", build_tiny.SEED + 1)
    build_tiny.build(tmp_path / "other")
    first, second, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second", "other")
    )
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]
    assert first.keys() == {path.name for path in FOLDER.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shipped, made = json.loads((FOLDER / name).read_text()), json.loads(first[name])
        common = shipped.keys() & made.keys() - {"transformers_version"}  # others come and go
        assert {key: shipped[key] for key in common} == {key: made[key] for key in common}


def test_lessons_are_worked_at_first_and_then_as_often_as_their_length_says(
    build_tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tiny, "SKILL_STEPS", 3)
    batches = list(itertools.islice(build_tiny.lessons(), 43))
    assert all("+" in answer for batch in batches[:3] for _, answer in batch)
    habit = [pair for batch in batches[3:] for pair in batch]
    for terms, share in build_tiny.WORKED_SHARE.items():
        worked = ["+" in answer for question, answer in habit if question.count("+") + 1 == terms]
        assert abs(sum(worked) / len(worked) - share) < 0.06
