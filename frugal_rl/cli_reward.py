"""`frugal-rl reward ...`: run a reward over responses that are there already."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import InputError

if TYPE_CHECKING:
    from .reward import Judgement, Verifier

AHEAD = 2_000  # rows read and submitted before their turn to be printed


@dataclass(frozen=True)
class Row:
    """A row as a reward sees a problem."""

    id: str
    prompt: str
    answer: str
    row: dict[str, Any]


@click.group()
def reward() -> None:
    """Try rewards."""


@reward.command("test")
@click.argument("name", metavar="REWARD")
@click.argument("rows", type=click.Path(path_type=Path), metavar="ROWS.jsonl")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0, min_open=True), default=5.0, help="[5 s]")
@click.option("--workers", type=click.IntRange(1), help="Processes [one less than the processors].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a row, totals on stderr.")
def test_command(name: str, rows: Path, timeout_s: float, workers: int | None, as_json: bool) -> None:
    """Run REWARD over rows of JSON with `problem`, `answer` and `response`; a line a row, in order.

    REWARD is what reward.kind takes: math, path.py:function, or a sum such as 'math + 0.1 * tags(think)'.
    """
    import time

    from .reward import Verifier

    began = time.monotonic()
    verdicts: Counter[str] = Counter()
    paid = 0.0
    with Verifier(name, timeout_s=timeout_s, workers=workers) as verifier:
        for row, judgement in _judged(rows, verifier):
            verdicts[judgement.verdict.name] += 1
            paid += judgement.reward
            value: dict[str, Any] = {
                "verdict": judgement.verdict.name,
                "reward": judgement.reward,
                "seconds": round(judgement.seconds, 6),
                "detail": judgement.detail,
            }
            if judgement.parts:
                value["parts"] = dict(judgement.parts)
            why = f"  ({judgement.detail})" if judgement.detail else ""
            line = f"{row.id}  {judgement.verdict.name:<9}  {judgement.reward:g}{why}"
            click.echo(json.dumps(value) if as_json else line)
    seconds = time.monotonic() - began
    total = sum(verdicts.values())
    counts = ", ".join(f"{verdict} {count:,}" for verdict, count in sorted(verdicts.items()))
    click.echo(
        f"{total:,} rows: {counts}; mean reward {paid / max(1, total):.4f}; "
        f"{seconds:.1f} s, {60 * total / seconds:,.0f} a minute",
        err=as_json,
    )


def _judged(path: Path, verifier: Verifier) -> Iterator[tuple[Row, Judgement]]:
    waiting: deque[tuple[Row, Future[Judgement]]] = deque()
    for row, response in _read(path):
        waiting.append((row, verifier.submit(row, response)))
        if len(waiting) >= AHEAD or waiting[0][1].done():
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _read(path: Path) -> Iterator[tuple[Row, str]]:
    from .sources import read_jsonl

    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        missing = [name for name in ("answer", "response") if name not in row]
        if missing:
            there = ", ".join(row) or "none"
            raise InputError(f"{where}: no field {missing[0]!r} (it has {there})")
        answer, response = row["answer"], row["response"]
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise InputError(f"{where}: 'answer' must be a text or a number, got {type(answer).__name__}")
        if not isinstance(response, str):
            raise InputError(f"{where}: 'response' must be a text, got {type(response).__name__}")
        prompt = str(row.get("problem", row.get("prompt", "")))
        yield Row(f"{path.name}:{number}", prompt, str(answer), row), response
