"""The memory of whole RL steps of a 7B or 14B shape on a GPU, counted where there is none.

    python tools/count_memory.py [--runs Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8] [--cap 24GiB]
    python tools/count_memory.py --runs Qwen2.5-7B:int8 --kv-budget 512 --max-tokens 991 --cap 13GiB
    python tools/count_memory.py --runs Qwen2.5-1.5B:int8 --cap 6GiB --steps 200 --prompts 8 --max-tokens 48

Runs what bench_loop.py runs, the real engine and learner with the plan's own slots and micro-batches, on an
emulated device without numbers (tests/emulated.py): every tensor that is made there is counted while it
lives, the pool of the CUDA graphs too. Not counted: CUDA's own memory, cuBLAS's workspaces, what the
allocator loses between blocks, and scratch that an attention kernel takes inside.

Where a value decides how much memory is taken: every response has --max-tokens; of each matrix 0.4 % are
changed already, and as many in the step (memory.CHANGED_SHARE). A run takes one to five minutes of a core.
In brackets the plan over the count; exit code 1 where it is less than 0.95, or where more is held after the
last step than after the first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

LEAST = 0.95  # of what is counted, the plan
PLANNED = {"generate": "generating", "learn": "learning"}


@contextmanager
def answering(device: Any) -> Iterator[None]:
    """The values that the host asks the emulated device for."""
    import torch

    from frugal_rl.generate.transfer import Arriving
    from frugal_rl.learn import _TiedRows
    from frugal_rl.memory import CHANGED_SHARE
    from frugal_rl.weights import Transaction

    propose, commit, take, wait = Transaction.propose, Transaction.commit, _TiedRows.take, Arriving.wait
    kept = 64

    def answer(value: Any) -> float:
        """The entries that a proposal keeps, or a number of no consequence."""
        return 1e-3 if value.dtype.is_floating_point else kept

    def proposed(self: Any, name: str, gradient: Any, **rows: Any) -> None:
        nonlocal kept
        before, kept = kept, int(gradient.numel() * CHANGED_SHARE)
        device.true_of = lambda mask: int(mask.numel() * CHANGED_SHARE)
        propose(self, name, gradient, **rows)
        device.true_of, kept = all_of, before

    def committed(self: Any) -> Any:
        """A journal takes no entries without numbers, and the patch has all that are planned already."""
        held = {name: it for name, it in self.weights.held.items() if hasattr(it, "overlay")}
        overlays = {name: copy(it.overlay) for name, it in held.items()}
        done = commit(self)
        for name, overlay in overlays.items():
            held[name].overlay = overlay
        return replace(done, changed={})

    def taken(self: Any, transaction: Any, first_row: int, gradient_RD: Any) -> None:
        device.true_of = lambda mask: min(mask.numel(), len(gradient_RD))  # rows of this block that occur
        take(self, transaction, first_row, gradient_RD)
        device.true_of = all_of

    def arrived(self: Any) -> list[Any]:
        """Where responses end: not yet; then tokens and log-probabilities."""
        end, *others = wait(self)
        end.fill_(1 << 20)
        for tensor in others:
            if tensor.dtype == torch.int64:
                tensor.random_(20, 90)
        return [end, *others]

    def all_of(mask: Any) -> int:
        return int(mask.numel())

    device.answer = answer
    with ExitStack() as stack:
        for owner, name, value in (
            (Transaction, "propose", proposed),
            (Transaction, "commit", committed),
            (_TiedRows, "take", taken),
            (Arriving, "wait", arrived),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def lay_patch_over(weights: Any) -> None:
    """As many changed entries as the plan has room for."""
    import torch

    from frugal_rl.memory import CHANGED_SHARE
    from frugal_rl.storage import Overlay

    for held in weights.held.values():
        if hasattr(held, "overlay") and (count := int(math.prod(held.shape) * CHANGED_SHARE)):
            position_N = torch.empty(count, dtype=torch.int64, device=weights.device)
            held.overlay = Overlay(position_N, torch.empty(count, dtype=torch.int16, device=weights.device))


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    import bench_learn
    import bench_loop

    from frugal_rl import session
    from frugal_rl.config import parse_bytes
    from tests.emulated import emulated

    make_weights = bench_learn.make_weights

    def patched(*arguments: Any) -> Any:
        weights = make_weights(*arguments)
        lay_patch_over(weights)
        return weights

    with (
        emulated(2 * parse_bytes(options.cap), numbers=False) as device,
        answering(device),
        mock.patch.object(bench_learn, "make_weights", patched),
        mock.patch.object(session, "host_bytes", lambda: parse_bytes(options.host_memory) * 4 // 3),
    ):
        row = bench_loop.run_one(options)
    counted, planned = row["phase_peak_bytes"], row["planned_bytes"]
    return {
        **{name: row[name] for name in ("run", "kv_budget", "slots", "micro_tokens", "commit", "versions")},
        "steps": row["steps"],
        "held_first_bytes": row["held_first_bytes"],
        "held_last_bytes": row["held_last_bytes"],
        "budget": session.to_divide(parse_bytes(options.cap)),
        "counted_bytes": {PLANNED[name]: counted[name] for name in PLANNED},
        "planned_bytes": {PLANNED[name]: planned[name] for name in PLANNED},
        "plan_over_count": {PLANNED[name]: planned[name] / counted[name] for name in PLANNED},
    }


def said(row: dict[str, Any]) -> str:
    from frugal_rl.console import size

    phases = [
        f"{name} {size(counted)}, planned {size(row['planned_bytes'][name])} "
        f"({row['plan_over_count'][name]:.3f})"
        for name, counted in row["counted_bytes"].items()
    ]
    how = f"{row['slots']} slots, micro-batches of {row['micro_tokens']:,} tokens"
    text = f"{'; '.join(phases)}; {how}; of {size(row['budget'])}"
    if row["steps"] > 1:
        text += (
            f"; {row['steps']} steps, held {row['held_first_bytes']:,} -> {row['held_last_bytes']:,} bytes"
        )
    return text


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", default="Qwen2.5-7B:int8,Qwen2.5-7B:bf16,Qwen2.5-14B:int8")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--kv-budget", type=int, help="entries of a slot [all]")
    parser.add_argument("--cap", default="24GiB", help="the GPU's memory, of which the plan fills 11/12")
    parser.add_argument("--host-memory", default="64GiB", help="that the host can spare")
    parser.add_argument("--json", type=Path, help="append a line a run to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.lr, options.seconds, options.device = 0.1, math.inf, "cuda"  # of bench_loop.py
    return options


def main() -> None:
    options = read_options()
    if options.one:
        os.environ["FRUGAL_RL_KERNELS"] = "triton"  # on a CPU too: the memory that they take
        print(json.dumps(run_one(argparse.Namespace(**json.loads(options.one)))))
        return
    from bench_learn import in_a_process, keep

    short = False
    for run in options.runs.split(","):
        row = in_a_process(__file__, options, runs=run)
        print(f"{run:<18} {said(row) if row else 'failed'}", flush=True)
        short |= row is None or min(row["plan_over_count"].values()) < LEAST
        short |= row is None or row["held_last_bytes"] > row["held_first_bytes"]
        if row:
            keep(options.json, row)
    if short:
        sys.exit("a run failed, its plan is too small, or it leaks")


if __name__ == "__main__":
    main()
