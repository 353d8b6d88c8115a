"""The journal's share of a step: seconds to make a step durable beside the seconds of the step.

    python tools/bench_journal.py [--recipe tiny] [--steps 10]

Made durable: the step's patch from the changed entries, its file (encoded, written, synced, renamed) and the
line in metrics.jsonl. Also printed: bytes of a step's file. Measured on 2 cores of an AMD EPYC (busy with
other work besides, so the share of an idle machine is nearer to 1 %):

    2 threads, median of 10 steps: 3.92 s a step, 21.3 ms for the journal (0.48%), 39,285 bytes
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from frugal_rl import train as loop
from frugal_rl.config import load_recipe
from frugal_rl.journal import Journal
from frugal_rl.session import open_session


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    report = loop.Reporter(print, lambda row: None)
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            spent.append(time.perf_counter() - began)
            return result

        return call

    loop.step_patch = timed(loop.step_patch)  # type: ignore[assignment]
    Journal.commit = timed(Journal.commit)  # type: ignore[method-assign]
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(load_recipe(options.recipe), report) as session,
    ):
        journal = Journal.create(Path(folder) / "run", session.recipe, force=False)
        shares, steps = [], []
        for step in range(1, options.steps + 1):
            spent.clear()
            row = loop._step(session, journal, step, report)
            size_bytes = journal.path(step).stat().st_size
            shares.append(sum(spent) / row["seconds"])
            steps.append((row["seconds"], sum(spent), size_bytes))
    second, journal_s, size_bytes = (statistics.median(column) for column in zip(*steps, strict=True))
    print(
        f"{torch.get_num_threads()} threads, median of {options.steps} steps: {second:.2f} s a step, "
        f"{journal_s * 1e3:.1f} ms for the journal ({statistics.median(shares):.2%}), {size_bytes:,.0f} bytes"
    )


if __name__ == "__main__":
    main()
