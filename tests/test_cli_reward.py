"""`frugal-rl reward test`: a verdict a row, in order; everything else on standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROWS = [
    {"problem": "1/2?", "answer": "0.5", "response": r"\boxed{\frac12}"},
    {"problem": "x?", "answer": "x+1", "response": r"\boxed{1+x}"},
    {"problem": "2?", "answer": 2, "response": r"\boxed{3}"},
    {"problem": "2?", "answer": "2", "response": "Perhaps 2"},
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "frugal_rl", "reward", "test", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_json_is_one_object_a_row_in_order_and_nothing_else(rows: Path) -> None:
    done = run("math", str(rows), "--json")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["verdict"] for row in found] == ["CORRECT", "CORRECT", "WRONG", "NO_ANSWER"]
    assert [row["reward"] for row in found] == [1.0, 1.0, 0.0, 0.0]
    assert all(row["seconds"] >= 0 for row in found)
    assert "4 rows: CORRECT 2, NO_ANSWER 1, WRONG 1; mean reward 0.5000" in done.stderr


def test_for_people_it_is_a_line_a_row_with_the_reason_and_the_totals(rows: Path) -> None:
    done = run("math", str(rows))
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[0].startswith("rows.jsonl:1  CORRECT")
    assert r"(no \boxed{}, #### or <answer>, nor " in lines[3] and lines[4].startswith("4 rows: ")


def test_a_users_function_is_run_on_all_fields(rows: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def judge(problem, response):\n    return problem['problem'] == '2?'\n")
    done = run(f"{mine}:judge", str(rows), "--json")
    assert [json.loads(line)["reward"] for line in done.stdout.splitlines()] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reward", "line", "why"),
    [
        ("maths", "", "did you mean 'math'"),
        ("math", "{}", "rows.jsonl:5: no field 'answer' (it has none)"),
        ("math", '{"answer": "1"}', "rows.jsonl:5: no field 'response' (it has answer)"),
        ("math", '{"answer": null, "response": ""}', "rows.jsonl:5: 'answer' must be a text or a number"),
        ("math", '{"answer": "1", "response": 1}', "rows.jsonl:5: 'response' must be a text"),
        ("math", "{", "rows.jsonl:5: not JSON"),
    ],
)
def test_bad_input_is_refused_with_its_line(rows: Path, reward: str, line: str, why: str) -> None:
    with rows.open("a") as file:
        file.write(line + "\n")
    done = run(reward, str(rows))
    assert done.returncode == 2 and why in done.stderr


def test_an_installed_entry_point_is_a_reward_and_runs_in_the_workers(tmp_path: Path, rows: Path) -> None:
    """As pip installs it: a module and its dist-info in a folder of sys.path, nothing of ours imported."""
    site = tmp_path / "site"
    (site / "kind_rewards-1.0.dist-info").mkdir(parents=True)
    (site / "kind_rewards-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kind-rewards\nVersion: 1.0\n"
    )
    (site / "kind_rewards-1.0.dist-info" / "entry_points.txt").write_text(
        "[frugal_rl.rewards]\nkind = kind_rewards.judges:generous\n"
    )
    (site / "kind_rewards").mkdir()
    (site / "kind_rewards" / "__init__.py").write_text("")
    (site / "kind_rewards" / "judges.py").write_text(
        "import os\n"
        "def generous(problem, response):\n"
        "    if problem['answer'] == 'x+1': os._exit(1)\n"
        "    if problem['problem'] == '1/2?': raise KeyError(str(os.getppid()))\n"
        "    return 1.5 if '3' in response else 0.25\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{site}"}
    command = [sys.executable, "-m", "frugal_rl", "reward", "test"]
    done = subprocess.run(
        [*command, "kind", str(rows), "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["verdict"] for row in found] == ["ERROR", "ERROR", "CORRECT", "WRONG"]
    assert [row["reward"] for row in found] == [0.0, 0.0, 1.5, 0.25]
    assert "kind on rows.jsonl:1: KeyError" in found[0]["detail"]  # the problem is named
    misspelt = subprocess.run(
        [*command, "kin", str(rows)], env=environment, capture_output=True, text=True, check=False
    )
    assert misspelt.returncode == 2 and "did you mean 'kind'?" in misspelt.stderr
