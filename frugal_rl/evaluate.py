"""Accuracy and pass@k of a policy on problems it was not trained on, with 95 % intervals.

- One greedy answer a problem: accuracy, with Wilson's score interval.
- n samples a problem: pass@k by the unbiased estimator 1 - C(n - c, k) / C(n, k) for c correct ones,
  and an interval by the normal approximation over problems (samples of one problem are not independent).

An answer whose verification timed out or failed counts as not correct, and is counted by name.

Source: Wilson 1927; pass@k: Chen et al., arXiv 2107.03374, eq. 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from .generate.sample import Sampler, Truncation
from .policy import Policy
from .problems import Problem
from .reward import Judgement, Verdict, Verifier
from .rollout import Request, Rollout

Z95 = 1.959963984540054  # standard normal quantile at 97.5 %
EVALUATION = 2  # first word of the random keys, so that evaluation and training never share numbers


@dataclass(frozen=True)
class Score:
    """A share of problems with its 95 % interval."""

    value: float
    low: float
    high: float
    problems: int

    def __str__(self) -> str:
        return f"{self.value:.1%} (95 %: {self.low:.1%} to {self.high:.1%}, {self.problems} problems)"


@dataclass(frozen=True)
class Answer:
    """One judged response."""

    problem: Problem
    response: str
    rollout: Rollout
    judgement: Judgement


@dataclass(frozen=True)
class Evaluation:
    """`score` is greedy accuracy, or pass@1 over the samples; `passes` maps k to pass@k."""

    score: Score
    passes: dict[int, Score]
    verdicts: dict[str, int]
    response_tokens: float
    truncated: float
    answers: list[Answer] = field(repr=False)

    @property
    def correct(self) -> str:
        """A 1 or a 0 for each answer, in the order of the problems: what paired comparisons need."""
        return "".join(str(int(a.judgement.verdict is Verdict.CORRECT)) for a in self.answers)


def evaluate(
    policy: Policy,
    engine: Sampler,
    verifier: Verifier,
    problems: Sequence[Problem],
    *,
    max_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    truncation: Truncation = Truncation(),  # noqa: B008 (frozen)
    ks: Sequence[int] = (),
    seed: int = 0,
) -> Evaluation:
    """Sample, verify and count. `ks` asks for pass@k, each at most `samples`."""
    requests = [
        Request(problem.prompt_ids, (seed, EVALUATION, index, sample))
        for index, problem in enumerate(problems)
        for sample in range(samples)
    ]
    rollouts: dict[int, Rollout] = dict(
        engine.generate(requests, max_tokens=max_tokens, temperature=temperature, truncation=truncation)
    )
    ordered = [rollouts[i] for i in range(len(requests))]
    texts = [policy.text(r.response_ids) for r in ordered]
    owners = [problems[i // samples] for i in range(len(requests))]
    judgements = verifier.judge(list(zip(owners, texts, strict=True)))
    correct = [j.verdict is Verdict.CORRECT for j in judgements]
    per_problem = [sum(correct[i : i + samples]) for i in range(0, len(correct), samples)]
    if samples == 1:
        score = wilson(sum(per_problem), len(problems))
    else:
        score = mean_score([c / samples for c in per_problem])
    return Evaluation(
        score=score,
        passes={k: mean_score([pass_at_k(samples, c, k) for c in per_problem]) for k in ks},
        verdicts=dict(Counter(j.verdict.name for j in judgements)),
        response_tokens=sum(len(r.response_ids) for r in ordered) / len(ordered),
        truncated=sum(r.truncated for r in ordered) / len(ordered),
        answers=[Answer(*row) for row in zip(owners, texts, ordered, judgements, strict=True)],
    )


def wilson(correct: int, total: int) -> Score:
    """Wilson's score interval of a binomial share."""
    share, square = correct / total, Z95**2
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = math.sqrt(share * (1 - share) / total + square / (4 * total**2)) * Z95
    half /= 1 + square / total
    return Score(share, max(0.0, centre - half), min(1.0, centre + half), total)


def mean_score(values: Sequence[float]) -> Score:
    """Mean over problems with a normal interval, kept within [0, 1]."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Score(mean, 0.0, 1.0, 1)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = Z95 * math.sqrt(variance / len(values))
    return Score(mean, max(0.0, mean - half), min(1.0, mean + half), len(values))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them correct, hold a correct one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
