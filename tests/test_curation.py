"""curation.py: what is left out is named, the base is measured once, a run goes on with its own problems."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal_rl import curation, tasks
from frugal_rl import train as loop
from frugal_rl.config import load_recipe
from frugal_rl.curation import (
    Base,
    cache_file,
    check_unchanged,
    drop_bad_golds,
    drop_never_and_always_solved,
    key_of,
    read_run_file,
    run_files,
)
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.journal import Journal
from frugal_rl.problems import Problem, ProblemSet
from frugal_rl.reward import Judgement, Verdict, Verifier
from frugal_rl.rollout import Request
from frugal_rl.session import open_session, truncation_of

SAMPLES = 4
ROWS = 24
ROOT = Path(__file__).resolve().parent.parent
QUIET = loop.Reporter(lambda text: None, lambda row: None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frugal_rl" / "difficulty"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    lines = tasks.last_digit_rows("train")[: ROWS + 6]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def settings(rows: Path, *more: str) -> list[str]:
    return [
        f"data.source={rows}",
        "data.heldout=6",
        "rollout.prompts=4",
        "rollout.samples=4",
        "rollout.max_tokens=48",
        "train.steps=2",
        *more,
    ]


@pytest.fixture(scope="module")
def session(rows: Path) -> Iterator[loop.Session]:
    with open_session(load_recipe("tiny", settings(rows)), QUIET, device=torch.device("cpu")) as opened:
        yield opened


def base_of(session: loop.Session, *more: str) -> Base:
    recipe = load_recipe("tiny", settings(Path(session.recipe.data.source), "data.solve_samples=4", *more))
    return Base(recipe, session.policy, session.engine, session.verifier, truncation_of(recipe))


def counted(base: Base, problems: ProblemSet, known: Any = None) -> tuple[ProblemSet, list[str]]:
    said: list[str] = []
    return drop_never_and_always_solved(problems, base, said.append, known or {}), said


@pytest.fixture
def requests(session: loop.Session, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the engine is asked for, as it is asked."""
    asked: list[Request] = []
    generate = session.engine.generate

    def noting(requests: list[Request], **named: Any) -> Any:
        asked.extend(requests)
        return generate(requests, **named)

    monkeypatch.setattr(session.engine, "generate", noting)
    return asked


def test_counts_are_those_of_each_problem_alone_and_the_limits_decide(
    session: loop.Session, requests: list[Request]
) -> None:
    base, train = base_of(session), session.problems.train
    got, said = counted(base, session.problems)
    assert len(requests) == SAMPLES * len(train)
    for number in (0, 7, len(train) - 1):
        own = [r for r in requests if r.prompt_ids == train[number].prompt_ids]
        stream = session.engine.generate(own, max_tokens=48, temperature=1.0, truncation=base.truncation)
        texts = [session.policy.text(rollout.response_ids) for _, rollout in stream]
        judged = session.verifier.judge([(train[number], text) for text in texts])
        correct = sum(one.verdict is Verdict.CORRECT for one in judged)
        assert got.solved[key_of(train[number])] == (correct, SAMPLES)
    shares = [got.solved[key_of(p)][0] / SAMPLES for p in train]
    assert got.train == [p for p, share in zip(train, shares, strict=True) if 0 < share < 1]
    assert 0 < len(got.train) < len(train) and got.heldout == session.problems.heldout
    never, always = shares.count(0), shares.count(1)
    assert f"{never} solved never and {always} always left out, {len(got.train)} kept" in said[-1]
    assert len(got.left_out) == never + always
    assert got.left_out[0].id.startswith("sums.jsonl:") and " of 4 samples" in got.left_out[0].reason
    narrow, _ = counted(base_of(session, "data.solve_above=0.25", "data.solve_below=0.75"), got)
    assert narrow.train == [p for p in got.train if got.solved[key_of(p)][0] == 2]


