"""reward.py and workers.py: a careful person's verdict, in order and in time, whatever comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugal_rl.errors import InputError
from frugal_rl.reward import Verifier
from frugal_rl.rewards.answers import Verdict, final_answer, last_boxed, normalise
from frugal_rl.rewards.judges import KINDS, Decided, compare_math
from frugal_rl.rewards.kinds import BUILT_IN
from frugal_rl.rewards.quantities import quantity

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("FRUGAL_RL_DATA", ROOT.parent / "shared" / "data"))
needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no data folder: set FRUGAL_RL_DATA to one with gsm8k/ and math/"
)
DEADLINE_S = 3.0
SLACK_S = 1.0  # a busy machine wakes the parent this much late
C, W, N, T = Verdict.CORRECT, Verdict.WRONG, Verdict.NO_ANSWER, Verdict.TIMEOUT


@dataclass(frozen=True)
class Gold:
    answer: str


@pytest.fixture(scope="module")
def math() -> Iterator[Verifier]:
    with Verifier("math", workers=2, timeout_s=DEADLINE_S) as verifier:
        yield verifier


# ---- where the answer is ----


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"{{{ \boxed{5}", "5"),
        (r"}}} \boxed{5}}}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{}", ""),
        ("work\n#### 1,234\n", "1,234"),
        ("#### 1\n#### 2", "2"),
        (r"\boxed{1} #### 2", "1"),
        ("<answer> 5\n</answer>", "5"),
        ("<answer>4</answer><answer>5</answer>", "5"),
        ("<answer>5", None),
        (r"\boxed{5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_one_marked(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


def slow_last_boxed(text: str) -> str | None:
    """Every start, every end: the box that closes last."""
    best: tuple[int, str] | None = None
    for start in range(len(text)):
        if not text.startswith(r"\boxed{", start):
            continue
        depth = 0
        for end in range(start + 6, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                if best is None or end > best[0]:
                    best = (end, text[start + 7 : end])
                break
    return best[1] if best else None


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "5", "x"]), max_size=14).map("".join))
@settings(max_examples=300, deadline=None)
def test_the_one_pass_over_braces_is_the_search_over_all_starts(text: str) -> None:
    assert last_boxed(text) == slow_last_boxed(text)


# ---- exact quantities ----


@given(st.integers(-(10**9), 10**9), st.integers(1, 999))
@settings(max_examples=200, deadline=None)
def test_every_spelling_of_a_fraction_is_one_quantity(above: int, below: int) -> None:
    value = Fraction(above, below)
    sign = "-" if above < 0 else ""
    size = abs(above)
    for text in (
        f"{above}/{below}",
        rf"{sign}\frac{{{size}}}{{{below}}}",
        rf"\dfrac{{{above}}}{{{below}}}",
        rf"${sign}\left(\tfrac{{{size}}}{{{below}}}\right)$" if not sign else f"{above:,}/{below}",
    ):
        got = quantity(normalise(text))
        assert got is not None and got.value == value, text
    whole = quantity(normalise(f"{above:,}.50"))
    assert whole is not None and whole.value == above + Fraction(-1 if above < 0 else 1, 2)


@pytest.mark.parametrize("text", ["x", "5 xy", "5x", "1,23", "5 or 6", r"\frac{1}{0}", "1..2", "²", ""])
def test_what_is_not_one_number_is_no_quantity(text: str) -> None:
    assert quantity(text) is None


# ---- the math reward, as a careful person would judge ----

MATH = [
    # numbers
    ("5", r"\boxed{5.0}", C),
    ("5", r"\boxed{+5}", C),
    ("5", r"\boxed{5.}", C),
    ("5", r"\boxed{-5}", W),
    ("-5", "\\boxed{\u22125}", C),
    ("5000", r"\boxed{5,000}", C),
    ("5000", r"\boxed{5{,}000}", C),
    (r"5,\!040", r"\boxed{5040}", C),
    ("12000", r"\boxed{12\,000}", C),
    ("5", r"\boxed{5,000}", W),
    ("0.5", r"\boxed{.5}", C),
    ("0.5", r"\boxed{0,5}", W),
    ("1/3", r"\boxed{\dfrac13}", C),
    ("1/3", r"\boxed{0.333333}", W),
    ("1/3", r"\boxed{0.333}", W),
    ("0.0000001", r"\boxed{0}", W),
    (r"3 \frac{3}{8}", r"\boxed{\frac{27}{8}}", C),
    (r"3\frac38", r"\boxed{3.375}", C),
    (r"-2\frac12", r"\boxed{-5/2}", C),
    (r"-2\frac12", r"\boxed{5/2}", W),
    ("1500000", r"\boxed{1.5 \times 10^6}", C),
    ("5", r"\boxed{1e999}", W),
    ("11", r"\boxed{5 6}", W),
    ("56", r"\boxed{5 6}", W),
    # digits of other scripts
    ("5", "\\boxed{\u0665}", C),
    ("5", "\\boxed{\uff15}", C),
    ("25", "\\boxed{5\u00b2}", C),
    ("5", "\\boxed{5\u00b2}", W),
    ("52", "\\boxed{5\u00b2}", W),
    # percent, money, units, bases
    (r"5\%", r"\boxed{0.05}", C),
    (r"5\%", r"\boxed{5}", C),
    ("5", r"\boxed{5\%}", C),
    ("0.05", r"\boxed{5\%}", C),
    ("0.5", r"\boxed{0.5\%}", W),
    (r"\$15.48", r"\boxed{15.48}", C),
    ("5", r"\boxed{\$5}", C),
    ("5", r"\boxed{$5$}", C),
    ("5", r"\boxed{5\text{ apples}}", C),
    (r"40\text{ feet}", r"\boxed{40\text{ ft}}", C),
    (r"40\text{ feet}", r"\boxed{40\text{ inches}}", W),
    ("5", r"\boxed{5\text{ million}}", W),
    ("1.5 million", r"\boxed{1500000}", C),
    ("5", r"\boxed{5 \text{ or more}}", W),
    (r"45^\circ", r"\boxed{45}", C),
    ("45", "\\boxed{45\u00b0}", C),
    ("1204_9", r"\boxed{1204}", C),
    ("1204_9", r"\boxed{1204_{\text{9}}}", C),
    ("1204_9", r"\boxed{1204_8}", W),
    ("10", r"\boxed{10_2}", W),
    # words
    (r"\text{Monday}", r"\boxed{monday}", C),
    (r"\text{Monday}", r"\boxed{\text{Tuesday}}", W),
    ("C", r"\boxed{\text{(C)}}", C),
    ("C", r"\boxed{D}", W),
    # several answers, alternatives, equations
    ("5", r"\boxed{5 \text{ or } 6}", W),
    ("5", r"\boxed{5;6}", W),
    ("5", r"\boxed{5}, no wait, \boxed{6}", W),
    ("6", r"\boxed{5}, no wait, \boxed{6}", C),
    ("5", r"\boxed{\text{not }5}", W),
    ("5", r"\boxed{x\neq 5}", W),
    ("5", r"\boxed{5<x}", W),
    ("5", r"\boxed{0=1=5}", W),
    ("5", r"\boxed{x=1=5}", W),
    ("5", r"\boxed{0=5}", W),
    ("5", r"\boxed{2+3=5}", C),
    ("5", r"\boxed{x=5}", C),
    ("x=5", r"\boxed{5}", C),
    ("x=5", r"\boxed{y=5}", W),
    ("AB=9, CD=4", r"\boxed{AB=9, CD=4}", C),
    ("y = -3x + 30", r"\boxed{y=30-3x}", C),
    ("2x - y + 3z + 8 = 0", r"\boxed{4x-2y+6z+16=0}", C),
    ("2x - y + 3z + 8 = 0", r"\boxed{2x-y+3z=8}", W),
    # lists, points, intervals, matrices
    ("(1,2)", r"\boxed{1,2}", C),
    ("(1,2)", r"\boxed{2,1}", W),
    ("(1,2)", r"\boxed{\left(1, 2\right)}", C),
    ("(1,2)", r"\boxed{[1,2]}", W),
    ("(1,2)", r"\boxed{\{1,2\}}", W),
    ("1,2", r"\boxed{2, 1}", C),
    ("1,2", r"\boxed{1}", W),
    ("1", r"\boxed{1,2}", W),
    (r"(1,\sqrt{2})", r"\boxed{(1,\sqrt2)}", C),
    (r"(1,\sqrt{2})", r"\boxed{\sqrt2,1}", W),
    (r"1,\sqrt{2}", r"\boxed{\sqrt2,1}", C),
    (r"(-\infty,2) \cup (2,\infty)", r"\boxed{(-\infty, 2)\cup(2, \infty)}", C),
    (r"(-\infty,2) \cup (2,\infty)", r"\boxed{(-\infty, 2]\cup(2, \infty)}", W),
    ("[2,12)", r"\boxed{2\le x<12}", C),
    (r"\begin{pmatrix} 7 \\ 8 \end{pmatrix}", r"\boxed{\begin{bmatrix} 7 \\ 8 \end{bmatrix}}", C),
    (r"\begin{pmatrix} 7 \\ 8 \end{pmatrix}", r"\boxed{\begin{pmatrix} 8 \\ 7 \end{pmatrix}}", W),
    # expressions
    (r"8 \sqrt{2}", r"\boxed{\sqrt{128}}", C),
    (r"8 \sqrt{2}", "\\boxed{8\u221a2}", C),
    (r"8 \sqrt{2}", r"\boxed{11.3137}", W),
    (r"\frac{1+\sqrt5}{2}", r"\boxed{\frac{1}{2}+\frac{\sqrt{5}}{2}}", C),
    ("-2^{49}", r"\boxed{-562949953421312}", C),
    ("x^2-1", r"\boxed{(x-1)(x+1)}", C),
    ("x^2-1", r"\boxed{(x-1)(x+2)}", W),
    ("2-6i", r"\boxed{-6i+2}", C),
    ("2-6i", r"\boxed{2+6i}", W),
    ("2", r"\boxed{\int_0^1 2dx}", W),
    ("10", r"\boxed{\sum_{i=1}^{1000000} 1/i}", W),
    ("5", r"\boxed{\frac10}", W),
    # nothing to judge
    ("5", "5", C),
    ("5", "", N),
    ("5", r"\boxed{}", N),
    ("5", r"\boxed{5", N),
    # hostile
    ("5", r"\boxed{9^{9^{9^9}}}", T),
    ("5", r"\boxed{10^{10^{10}}}", T),
    ("5", r"\boxed{((((((((((((((((((((5))))))))))))))))))))}", C),
    ("5", "\\boxed{" + "(" * 140 + "5" + ")" * 140 + "}", C),
    ("5", "\\boxed{" + "{" * 50_000 + "5" + "}" * 50_000 + "}", W),
    ("5", "{" * 100_000, N),
    ("5", "\\boxed{" * 100_000, N),
    ("5", "<answer>" * 20_000 + "</answer", N),
    ("5", "\\boxed{" + "5" * 400 + "}", W),
    ("5", "\\boxed{" + "5" * 300 + "}", W),
    ("5", "\\boxed{5\x00}", W),
    ("5", "\\boxed{\ud800}", W),
    ("5", r"\boxed{}}{{}", N),
]


def test_answers_get_the_verdict_of_a_careful_person_in_time_and_in_order(math: Verifier) -> None:
    judged = math.judge((Gold(gold), response) for gold, response, _ in MATH)
    other = [
        (gold, response[:60], want.name, got.verdict.name, got.detail)
        for (gold, response, want), got in zip(MATH, judged, strict=True)
        if got.verdict is not want
    ]
    assert other == []
    assert max(judgement.seconds for judgement in judged) < DEADLINE_S + SLACK_S
    assert all(judgement.reward == (judgement.verdict is C) for judgement in judged)
    again = math.judge([(Gold("x^2-1"), r"\boxed{(x+1)(x-1)}")])  # no worker is lost for good
    assert again[0].verdict is C


def test_quick_answers_start_no_worker_and_the_pool_is_reused() -> None:
    with Verifier("math", workers=1) as verifier:
        assert verifier.judge([(Gold("5"), r"\boxed{5}"), (Gold("5"), "no")])[0].verdict is C
        assert verifier._pools == {}
        for _ in range(3):
            verifier.judge([(Gold("x+1"), r"\boxed{1+x}")] * 4)
        assert verifier._pools["math"].started == 1


def test_a_timeout_and_an_error_pay_what_is_set_and_stay_what_they_are() -> None:
    with Verifier("math", workers=1, timeout_s=0.5, on_timeout=-0.25, on_error=-0.5) as verifier:
        (timeout,) = verifier.judge([(Gold("5"), r"\boxed{9^{9^{9^9}}}")])
        assert (timeout.verdict, timeout.reward) == (T, -0.25) and "0.5 s" in timeout.detail
        (error,) = verifier.judge([(Gold(""), r"\boxed{1}")])
        assert (error.verdict, error.reward) == (Verdict.ERROR, -0.5)


def test_golds_that_are_not_understood_are_returned_with_reasons(math: Verifier) -> None:
    good = [Gold(g) for g in ("5", r"x^2+1", r"\text{Monday}", "1,234", r"\frac\pi 2")]
    bad = {
        "": "empty",
        r"\frac{1}{2": "balanced",
        "5 +": "not an expression",
        r"\begin{foo}": "not an expression",
    }
    got = math.check_golds([*good, *map(Gold, bad)])
    assert [problem.answer for problem, _ in got] == list(bad)
    assert [reason for (_, reason), part in zip(got, bad.values(), strict=True) if part not in reason] == []


@needs_shared_data
def test_all_gsm8k_golds_are_verified_against_themselves_in_seconds() -> None:
    golds = []
    for name in ("train", "test"):
        with (SHARED / "gsm8k" / f"{name}.jsonl").open() as lines:
            golds += [Gold(json.loads(line)["answer"].rpartition("####")[2].strip()) for line in lines]
    assert len(golds) == 8792
    begun = time.process_time()
    with Verifier("math") as verifier:
        assert verifier.check_golds(golds) == []
        assert verifier._pools == {}  # the quick path knows them all
    assert time.process_time() - begun < 10


# ---- the other rewards ----


@pytest.mark.parametrize(
    ("kind", "gold", "response", "verdict"),
    [
        ("exact", "two words", "hm\n two   words \n\n", C),
        ("exact", "Two", "two", W),
        ("exact", "7", r"first 8, then \boxed{7} and more", C),
        ("exact", "7", " \n", N),
        ("numeric", "0.5", "so 1/2", C),
        ("numeric", "3.14159265", r"\boxed{3.14159266}", C),
        ("numeric", "3.14159265", r"\boxed{3.1416}", W),
        ("numeric", "7", "it was 3\nso there are 7 apples.", C),
        ("numeric", "7", "7 at first\nno number here", N),
        ("numeric", "7", r"\boxed{x}", W),
        ("numeric", "x", "7", Verdict.ERROR),
        ("numeric", "7", "7" * 500, W),
        ("last", "1", "7+8=5;5+6=1;1", C),
        ("last", "1", "1", C),
        ("last", "1", "7+8=1\n", C),
        ("last", "1", "1;7", W),
        ("last", "1", "1;", N),
        ("last", "1", "", N),
        ("last", "1", "01", W),
    ],
)
def test_the_other_rewards(kind: str, gold: str, response: str, verdict: Verdict) -> None:
    with Verifier(kind) as verifier:
        assert verifier.judge([(Gold(gold), response)])[0].verdict is verdict


def test_an_unknown_reward_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"unknown reward 'maths', .* did you mean 'math'"):
        Verifier("maths")
    assert set(KINDS) <= set(BUILT_IN)


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_quick_path(gold: str, answer: str) -> None:
    for judge in KINDS.values():
        judge(gold, rf"\boxed{{{answer}}}")
    same = compare_math(gold, gold)
    assert not (isinstance(same, Decided) and same.verdict is W and len(normalise(gold)) > 0)


def test_importing_reward_loads_neither_torch_nor_sympy() -> None:
    code = "import sys, frugal_rl.reward;print(sorted({'torch', 'sympy', 'math_verify'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_all_verdicts_arrive_while_workers_are_killed_from_outside(math: Verifier) -> None:
    pairs = [(Gold(f"x+{i}"), rf"\boxed{{{i + i % 2}+x}}") for i in range(400)]
    math.judge([(Gold("x+y"), r"\boxed{y+x}")])
    over = threading.Event()

    def chaos() -> None:
        turn = 0
        while not over.wait(0.2):
            pids = math._pools["math"].pids()
            with suppress(ProcessLookupError):  # just replaced
                os.kill(pids[turn % len(pids)], signal.SIGKILL)
            turn += 1

    thread = threading.Thread(target=chaos)
    thread.start()
    try:
        judged = math.judge(pairs)
    finally:
        over.set()
        thread.join()
    assert [j.verdict for j in judged] == [W if i % 2 else C for i in range(400)]
