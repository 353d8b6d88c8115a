"""gym.py and rewards/gym.py: reasoning-gym tasks, split by seeds, scored by their own scorers in workers."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frugal_rl import gym
from frugal_rl.cli_reward import Row
from frugal_rl.errors import InputError
from frugal_rl.reward import Verdict, Verifier
from frugal_rl.tasks import find_task

HAS_GYM = importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(not HAS_GYM, reason="needs reasoning-gym: pip install 'frugal-rl[gym]'")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def problem(row: dict[str, Any]) -> Row:
    return Row("gym:1", row["prompt"], row["answer"], row)


def keys(rows: list[dict[str, str]]) -> set[str]:
    return {" ".join(row["prompt"].casefold().split()) for row in rows}


@needs_gym
@pytest.mark.parametrize("name", ["chain_sum", "knights_knaves", "word_ladder", "mini_sudoku"])
def test_rows_are_distinct_disjoint_and_their_own_right_answers(name: str) -> None:
    rows = gym.gym_rows(name, train=12, heldout=4)
    assert (len(rows["train"]), len(rows["heldout"])) == (12, 4)
    assert len(keys(rows["train"]) | keys(rows["heldout"])) == 16
    with Verifier("gym", workers=1) as verifier:
        assert verifier.check_golds([problem(row) for row in rows["train"]]) == []
        others = [rows["train"][n - 1]["answer"] for n in range(12)]
        pairs = [
            (problem(row), f"I think <answer>{other}</answer>")
            for row, other in zip(rows["train"], others, strict=True)
            if other != row["answer"]
        ]
        assert {one.verdict for one in verifier.judge(pairs)} == {Verdict.WRONG}
        (empty,) = verifier.judge([(problem(rows["train"][0]), "")])
        assert empty.verdict is Verdict.NO_ANSWER


@needs_gym
def test_held_out_items_share_no_seed_with_training_items() -> None:
    import reasoning_gym

    # item i has the seed of the data set plus i: what a seed of 1 would hold out is nearly all trained on
    zero, one = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=9) for seed in (0, 1))
    assert [zero[i + 1]["question"] for i in range(8)] == [one[i]["question"] for i in range(8)]
    assert gym.TRAIN_SEED + gym.DRAWS * 5_000 < gym.HELDOUT_SEED


@needs_gym
def test_a_task_with_few_prompts_keeps_some_for_training_and_some_apart() -> None:
    rows = gym.gym_rows("coin_flip", train=400, heldout=50)
    train, heldout = keys(rows["train"]), keys(rows["heldout"])
    assert train and heldout and not train & heldout


@needs_gym
def test_rows_are_made_once_and_are_the_same_in_every_process(cache: Path) -> None:
    first = gym.gym_rows("word_ladder", 6, 2)
    (path,) = (cache / "frugal_rl" / "gym").iterdir()
    data = path.read_bytes()
    path.unlink()
    code = "from frugal_rl.gym import gym_rows; gym_rows('word_ladder', 6, 2)"
    root = str(Path(gym.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert path.read_bytes() == data
    path.write_bytes(json.dumps({"train": [], "heldout": []}).encode())
    assert gym.gym_rows("word_ladder", 6, 2) == {"train": [], "heldout": []} != first


@needs_gym
def test_metadata_keeps_what_json_would_lose() -> None:
    (row, *_) = gym.gym_rows("knights_knaves", 2, 1)["train"]
    statements = ast.literal_eval(row["metadata"])["statements"]
    assert isinstance(statements, tuple)
    pytest.importorskip("numpy")
    import numpy as np

    value = {"a": (np.float64(1.5), [np.str_("x")], {3}), 2: None}
    assert ast.literal_eval(repr(gym._literal(value))) == {"a": (1.5, ["x"], {3}), 2: None}


@needs_gym
def test_an_unknown_task_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"no task 'chain_sums' .*did you mean gym:chain_sum"):
        gym.gym_rows("chain_sums", 2, 1)


@needs_gym
def test_a_row_that_is_none_of_theirs_is_an_error_and_not_a_0() -> None:
    with Verifier("gym", workers=1) as verifier:
        (judged,) = verifier.judge([(Row("x.jsonl:1", "p", "1", {"answer": "1"}), "<answer>1</answer>")])
    assert judged.verdict is Verdict.ERROR
    assert "gym on x.jsonl:1" in judged.detail and "data.source = gym:NAME" in judged.detail


def test_a_task_of_theirs_is_found_by_its_prefix_and_the_package_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    task = find_task("gym:no_such_task")
    assert task is not None and task.reward == "gym"
    for refused in (lambda: task.rows("train"), lambda: Verifier("gym")):
        with pytest.raises(InputError, match=r"pip install 'frugal-rl\[gym\]'"):
            refused()
