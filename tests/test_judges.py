"""The rewards beside math, sums of rewards, and rewards that users write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from frugal_rl.errors import FrugalError, InputError
from frugal_rl.reward import Judgement, Verifier
from frugal_rl.rewards.answers import Verdict
from frugal_rl.rewards.judges import overlong
from frugal_rl.rewards.kinds import Part, read_kind
from frugal_rl.rewards.verifiers import countdown

C, W, N, E, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.ERROR, Verdict.TIMEOUT


@dataclass(frozen=True)
class Problem:
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)
    id: str = "rows.jsonl:7"


def judge(kind: str, answer: str, response: str, **row: Any) -> Judgement:
    with Verifier(kind, workers=1, timeout_s=20.0, on_error=-0.5) as verifier:
        return verifier.judge([(Problem(answer, row), response)])[0]


@pytest.mark.parametrize(
    ("kind", "answer", "response", "verdict"),
    [
        ("numeric(0.01)", "100", r"\boxed{101}", C),
        ("numeric(0.01)", "100", r"\boxed{101.1}", W),
        ("numeric(1/100)", "100", r"\boxed{99}", C),
        ("choice", "B", r"\boxed{B}", C),
        ("choice", "B", r"\boxed{\text{(B)}}", C),
        ("choice", "B", "<answer>b</answer>", C),
        ("choice", "(B)", "Because of that, (B) is right.", C),
        ("choice", "B", "A is wrong.\nSo the answer is B", C),
        ("choice", "B", "<answer>(B) 12 apples</answer>", C),
        ("choice", "B", r"\boxed{A}", W),
        ("choice", "B", r"\boxed{A, B}", W),
        ("choice", "B", "it is A or B", W),
        ("choice", "B", "no idea", N),
        ("choice", "B", "", N),
        ("choice", "12", "B", E),
        ("tags(think, answer)", "", "<think>hm</think>\n<answer>5</answer>", C),
        ("tags(think, answer)", "", "<think>hm</think> so <answer>5</answer>", W),
        ("tags(think, answer)", "", "<answer>5</answer><think>hm</think>", W),
        ("tags(think, answer)", "", "<think>a</think><think>b</think><answer>5</answer>", W),
        ("tags(think)", "", "<think>a", W),
        ("tags(think)", "", "<think>a</think>b", W),
        (r"format(<a>\d{1,3}</a>)", "", "<a>12</a>\n", C),
        (r"format(<a>\d{1,3}</a>)", "", "<a>1234</a>", W),
        ("countdown", "24: 3 3 8 8", r"\boxed{8/(3-8/3)}", C),
        ("countdown", "24: 3 3 8 8", "nothing", W),
    ],
)
def test_verdicts(kind: str, answer: str, response: str, verdict: Verdict) -> None:
    assert judge(kind, answer, response).verdict is verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("8 / (3 - 8/3)", C),
        (r"\boxed{\frac{8}{3-\frac{8}{3}}}", C),
        (r"\boxed{8 \div (3 - 8 \div 3) = 24}", C),
        ("8/(3-8/3) = 25", W),
        ("8*3", C),
        ("3*8*3/3", W),  # three 3
        ("24", W),
        ("8+8+8", W),
        ("8/(3-3)", W),
        ("8*3.0", W),
        ("-8*-3", W),
        ("8**3", W),
        ("__import__('os').system('true')", W),
        ("8*3 if True else 0", W),
        ("(8)(3)", W),
        ("1" * 300, W),
        ("(" * 90 + "8" + ")" * 90, W),
        ("", N),
    ],
)
def test_countdown_reads_an_expression_and_evaluates_nothing(text: str, verdict: Verdict) -> None:
    problem = {"target": 24, "nums": [3, 3, 8, 8]}
    assert countdown(problem, text)[0] is verdict
    assert countdown({"answer": "24: 3 3 8 8"}, text)[0] is verdict


def test_countdown_can_ask_for_all_numbers_and_needs_a_task() -> None:
    assert countdown({"target": 24, "nums": [3, 8, 2], "all": True}, "3*8")[0] is W
    with pytest.raises(ValueError, match="no target"):
        countdown({"answer": "24"}, "3*8")


@pytest.mark.parametrize(("length", "paid"), [(0, 0), (100, 0), (150, -0.5), (200, -1), (999, -1)])
def test_overlong_goes_down_straight_from_free_to_most(length: int, paid: float) -> None:
    assert overlong("x" * length, "100", "200") == paid
    assert judge("overlong(100, 200)", "", "x" * length).reward == paid


def test_a_sum_has_the_first_verdict_and_every_part_by_name() -> None:
    kind = "math + 0.2 * tags(think, answer) + 2 * overlong(10, 30)"
    one = judge(kind, "5", "<think>a</think><answer>5</answer>")
    assert one.verdict is C
    assert one.parts == {"math": 1.0, "tags": 1.0, "overlong": -1.0}
    assert one.reward == pytest.approx(1 + 0.2 - 2)
    other = judge(kind, "5", "I got 6.")
    assert (other.verdict, other.parts) == (N, {"math": 0.0, "tags": 0.0, "overlong": 0.0})


def test_a_kind_is_cut_at_pluses_outside_brackets() -> None:
    assert read_kind(r"math + 0.5*format((a + b),\d+)") == (
        Part(1.0, "math"),
        Part(0.5, "format", (r"(a + b),\d+",), "frugal_rl.rewards.verifiers:regular_expression"),
    )


@pytest.mark.parametrize(
    "kind", ["numeric(x)", "numeric(-1)", "overlong(20, 10)", "overlong(a, b)", "format([)", "numeric(1/0)"]
)
def test_bad_arguments_are_refused_before_anything_is_judged(kind: str) -> None:
    with pytest.raises(InputError, match="reward "):
        Verifier(kind)


MINE = """
from frugal_rl.rewards.answers import Verdict
import helper

