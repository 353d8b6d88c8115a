"""The built-in tasks: right answers, a split that nothing crosses, rows that never change."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys

import pytest

from frugal_rl.errors import InputError
from frugal_rl.tasks import TASKS, is_heldout, last_digit_problems

TASK = TASKS["last-digit"]
TRAIN, HELDOUT = TASK.rows("train"), TASK.rows("heldout")
ROWS = {"train": TRAIN, "heldout": HELDOUT}


def test_tasks_are_listed_under_their_own_names() -> None:
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_the_last_digit_of_the_sum_in_the_prompt(split: str) -> None:
    for row in ROWS[split]:
        assert re.fullmatch(r"last digit of [1-9](\+[1-9]){3,6}\?", row["prompt"])
        total = sum(int(character) for character in row["prompt"] if character.isdigit())
        assert row["answer"] == str(total)[-1], row
        assert set(row) == {"prompt", "answer"}


def test_no_heldout_problem_is_a_training_problem() -> None:
    train = {row["prompt"] for row in TRAIN}
    heldout = {row["prompt"] for row in HELDOUT}
    assert not train & heldout
    assert not any(is_heldout(prompt) for prompt in train)
    assert all(is_heldout(prompt) for prompt in heldout)


def test_a_stream_of_training_problems_meets_no_heldout_problem_whatever_its_seed() -> None:
    heldout = {row["prompt"] for row in HELDOUT}
    for seed in range(5):
        stream = itertools.islice(last_digit_problems(seed, heldout=False), 2000)
        assert not heldout & {row["prompt"] for row in stream}


def test_rows_of_a_split_are_distinct_and_as_many_as_stated() -> None:
    assert len({row["prompt"] for row in TRAIN}) == len(TRAIN) == 4_000
    assert len({row["prompt"] for row in HELDOUT}) == len(HELDOUT) == 500


def test_every_length_has_its_share_of_the_heldout_problems() -> None:
    lengths = [row["prompt"].count("+") + 1 for row in HELDOUT]
    assert sorted(set(lengths)) == [4, 5, 6, 7]
    assert all(100 <= lengths.count(terms) <= 150 for terms in (4, 5, 6, 7))  # 125 on average


def test_one_problem_in_sixteen_is_held_out() -> None:
    share = sum(is_heldout(str(number)) for number in range(16_000))
    assert abs(share - 1000) < 122  # four standard deviations: sqrt(16000 / 16 * 15 / 16) = 30.6


def test_rows_are_the_same_at_every_call_and_belong_to_the_caller() -> None:
    first = TASK.rows("train")
    assert first == TRAIN
    first[0]["answer"] = "spoilt"
    assert TASK.rows("train") == TRAIN


def test_first_rows_and_the_digest_of_all_are_those_recorded() -> None:
    """Golden: a change here changes every recorded score and the embedded model's training set."""
    assert TRAIN[:2] == [
        {"prompt": "last digit of 7+4+3+5+4+8+3?", "answer": "4"},
        {"prompt": "last digit of 6+9+5+3+7?", "answer": "0"},
    ]
    assert HELDOUT[:2] == [
        {"prompt": "last digit of 5+9+1+8+8?", "answer": "1"},
        {"prompt": "last digit of 1+3+9+8+3+8?", "answer": "2"},
    ]
    assert {split: _digest(rows) for split, rows in ROWS.items()} == {
        "train": "92daca1b44c02efc",
        "heldout": "ab340e5d80f13aaf",
    }


def _digest(rows: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def test_an_unknown_split_is_refused_with_the_two_that_exist() -> None:
    with pytest.raises(InputError, match=r"last-digit.*'test'.*'train' or 'heldout'"):
        TASK.rows("test")


def test_tasks_load_no_torch() -> None:
    code = "import sys, frugal_rl.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
