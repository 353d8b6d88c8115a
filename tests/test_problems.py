"""problems.py: rows in, token ids and answers out; what cannot be used is named by file and line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from frugal_rl import problems, tasks
from frugal_rl.errors import InputError
from frugal_rl.problems import draw, load_problems, order, same_prompt

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FRUGAL_RL_DATA", ROOT.parent / "shared" / "data"))
needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no data folder: set FRUGAL_RL_DATA to one with gsm8k/ and math/"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}{% endfor %}[/]"
)


@dataclass(frozen=True)
class Data:
    source: str
    prompt: str = "prompt"
    answer: str = "answer"
    answer_after: str | None = None
    heldout: int | str = 0
    system: str | None = None
    suffix: str | None = None
    format: str = "chat"
    template: Any = None


def byte_tokenizer(template: str | None = CHATML, **special: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of the Qwen kind: no BOS, no unknown."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        **special,
    )
    tokenizer.chat_template = template
    return tokenizer


def bos_tokenizer(template: str | None = LLAMA, *, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """One of the Llama kind: every text gets a BOS (and, if asked for, an EOS) of the tokenizer's own."""
    tokenizer = byte_tokenizer(template, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|im_end|>" if adds_eos else "<s> $A",
        special_tokens=[
            ("<s>", tokenizer.bos_token_id),
            ("<|im_end|>", tokenizer.eos_token_id),
        ],
    )
    return tokenizer


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def some_rows(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"what is {i} plus 1?", "answer": str(i + 1)} for i in range(n)]


def load(source: str, tokenizer: Any = None, max_prompt_tokens: int = 10_000, **data: Any) -> Any:
    return load_problems(Data(source, **data), tokenizer or byte_tokenizer(), max_prompt_tokens)


# ---- reading rows ----


def test_rows_become_problems_with_id_answer_and_the_whole_row(tmp_path: Path) -> None:
    row = {"q": "1+1?", "a": "it is 2\n#### 1,002", "level": 3}
    got = load(write(tmp_path / "x.jsonl", "", row), prompt="q", answer="a", answer_after="####")
    (problem,) = got.train
    assert (problem.id, problem.answer, dict(problem.row)) == ("x.jsonl:2", "1,002", row)
    assert got.heldout == [] and got.notes == []


