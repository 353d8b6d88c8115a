r"""From a response to a verdict, and from the verdict to a reward.

    response --final_answer--> answer --quick, in this process--> verdict
                                  \--what only algebra can tell--> math-verify in a worker

Invariants
- A verdict is what is known: CORRECT, WRONG, NO_ANSWER (nothing to judge), TIMEOUT (its limit of time,
  memory or stack was reached), ERROR (no one knows). The last two are never a WRONG in disguise; what
  they pay is a setting.
- Results come in the order of the pairs. The same gold and answer are sent to a worker once.
- Quick decisions are exact: strings, integers, decimals and fractions as `Fraction`; no float, no eval.
- One answer is judged, the last one given, so naming several gains nothing. Chains of `=`,
  alternatives, and problems restated as their own answer (integrals, sums, limits that the gold
  does not have) are WRONG.
- Work before a length check is linear in the response; after it an answer has at most
  `ANSWER_CHARACTERS` characters.
- No torch here; sympy and math-verify are imported in the workers alone.

Source: math-verify 0.9 (huggingface/Math-Verify, `grader.py`), gold first, both wrapped as `$...$`.
Differs: its SIGALRM timeouts are off, since it turns them into "not equal"; the pool kills instead.
It calls `1204_8` equal to `1204_9`, `40 inches` to `40 feet`, `\{1,2\}` to the interval `(1,2)` and
`0=5` to `5`: numbers with a base, units, brackets and equations are decided before it is asked.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Final, Protocol, Self, TypeVar

from frugal_rl.answers import Verdict, last_boxed
from frugal_rl.errors import InputError
from frugal_rl.judges import KINDS, Decided, Quick, Undecided, compare_math, wrong
from frugal_rl.workers import MEMORY_BYTES, Ended, Outcome, Pool

REMEMBERED: Final = 20_000  # answers whose verdict is kept; a group's samples often agree


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reward: float
    seconds: float
    detail: str = ""


class Golden(Protocol):
    """What a verifier needs of a problem."""

    @property
    def answer(self) -> str: ...


G = TypeVar("G", bound=Golden)


# ---- the verifier ----


@dataclass
class Verifier:
    """Judges by one of KINDS. A context manager; workers start when the first is needed."""

    kind: str
    workers: int | None = None  # absent: one less than the processors, at most 8
    timeout_s: float = 5.0
    on_timeout: float = 0.0
    on_error: float = 0.0
    memory_bytes: int = MEMORY_BYTES
    _pool: Pool | None = field(default=None, init=False, repr=False)
    _known: dict[Undecided, Future[Outcome]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(self.kind, KINDS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown reward {self.kind!r}, expected one of {', '.join(KINDS)}{hint}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
            self._known.clear()

    def judge(self, pairs: Iterable[tuple[Golden, str]]) -> list[Judgement]:
        """In the order of the pairs. Raises FrugalError if workers cannot start."""
        return [future.result() for future in [self.submit(*pair) for pair in pairs]]

    def submit(self, problem: Golden, response: str) -> Future[Judgement]:
        """The same without waiting: generation goes on while workers verify."""
        begun = time.perf_counter()
        decided = KINDS[self.kind](problem.answer, response)
        return self._settle(decided, time.perf_counter() - begun)

    def check_golds(self, problems: Sequence[G]) -> list[tuple[G, str]]:
        """The problems whose gold is not found equal to itself, with the reason.

        For math, spelling does not count: a gold passes if it is understood, so that another form
        of it would be too.
        """
        futures = [self._settle(self._check(problem.answer), 0.0) for problem in problems]
        judged = zip(problems, [future.result() for future in futures], strict=True)
        return [
            (problem, f"{judgement.verdict.value}: {judgement.detail or 'not equal to itself'}")
            for problem, judgement in judged
            if judgement.verdict is not Verdict.CORRECT
        ]

    def _check(self, gold: str) -> Quick:
        if self.kind != "math":
            return KINDS[self.kind](gold, gold)
        boxed = last_boxed(rf"\boxed{{{gold}}}")
        if boxed != gold:
            return wrong("its braces are not balanced")
        return compare_math(gold, gold, identical=False)

    def _settle(self, quick: Quick, seconds: float) -> Future[Judgement]:
        future: Future[Judgement] = Future()
        if isinstance(quick, Decided):
            future.set_result(self._judgement(quick.verdict, seconds, quick.detail))
            return future
        future.set_running_or_notify_cancel()

        def finish(asked: Future[Outcome]) -> None:
            error = None if asked.cancelled() else asked.exception()
            if asked.cancelled():
                future.set_exception(RuntimeError("the verifier was closed before the verdict"))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(self._from_outcome(asked.result(), seconds))

        self._ask(quick).add_done_callback(finish)
        return future

    def _ask(self, question: Undecided) -> Future[Outcome]:
        known = self._known.get(question)
        if known is not None and not (known.done() and _unsettled(known)):
            return known
        if self._pool is None:
            workers = self.workers or max(1, min(8, (os.cpu_count() or 2) - 1))
            self._pool = Pool(
                "frugal_rl.algebra:sympy_equal",
                workers=workers,
                timeout_s=self.timeout_s,
                memory_bytes=self.memory_bytes,
                warm_up={"gold": r"\frac{x}{2}", "answer": r"\sqrt{x^2+1}", "identical": True},
            )
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        asked = self._pool.submit(asdict(question))
        self._known[question] = asked
        return asked

    def _from_outcome(self, outcome: Outcome, quick_s: float) -> Judgement:
        seconds = quick_s + outcome.seconds
        if outcome.ended is Ended.RETURNED:
            return self._judgement(Verdict[outcome.value["verdict"]], seconds, outcome.value["detail"])
        over = outcome.ended in (Ended.TIMEOUT, Ended.EXHAUSTED)  # of time, memory or stack
        verdict = Verdict.TIMEOUT if over else Verdict.ERROR
        return self._judgement(verdict, seconds, outcome.detail)

    def _judgement(self, verdict: Verdict, seconds: float, detail: str) -> Judgement:
        paid = {
            Verdict.CORRECT: 1.0,
            Verdict.TIMEOUT: self.on_timeout,
            Verdict.ERROR: self.on_error,
        }
        return Judgement(verdict, paid.get(verdict, 0.0), seconds, detail)


def _unsettled(known: Future[Outcome]) -> bool:
    """Whether asking again may tell more: the worker was lost, or could not start."""
    return known.cancelled() or known.exception() is not None or known.result().ended is Ended.LOST