def test_a_second_run_measures_nothing_and_a_changed_row_only_itself(
    session: loop.Session, requests: list[Request]
) -> None:
    base = base_of(session)
    first, _ = counted(base, session.problems)
    requests.clear()
    again, said = counted(base, session.problems)
    assert requests == [] and again == first and len(said) == 1
    changed = replace(session.problems.train[3], answer="x", row={"answer": "x"})
    train = [changed if n == 3 else p for n, p in enumerate(session.problems.train)]
    counted(base, replace(session.problems, train=train))
    assert [r.prompt_ids for r in requests] == [changed.prompt_ids] * SAMPLES


@pytest.mark.parametrize("tail", [b"", b'["half a li', b"\xff\n", b"[1]\n"])
def test_an_interrupted_measurement_goes_on_and_ends_as_an_unbroken_one(
    session: loop.Session, requests: list[Request], monkeypatch: pytest.MonkeyPatch, tail: bytes
) -> None:
    base = base_of(session)
    unbroken, _ = counted(base, session.problems)
    path = cache_file(base)
    path.unlink()
    requests.clear()
    monkeypatch.setattr(curation, "CHUNK_ROUNDS", 1)
    monkeypatch.setattr(session.engine, "slots", 16)  # 4 problems a chunk

    def say(text: str) -> None:
        if "8 of" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drop_never_and_always_solved(session.problems, base, say, {})
    assert len(requests) == 8 * SAMPLES
    with open(path, "ab") as file:
        file.write(tail)
    got, _ = counted(base, session.problems)
    assert len(requests) == len(session.problems.train) * SAMPLES
    assert got == unbroken
    requests.clear()
    assert counted(base, session.problems)[0] == unbroken and requests == []