def test_the_answer_follows_the_last_mark_and_a_number_is_an_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "#### 1 #### 2 "})
    assert load(source, answer_after="####").train[0].answer == "2"
    assert load(write(tmp_path / "y.jsonl", {"prompt": "p", "answer": 7})).train[0].answer == "7"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": "p", "answer": }', "bad.jsonl:2: not JSON: Expecting value at column 27"),
        ("[1, 2]", "bad.jsonl:2: expected an object with fields, got list"),
        ("[" * 100_000, "bad.jsonl:2: not JSON"),
        (
            '{"promt": "p", "answer": "1"}',
            "bad.jsonl:2: no field 'prompt' (it has 'promt', 'answer'); did",
        ),
        ('{"prompt": "p"}', "bad.jsonl:2: no field 'answer' (it has 'prompt')"),
        (
            '{"prompt": " ", "answer": "1"}',
            "bad.jsonl:2: 'prompt' must be a text that is not empty",
        ),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "bad.jsonl:2: 'prompt' must be a text"),
        ('{"prompt": "p", "answer": null}', "bad.jsonl:2: 'answer' must be a text or a number"),
        ('{"prompt": "p", "answer": true}', "bad.jsonl:2: 'answer' must be a text or a number"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    source = write(tmp_path / "bad.jsonl", {"prompt": "p", "answer": "1"}, line)
    with pytest.raises(InputError) as caught:
        load(source)
    assert says in str(caught.value)


def test_fields_within_fields_are_named_by_a_dot(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": ["2"], "style": "rule"},
    }
    source = write(tmp_path / "x.jsonl", row, {**row, "reward_model": {"style": "rule"}})
    with pytest.raises(InputError, match=r"x\.jsonl:2, in 'reward_model': no field 'ground_truth'"):
        load(source, answer="reward_model.ground_truth")
    good = write(tmp_path / "y.jsonl", row)
    assert load(good, answer="reward_model.ground_truth").train[0].answer == "2"
    flat = write(
        tmp_path / "z.jsonl", {"prompt": "p", "a.b": 1, "a": {"b": 2}}
    )  # a name with a dot is a name
    assert load(flat, answer="a.b").train[0].answer == "1"


def test_the_answer_can_stand_in_the_last_box_of_a_solution(tmp_path: Path) -> None:
    solution = r"First \boxed{1}, then $\boxed{\frac{1}{2}}$."
    source = write(tmp_path / "x.jsonl", {"prompt": "p", "solution": solution})
    for mark in ("\\boxed", "\\boxed{"):
        assert load(source, answer="solution", answer_after=mark).train[0].answer == r"\frac{1}{2}"
    source = write(tmp_path / "y.jsonl", {"prompt": "p", "solution": r"\boxed{1"})
    with pytest.raises(InputError, match=r"y\.jsonl:1: 'solution' has no balanced \\boxed\{\}"):
        load(source, answer="solution", answer_after="\\boxed")


def test_a_prompt_that_ends_with_the_assistants_message_is_refused(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    source = write(tmp_path / "x.jsonl", {"prompt": chat, "answer": "2"})
    with pytest.raises(InputError, match=r"x\.jsonl:1: 'prompt' ends with the assistant's message"):
        load(source)


def test_bytes_that_are_not_utf8_and_a_missing_mark_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not UTF-8 at byte 12"):
        load(str(path))
    source = write(tmp_path / "x.jsonl", {"prompt": "p", "answer": "7"})
    with pytest.raises(InputError, match=r"x\.jsonl:1: 'answer' has no '####' \(data.answer_after\)"):
        load(source, answer_after="####")


def test_a_file_that_is_missing_or_empty_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *some_rows(3))
    with pytest.raises(InputError, match=r"no such file; did you mean .*train\.jsonl"):
        load(str(tmp_path / "trian.jsonl"))
    with pytest.raises(InputError, match=r"no rows"):
        load(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "x.csv").write_bytes(b"prompt,answer")
    with pytest.raises(InputError, match=r"expected a JSON Lines file .*or a Parquet file"):
        load(str(tmp_path / "x.csv"))


# ---- the split ----


def test_the_split_depends_on_what_the_file_holds_not_on_its_order(tmp_path: Path) -> None:
    rows = some_rows(200)
    shuffled = random.Random(1).sample(rows, len(rows))
    one = load(write(tmp_path / "a.jsonl", *rows), heldout=40)
    two = load(write(tmp_path / "b.jsonl", *shuffled), heldout=40)
    assert [p.prompt for p in one.heldout] == [p.prompt for p in two.heldout]
    assert len(one.heldout) == 40 and len(one.train) == 160
    assert {p.prompt for p in one.train} == {p.prompt for p in two.train}
    numbers = sorted(int(p.answer) for p in one.heldout)
    assert numbers != list(range(1, 41)) and numbers != list(range(161, 201))


def test_a_larger_held_out_set_contains_the_smaller_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(100))
    small, large = (load(source, heldout=n).heldout for n in (10, 30))
    assert [p.id for p in large[:10]] == [p.id for p in small]


def test_a_prompt_that_comes_twice_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = some_rows(50)
    twins = [{"prompt": "  " + r["prompt"].upper() + "\n", "answer": r["answer"]} for r in rows]
    got = load(write(tmp_path / "a.jsonl", *rows, *twins), heldout=25)
    keys = [{same_prompt(p.row["prompt"]) for p in side} for side in (got.train, got.heldout)]
    assert not keys[0] & keys[1]
    assert (len(got.heldout), len(keys[1]), len(got.train)) == (25, 25, 50)


def test_a_held_out_number_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(5))
    with pytest.raises(InputError, match=r"heldout = 5 leaves nothing to train on, the file has 5"):
        load(source, heldout=5)
    with pytest.raises(InputError, match=r"heldout is -1"):
        load(source, heldout=-1)


def test_a_held_out_file_that_shares_prompts_is_refused_with_the_first_one(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(5))
    clean = write(tmp_path / "b.jsonl", {"prompt": "other", "answer": "1"})
    assert [p.answer for p in load(source, heldout=clean).heldout] == ["1"]
    leak = write(tmp_path / "c.jsonl", {"prompt": "other", "answer": "1"}, some_rows(3)[2])
    with pytest.raises(InputError, match=r"1 of 2 held-out prompts .*c\.jsonl:2 is .*a\.jsonl:3"):
        load(source, heldout=leak)


# ---- built-in tasks ----