def graded(problem, response):
    return 0.25 * problem["weight"] + helper.bonus(response)

def by_verdict(problem, response):
    return Verdict.NO_ANSWER

def by_truth(problem, response):
    return response == problem["answer"]

def fails(problem, response):
    return 1 / int(response)

def strange(problem, response):
    return "good"

def endless(problem, response):
    return float("nan")

def hangs(problem, response):
    while True: pass
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("def bonus(response):\n    return len(response)\n")
    return str(tmp_path / "mine.py")


def test_a_users_function_gets_all_fields_and_imports_its_neighbours(mine: str) -> None:
    one = judge(f"{mine}:graded", "5", "", weight=3)
    assert (one.verdict, one.reward) == (W, 0.75)
    two = judge(f"{mine}:graded", "5", "abc", weight=4)
    assert (two.verdict, two.reward) == (C, 4.0)
    assert judge(f"{mine}:by_verdict", "5", "").verdict is N
    assert judge(f"{mine}:by_truth", "5", "5").reward == 1.0
    both = judge(f"math + 0.5 * {mine}:by_truth", "5", r"\boxed{5}")
    assert (both.verdict, both.reward) == (C, 1.0)


def test_an_exception_is_an_error_that_names_the_problem(mine: str) -> None:
    for name, why in (
        ("fails", "ZeroDivisionError"),
        ("strange", "TypeError: it returned str"),
        ("endless", "it returned nan"),
    ):
        one = judge(f"{mine}:{name}", "5", "0")
        assert (one.verdict, one.reward) == (E, -0.5)
        assert "rows.jsonl:7" in one.detail and why in one.detail


def test_a_function_that_hangs_is_killed(mine: str) -> None:
    with Verifier(f"{mine}:hangs", workers=1, timeout_s=0.3) as verifier:
        assert verifier.judge([(Problem("5"), "5")])[0].verdict is T


def test_a_function_that_is_not_there_is_told_with_those_that_are(mine: str) -> None:
    with pytest.raises(FrugalError, match=r"no function 'gradde' \(it has .*graded"):
        judge(f"{mine}:gradde", "5", "5")
