"""Training on rollouts from a compressed KV cache: dense, uncorrected and corrected, side by side.

    python tools/study_compression.py base FOLDER            the base model, about 15 minutes
    python tools/study_compression.py budgets FOLDER         what compression alone costs the base
    python tools/study_compression.py runs FOLDER OUT [--seeds 0,1,2] [--arms dense,naive,sparse-rl]
    python tools/study_compression.py report OUT             the table, and OUT/compression.svg

The task is `iterate:8`: `x=47; 34 times x=3x+7 mod 10`, whose working `1:8,2:1,...` is 151 to 192 tokens
long. Every step needs the step before it and the rule in the prompt: what an evicted entry costs shows.
The base can work a problem out but seldom does (`WORKED_SHARE`), otherwise it guesses.
Runs are `frugal-rl train` in processes of their own; one that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import build_tiny
import torch

from frugal_rl.generators import GENERATORS, Draw
from frugal_rl.tasks import is_heldout

TASK: Final = "iterate:8"
LEVELS: Final = (1, 1, 1, 2, 3, 4, 6, 8, 9)  # of the lessons: most is learned on short answers
LAYERS: Final = 3
SKILL_STEPS: Final = 500
HABIT_STEPS: Final = 60
BATCH: Final = 64
WORKED_SHARE: Final = 0.35
SEED: Final = 4321


def working(prompt: str) -> str:
    """Every value on the way, numbered, and the last one again on a line of its own."""
    x, times, a, b = (int(n) for n in re.findall(r"\d+", prompt)[:4])
    steps = []
    for step in range(1, times + 1):
        x = (a * x + b) % 10
        steps.append(f"{step}:{x}")
    return f"{','.join(steps)}\n{x}"


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts and answers: the skill at every length, then the habit at the task's."""
    draw, coin = Draw(SEED), random.Random(SEED)
    for step in itertools.count():
        level = LEVELS[-2] if step >= SKILL_STEPS else coin.choice(LEVELS)
        batch: list[tuple[str, str]] = []
        while len(batch) < BATCH:
            prompt, answer = GENERATORS["iterate"].make(draw, level)
            if is_heldout(prompt):
                continue
            worked = step < SKILL_STEPS or coin.random() < WORKED_SHARE
            batch.append((prompt, working(prompt) if worked else answer))
        yield batch


def build_base(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    build_tiny.write_tokenizer(folder)
    torch.manual_seed(SEED)
    model = build_tiny.new_model(LAYERS)
    tokenizer = build_tiny.AutoTokenizer.from_pretrained(folder)
    build_tiny.train(model, tokenizer, lessons(), SKILL_STEPS + HABIT_STEPS)
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["base"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    build_base(given.folder)


if __name__ == "__main__":
    main()
