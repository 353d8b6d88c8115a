r"""From a response to a verdict, and from the verdict to a reward.

    response --final_answer--> answer --quick, in this process--> verdict
                                  \--what only algebra can tell--> math-verify in a worker

Invariants
- A verdict is what is known: CORRECT, WRONG, NO_ANSWER (nothing to judge), TIMEOUT (its limit of time,
  memory or stack was reached), ERROR (no one knows). The last two are never a WRONG in disguise; what
  they pay is a setting.
- Results come in the order of the pairs. The same gold and answer are sent to a worker once.
- Decisions are exact: strings, decimals and fractions as `Fraction`, expressions to 300 digits.
- One answer is judged, the last one given, so naming several gains nothing. Chains of `=`,
  alternatives, and problems restated as their own answer (integrals, sums, limits that the gold
  does not have) are WRONG.
- Work before a length check is linear in the response; after it an answer has at most
  `ANSWER_CHARACTERS` characters.
- No torch here; sympy and math-verify are imported in the workers alone.
- A sum's verdict is its first part's; a function of a user's runs in the same killable workers.

Source and differences: rewards/algebra.py, rewards/structure.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Final, Protocol, Self, TypeVar

from frugal_rl.errors import FrugalError, InputError
from frugal_rl.rewards import sandbox
from frugal_rl.rewards.answers import Verdict, last_boxed
from frugal_rl.rewards.judges import KINDS, Quick, Undecided, compare_math, overlong, wrong
from frugal_rl.rewards.kinds import Part, read_kind
from frugal_rl.rewards.workers import MEMORY_BYTES, Ended, Outcome, Pool

ERRORS_MOST: Final = 0.05  # of verdicts may be ERROR: more, and the reward itself is broken
REMEMBERED: Final = 20_000  # answers whose verdict is kept; a group's samples often agree


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reward: float
    seconds: float
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # of a sum: each part's own reward


class Golden(Protocol):
    """What a verifier needs of a problem."""

    @property
    def answer(self) -> str: ...


G = TypeVar("G", bound=Golden)


# ---- the verifier ----


@dataclass
class Verifier:
    """Judges by a `reward.kind` (rewards/kinds.py). A context manager; workers start when needed."""

    kind: str
    workers: int | None = None  # absent: one less than the processors, at most 8
    timeout_s: float = 5.0
    on_timeout: float = 0.0
    on_error: float = 0.0
    memory_bytes: int = MEMORY_BYTES
    parts: tuple[Part, ...] = field(init=False)
    _pools: dict[str, Pool] = field(default_factory=dict, init=False, repr=False)
    _known: dict[Undecided, Future[Outcome]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.parts = read_kind(self.kind)
        for part in self.parts:  # bad arguments are refused now
            try:
                if part.name == "numeric" and part.arguments and Fraction(part.arguments[0]) < 0:
                    raise ValueError(part.arguments[0])
                if part.name == "overlong":
                    overlong("", *part.arguments)
                if part.name == "code":
                    sandbox.check()
                    if not 0 < float(*part.arguments or ("4",)) < self.timeout_s:
                        raise ValueError(f"expected more than 0 and less than timeout_s = {self.timeout_s:g}")
                if part.name == "gym" and importlib.util.find_spec("reasoning_gym") is None:
                    raise ValueError("it needs the package reasoning-gym: pip install 'frugal-rl[gym]'")
                if part.name == "format":
                    re.compile(part.arguments[0])
            except (ValueError, ZeroDivisionError, re.error, sandbox.Unconfined) as error:
                raise InputError(f"reward {part.name}({', '.join(part.arguments)}): {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        self._known.clear()

    def judge(self, pairs: Iterable[tuple[Golden, str]]) -> list[Judgement]:
        """In the order of the pairs. Raises FrugalError if workers cannot start."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def submit(self, problem: Golden, response: str) -> Future[Judgement]:
        """The same without waiting: generation goes on while workers verify."""
        futures = [self._submit(part, problem, response) for part in self.parts]
        return _summed(self.parts, futures) if self._is_sum else futures[0]

    def unanswered(self, detail: str) -> Future[Judgement]:
        """A response that is not judged: NO_ANSWER, and every part pays 0."""
        parts = {part.name: 0.0 for part in self.parts} if self._is_sum else {}
        future: Future[Judgement] = Future()
        future.set_result(Judgement(Verdict.NO_ANSWER, 0.0, 0.0, detail, parts))
        return future

    @property
    def _is_sum(self) -> bool:
        return len(self.parts) > 1 or self.parts[0].weight != 1

    def check_golds(self, problems: Sequence[G]) -> list[tuple[G, str]]:
        """The problems whose gold is not found equal to itself, with the reason.

        For math, spelling does not count: a gold passes if it is understood, so that another form
        of it would be too. Of a sum the first part is asked; what is no comparison with a gold, never.
        """
        first = self.parts[0]
        if first.name == "gym":
            problems = [problem for problem in problems if problem.answer]  # none where many are right
            futures = [self._submit(first, one, f"<answer>{one.answer}</answer>") for one in problems]
        elif first.function is not None or first.name in ("tags", "overlong"):
            return []
        else:
            futures = [self._settle(self._check(first, problem.answer), 0.0) for problem in problems]
        judged = zip(problems, [future.result() for future in futures], strict=True)
        return [
            (problem, f"{judgement.verdict.value}: {judgement.detail or 'not equal to itself'}")
            for problem, judgement in judged
            if judgement.verdict is not Verdict.CORRECT
        ]

    def _check(self, part: Part, gold: str) -> Quick:
        if part.name != "math":
            return KINDS[part.name](gold, gold, *part.arguments)
        boxed = last_boxed(rf"\boxed{{{gold}}}")
        if boxed != gold:
            return wrong("its braces are not balanced")
        return compare_math(gold, gold, identical=False)

    def _submit(self, part: Part, problem: Golden, response: str) -> Future[Judgement]:
        begun = time.perf_counter()
        if part.function is not None:
            fields = {**getattr(problem, "row", {}), "answer": problem.answer}
            for name in ("prompt", "id"):
                if hasattr(problem, name):
                    fields.setdefault(name, getattr(problem, name))
            payload = {
                "function": part.function,
                "problem": fields,
                "response": response,
                "arguments": part.arguments,
            }
            pool = self._pool("frugal_rl.rewards.custom:call", part.function, {"function": part.function})
            where = str(fields.get("id", fields["answer"]))[:80]
            return self._follow(pool.submit(payload), 0.0, f"{part.name} on {where}: ")
        if part.name == "overlong":
            paid = overlong(response, *part.arguments)
            verdict = Verdict.CORRECT if paid == 0 else Verdict.WRONG
            judgement = Judgement(verdict, paid, time.perf_counter() - begun)
            future: Future[Judgement] = Future()
            future.set_result(judgement)
            return future
        decided = KINDS[part.name](problem.answer, response, *part.arguments)
        return self._settle(decided, time.perf_counter() - begun)

    def _settle(self, quick: Quick, seconds: float) -> Future[Judgement]:
        if isinstance(quick, Undecided):
            return self._follow(self._ask(quick), seconds)
        future: Future[Judgement] = Future()
        future.set_result(self._judgement(quick.verdict, seconds, quick.detail))
        return future

    def _follow(self, asked: Future[Outcome], seconds: float, where: str = "") -> Future[Judgement]:
        """The judgement of an outcome; `where` goes before what an error says."""
        future: Future[Judgement] = Future()
        future.set_running_or_notify_cancel()

        def finish(asked: Future[Outcome]) -> None:
            error = None if asked.cancelled() else asked.exception()
            if asked.cancelled():
                future.set_exception(RuntimeError("the verifier was closed before the verdict"))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(self._from_outcome(asked.result(), seconds, where))

        asked.add_done_callback(finish)
        return future

    def _ask(self, question: Undecided) -> Future[Outcome]:
        known = self._known.get(question)
        if known is not None and not (known.done() and _unsettled(known)):
            return known
        warm_up = {"gold": r"\frac{x}{2}", "answer": r"\sqrt{x^2+1}", "identical": True}
        pool = self._pool("frugal_rl.rewards.algebra:sympy_equal", "math", warm_up)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        asked = pool.submit(asdict(question))
        self._known[question] = asked
        return asked

    def _pool(self, target: str, name: str, warm_up: dict[str, Any]) -> Pool:
        """The workers of one function: a template each, forked with what it imports."""
        if name not in self._pools:
            self._pools[name] = Pool(
                target,
                workers=self.workers or max(1, min(8, (os.cpu_count() or 2) - 1)),
                timeout_s=self.timeout_s,
                memory_bytes=self.memory_bytes,
                warm_up=warm_up,
            )
        return self._pools[name]

    def _from_outcome(self, outcome: Outcome, quick_s: float, where: str) -> Judgement:
        seconds = quick_s + outcome.seconds
        if outcome.ended is Ended.RETURNED:
            value = outcome.value
            judgement = self._judgement(Verdict[value["verdict"]], seconds, value["detail"])
            paid = value.get("reward")
            return judgement if paid is None else replace(judgement, reward=paid)
        over = outcome.ended in (Ended.TIMEOUT, Ended.EXHAUSTED)  # of time, memory or stack
        verdict = Verdict.TIMEOUT if over else Verdict.ERROR
        return self._judgement(verdict, seconds, where + outcome.detail)

    def _judgement(self, verdict: Verdict, seconds: float, detail: str) -> Judgement:
        paid = {
            Verdict.CORRECT: 1.0,
            Verdict.TIMEOUT: self.on_timeout,
            Verdict.ERROR: self.on_error,
        }
        return Judgement(verdict, paid.get(verdict, 0.0), seconds, detail)