def stub_task(name: str, train: int, heldout: int) -> Any:
    rows = some_rows(train + heldout)
    sides = {"train": rows[:train], "heldout": rows[train:]}
    return SimpleNamespace(name=name, rows=lambda split: sides[split], reward="last")


def test_a_built_in_task_brings_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", {"chain": stub_task("chain", 7, 5)})
    got = load("chain", heldout=3, prompt="ignored")
    assert (len(got.train), len(got.heldout), got.notes) == (7, 3, [])
    assert got.train[0].id == "chain:train:1" and got.heldout[0].id == "chain:heldout:1"
    more = load("chain", heldout=9)
    assert len(more.heldout) == 5 and "has 5 held-out problems, not 9" in more.notes[0]


def test_an_unknown_task_is_answered_with_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", {"chain": stub_task("chain", 7, 5)})
    with pytest.raises(
        InputError, match=r"'chian' is neither a file nor a built-in task .* did you mean 'chain'"
    ):
        load("chian")


# ---- token ids ----


def test_a_prompt_goes_through_the_chat_template_with_system_and_suffix(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source = write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": "2"})
    (problem,) = load(source, tokenizer, system="be brief", suffix=" Box it.").train
    expected = (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\n1+1? Box it.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert problem.prompt == expected
    assert tokenizer.decode(problem.prompt_ids) == expected
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert problem.prompt_ids.count(start) == 3 and all(type(i) is int for i in problem.prompt_ids)


def test_a_template_that_writes_its_own_bos_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer()
    assert tokenizer.encode("x").count(tokenizer.bos_token_id) == 1
    source = write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": "2"})
    (problem,) = load(source, tokenizer).train
    assert problem.prompt_ids.count(tokenizer.bos_token_id) == 1
    assert problem.prompt_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in problem.prompt_ids


def test_a_refusal_of_the_template_names_the_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": "2"})
    with pytest.raises(InputError, match=r"a\.jsonl:1: the chat template refuses .*no system role"):
        load(source, bos_tokenizer(), system="be brief")


def test_a_prompt_of_messages_is_rendered_as_it_is(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "U2"},
    ]
    source = write(tmp_path / "a.jsonl", {"prompt": messages, "answer": "2"})
    (problem,) = load(source, suffix="!").train
    assert problem.prompt.endswith("A<|im_end|>\n<|im_start|>user\nU2!<|im_end|>\n<|im_start|>assistant\n")
    assert problem.row["prompt"] == messages  # the row is left as it was read
    with pytest.raises(InputError, match=r"a\.jsonl:1: the prompt has a system message"):
        load(source, system="another")
    with pytest.raises(InputError, match=r"needs data.format = 'chat'"):
        load(source, format="plain")


def test_no_chat_template_means_plain_prompts_said_once(tmp_path: Path) -> None:
    tokenizer = bos_tokenizer(None)
    got = load(write(tmp_path / "a.jsonl", *some_rows(9)), tokenizer, suffix=" =", heldout=2)
    assert got.notes == ["the tokenizer has no chat template: prompts are given as plain text"]
    problem = got.train[0]
    assert problem.prompt == problem.row["prompt"] + " ="
    assert problem.prompt_ids[0] == tokenizer.bos_token_id


def test_plain_text_is_tokenised_as_it_stands_with_its_special_tokens(tmp_path: Path) -> None:
    text = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = byte_tokenizer()
    source = write(tmp_path / "a.jsonl", {"prompt": text, "answer": "2"})
    (problem,) = load(source, tokenizer, format="plain").train
    assert problem.prompt == text and tokenizer.decode(problem.prompt_ids) == text
    assert len(problem.prompt_ids) == len(text) - 2 * 11 - 9  # three special tokens, the rest bytes


@pytest.mark.parametrize("text", ["1+1?", "<s>1+1?"])
def test_plain_text_has_one_bos_and_no_eos(tmp_path: Path, text: str) -> None:
    tokenizer = bos_tokenizer(None, adds_eos=True)
    assert tokenizer.encode("x")[-1] == tokenizer.eos_token_id
    source = write(tmp_path / "a.jsonl", {"prompt": text, "answer": "2"})
    (problem,) = load(source, tokenizer, format="plain").train
    assert tokenizer.decode(problem.prompt_ids) == "<s>1+1?"


def test_prompts_over_the_limit_are_left_out_counted_and_said(tmp_path: Path) -> None:
    rows = [*some_rows(3), {"prompt": "x" * 500, "answer": "1"}]
    source = write(tmp_path / "a.jsonl", *rows)
    length_tokens = max(len(p.prompt_ids) for p in load(source).train[:3])
    got = load(source, max_prompt_tokens=length_tokens)
    assert len(got.train) == 3
    assert got.notes == [
        f"1 of 4 training problems left out: their prompts have more than {length_tokens} tokens"
    ]
    with pytest.raises(InputError, match=r"every training prompt has more than 5 tokens"):
        load(source, max_prompt_tokens=5)


def test_characters_that_the_tokenizer_does_not_know_are_said(tmp_path: Path) -> None:
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "1": 1, "+": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    source = write(tmp_path / "a.jsonl", {"prompt": "1+1", "answer": "2"}, {"prompt": "1*1", "answer": "1"})
    got = load(source, tokenizer, format="plain")
    assert got.notes == ["1 prompts have characters that the tokenizer does not know and gives as '<unk>'"]


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(3))
    with pytest.raises(InputError, match=r"data.system is a message of a chat"):
        load(source, format="plain", system="S")
    with pytest.raises(InputError, match=r"data.format is 'chatty'"):
        load(source, format="chatty")