def test_the_cache_is_named_by_all_that_the_counts_depend_on(session: loop.Session, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(problem, response):\n    return 1.0\n")
    own = f"reward.kind={tmp_path / 'mine.py'}:judge"
    names = [
        cache_file(base_of(session, *more))
        for more in ([], ["rollout.temperature=0.9"], ["rollout.max_tokens=49"], ["reward.kind=exact"], [own])
    ]
    (tmp_path / "mine.py").write_text("def judge(problem, response):\n    return 0.0\n")
    names.append(cache_file(base_of(session, own)))
    names.append(cache_file(replace(base_of(session), recipe=load_recipe("tiny", ["data.solve_samples=5"]))))
    assert len(set(names)) == len(names)
    same = [
        cache_file(base_of(session, more)) for more in ("train.seed=7", "learner.lr=3", "rollout.prompts=9")
    ]
    assert set(same) == {names[0]}


class Fixed(Verifier):
    """Verdicts by the number of the answer."""

    verdicts: list[Verdict]

    def submit(self, problem: Any, response: str) -> Any:
        from concurrent.futures import Future

        future: Future[Judgement] = Future()
        future.set_result(Judgement(self.verdicts.pop(), 0.0, 0.0, "why"))
        return future


def test_what_could_not_be_judged_is_not_unsolved(session: loop.Session) -> None:
    fixed = Fixed("exact")
    train = session.problems.train[:3]
    fixed.verdicts = [Verdict.TIMEOUT] * (SAMPLES * 3)
    problems = replace(session.problems, train=train)
    got, _ = counted(replace(base_of(session), verifier=fixed), problems)
    assert got.train == train and set(got.solved.values()) == {(0, 0)}


def test_a_reward_that_fails_stops_the_measurement_and_nothing_is_kept_of_it(session: loop.Session) -> None:
    fixed = Fixed("exact")
    fixed.verdicts = [Verdict.ERROR] * (SAMPLES * 100)
    base = replace(base_of(session, "rollout.max_tokens=47"), verifier=fixed)
    with pytest.raises(FrugalError, match=r"the reward failed on \d+ of \d+ answers.*sums\.jsonl:\d+"):
        counted(base, session.problems)
    assert not cache_file(base).exists()


def test_limits_that_leave_no_problem_are_refused(session: loop.Session) -> None:
    fixed = Fixed("exact")
    fixed.verdicts = [Verdict.WRONG] * (SAMPLES * 100)
    base = replace(base_of(session, "rollout.max_tokens=46"), verifier=fixed)
    with pytest.raises(InputError, match=rf"problem is left: {ROWS} are solved never and 0 always"):
        counted(base, session.problems)


# ---- golds and the run folder


def test_all_golds_that_do_not_verify_are_listed_with_their_lines() -> None:
    def problem(number: int, answer: str) -> Problem:
        return Problem(f"x.jsonl:{number}", "p", (1,), answer, {})

    train = [problem(n, "{" if n % 3 == 0 else str(n)) for n in range(1, 30)]
    problems = ProblemSet(train, [problem(99, "5")], [])
    said: list[str] = []
    with Verifier("math") as verifier:
        got = drop_bad_golds(problems, verifier, said.append)
    assert [p.id for p in got.train] == [f"x.jsonl:{n}" for n in range(1, 30) if n % 3]
    assert [one.id for one in got.left_out] == [f"x.jsonl:{n}" for n in range(3, 30, 3)]
    assert all(one.side == "training" and "not balanced" in one.reason for one in got.left_out)
    shown = said[0].splitlines()
    assert shown[0] == "9 of 29 training problems left out, gold not verifiable:"
    assert shown[1].startswith("  x.jsonl:3  '{' (") and shown[-1] == "  and 4 more" and len(shown) == 7
    lines = run_files(got)["left_out.jsonl"].decode().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [one.id for one in got.left_out]


def test_a_run_goes_on_with_its_own_counts_and_refuses_other_problems(
    session: loop.Session, requests: list[Request], tmp_path: Path
) -> None:
    base = base_of(session)
    got, _ = counted(base, session.problems)
    cache_file(base).unlink()
    requests.clear()
    journal = Journal.create(tmp_path / "run", base.recipe, force=False, files=run_files(got))
    about = read_run_file(journal.folder)
    again, _ = counted(base, session.problems, about["solved"])
    assert requests == [] and again.train == got.train and again.left_out == got.left_out
    check_unchanged(again, about, journal.folder)
    for other in (
        replace(again, train=again.train[::-1]),
        replace(again, train=again.train[1:]),
        replace(again, heldout=[replace(p, answer="x") for p in again.heldout]),
    ):
        with pytest.raises(InputError, match=r"its problems were \d+ for training and 6 held out"):
            check_unchanged(other, about, journal.folder)
    (journal.folder / "problems.json").write_text("{")
    with pytest.raises(InputError, match=r"problems\.json is damaged"):
        read_run_file(journal.folder)
    (journal.folder / "problems.json").unlink()
    check_unchanged(again, read_run_file(journal.folder), journal.folder)  # a run of an older version


def test_a_filtered_run_that_is_resumed_without_the_cache_ends_as_one_that_was_never_stopped(
    rows: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny", settings(rows, "data.solve_samples=4"))
    said: list[str] = []
    report = loop.Reporter(said.append, lambda row: None)
    patches = []
    for name, stops in (("whole", [False]), ("halves", [True, False])):
        folder = tmp_path / name
        for part, stop in enumerate(stops):
            if part:  # nothing but the run's folder says what was kept
                next(cache.iterdir()).unlink()
                monkeypatch.setattr(curation, "_measure", None)
            about = read_run_file(folder)
            with open_session(
                recipe, report, device=torch.device("cpu"), solved=about.get("solved")
            ) as session:
                if part:
                    journal, _ = Journal.open(folder)
                    loop.resume(session, journal, report)
                else:
                    files = run_files(session.problems)
                    journal = Journal.create(folder, recipe, force=False, files=files)
                loop.train(session, journal, report, lambda stop=stop: stop)
        patches.append((folder / "patch.safetensors").read_bytes())
    assert patches[0] == patches[1]
    assert sum("solved never" in line for line in said) == 3


def test_the_command_line_keeps_the_list_in_the_run_folder(rows: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = rows.read_text().splitlines()
    bad.write_text("\n".join([*lines, json.dumps({"prompt": "2?", "answer": "{"})]) + "\n")
    command = [sys.executable, "-m", "frugal_rl", "train", "-o", "run"]
    for setting in settings(bad, "reward.kind=math", "train.steps=1"):
        command += ["--set", setting]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    number = len(lines) + 1
    assert "1 of 25 training problems left out, gold not verifiable:" in done.stderr
    assert "run/left_out.jsonl lists the 1 problems left out" in done.stderr
    (line,) = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == f"bad.jsonl:{number}"
