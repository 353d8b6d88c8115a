"""reasoning-gym's own scorers, as a reward that runs in a worker; a score below 1 is WRONG.

The answer is what stands in the last `<answer>`, which may have several lines, else what another mark
names, else the last line. Rows are those of frugal_rl/gym.py, or have `metadata` as reasoning-gym has it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any

import reasoning_gym

from frugal_rl.rewards.answers import Verdict, marked_or_last_line


def score(problem: Mapping[str, Any], response: str) -> tuple[Verdict, str]:
    """Raises ValueError if the problem is none of reasoning-gym's."""
    metadata = problem.get("metadata")
    if isinstance(metadata, str):
        metadata = ast.literal_eval(metadata)
    if not isinstance(metadata, dict):
        raise ValueError("it has no metadata of reasoning-gym: the reward gym is for data.source = gym:NAME")
    name = problem.get("gym") or metadata.get("source_dataset")
    answer = _answer(response)
    if not answer:
        return Verdict.NO_ANSWER, "the response is empty"
    entry = {
        "question": problem.get("question", problem.get("prompt")),
        "answer": problem["answer"] or None,
        "metadata": metadata,
    }
    points = float(_scorer(str(name))(answer=answer, entry=entry))
    return (Verdict.CORRECT, "") if points >= 1 else (Verdict.WRONG, f"it scores {points:.3g}")


def _answer(response: str) -> str:
    lower = response.casefold() if response.isascii() else response
    end = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return response[start + len("<answer>") : end].strip()
    return marked_or_last_line(response)


@functools.cache
def _scorer(name: str) -> Callable[..., float]:
    return reasoning_gym.get_score_answer_fn(name)