THINKING = CHATML + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% generation %}{% endgeneration %}{% for x in [1] %}{% break %}{% endfor %}{{ bos_token }}"
)


def test_switches_reach_the_chat_template(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(2))
    tokenizer = byte_tokenizer(THINKING.replace("{% generation %}{% endgeneration %}", ""))
    thinks, not_ = (
        load(source, tokenizer, template={"enable_thinking": value}).train[0] for value in (True, False)
    )
    assert not_.prompt == thinks.prompt + "<think>\n\n</think>\n\n"
    assert tokenizer.decode(not_.prompt_ids) == not_.prompt
    assert load(source, tokenizer).train[0].prompt == thinks.prompt


@pytest.mark.parametrize(
    ("template", "known"), [(THINKING, "'enable_thinking'"), (CHATML, "none"), (None, "none")]
)
def test_a_switch_that_the_template_does_not_use_is_refused_by_name(
    tmp_path: Path, template: str | None, known: str
) -> None:
    source = write(tmp_path / "a.jsonl", *some_rows(2))
    with pytest.raises(InputError) as caught:
        load(source, byte_tokenizer(template), template={"thinking": True})
    wanted = f"'thinking', which the model's chat template does not use (its switches: {known})"
    assert wanted in str(caught.value)


# ---- real files ----


@needs_shared_data
def test_gsm8k_loads_as_it_is() -> None:
    got = load(
        str(SHARED / "gsm8k" / "test.jsonl"),
        prompt="question",
        answer_after="####",
        heldout=str(SHARED / "gsm8k" / "train.jsonl"),
    )
    assert (len(got.train), len(got.heldout), got.notes) == (1319, 7473, [])
    assert got.train[0].answer == "18" and got.heldout[0].answer == "72"


@needs_shared_data
def test_chat_formatted_math_loads_as_it_is() -> None:
    got = load(
        str(SHARED / "math" / "simplerl_level3to5.jsonl"),
        answer="label",
        format="plain",
        heldout=500,
    )
    assert (len(got.train), len(got.heldout)) == (8523 - 500, 500)  # one prompt comes twice
    assert all(p.prompt.endswith("<|im_start|>assistant\n") for p in got.train)


# ---- the order ----


def test_an_epoch_is_a_permutation_and_another_one_each_time() -> None:
    first, second, reseeded = order(100, 7, 0), order(100, 7, 1), order(100, 8, 0)
    assert sorted(first) == sorted(second) == sorted(reseeded) == list(range(100))
    assert len({first, second, reseeded}) == 3


def test_the_order_is_the_same_on_every_machine() -> None:
    assert order(8, 0, 0) == (0, 3, 7, 5, 1, 2, 6, 4)


def test_draws_resume_from_one_integer() -> None:
    whole = draw(10, 3, 0, 35)
    parts, at = [], 0
    for count in (4, 1, 9, 16, 5):
        parts += draw(10, 3, at, count)
        at += count
    assert parts == whole
    assert all(sorted(whole[e * 10 : e * 10 + 10]) == list(range(10)) for e in range(3))
    with pytest.raises(ValueError, match=r"no problems"):
        draw(0, 0, 0, 1)


def test_importing_problems_loads_no_torch() -> None:
    code = "import sys, frugal_rl.problems; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert problems.__doc__