def _summed(parts: Sequence[Part], futures: Sequence[Future[Judgement]]) -> Future[Judgement]:
    """The first verdict with the weighted sum of all rewards; a part's ERROR or TIMEOUT is the sum's."""
    total: Future[Judgement] = Future()
    total.set_running_or_notify_cancel()
    left = [len(futures)]
    lock = threading.Lock()

    def finish(_: Future[Judgement]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            total.set_exception(errors[0])
            return
        judged = [future.result() for future in futures]
        failed = [j for j in judged if j.verdict in (Verdict.ERROR, Verdict.TIMEOUT)]
        paid = {part.name: one.reward for part, one in zip(parts, judged, strict=True)}
        total.set_result(
            replace(
                (failed or judged)[0],
                reward=sum(part.weight * one.reward for part, one in zip(parts, judged, strict=True)),
                seconds=max(one.seconds for one in judged),
                parts=paid,
            )
        )

    for future in futures:
        future.add_done_callback(finish)
    return total


def refuse_errors(judged: Sequence[tuple[Golden, str, Judgement]]) -> None:
    """A reward that fails is not a reward of 0. Raises: FrugalError, which shows an answer it failed on."""
    failed = [one for one in judged if one[2].verdict is Verdict.ERROR]
    if len(failed) > ERRORS_MOST * len(judged):
        problem, text, judgement = failed[0]
        name = getattr(problem, "id", "a problem")
        raise FrugalError(
            f"the reward failed on {len(failed)} of {len(judged)} answers. {name}, gold "
            f"{problem.answer[:200]!r}: {judgement.detail}; the answer was {text[-500:]!r}"
        )


def _unsettled(known: Future[Outcome]) -> bool:
    """Whether asking again may tell more: the worker was lost, or could not start."""
    return known.cancelled() or known.exception() is not None or known.result().ended is Ended.LOST
