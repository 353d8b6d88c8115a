"""Kill a training run at random moments, resume it each time, and compare its patch with an unbroken run's.

    python tools/crash.py --kills 200

A kill (SIGKILL) comes at a random time after the process starts or after one of its steps ends, so that
loading, generating, learning, writing the journal and evaluating are all hit. The last patch must be
byte-identical. Not run to 200 kills yet; its form of 8 kills is in the test suite.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = {
    "rollout.prompts": 4,
    "rollout.samples": 4,
    "rollout.max_tokens": 24,
    "data.heldout": 16,
}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "frugal_rl", "train", *words]


def settings(steps: int) -> list[str]:
    recipe = {**RECIPE, "train.steps": steps, "train.eval_every": 4}
    return [word for key, value in recipe.items() for word in ("--set", f"{key}={value}")]


def run_and_kill(words: list[str], folder: Path, rng: random.Random) -> bool:
    """Start, kill at a random moment; True if it ended by itself before."""
    process = subprocess.Popen(
        words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stderr is not None
    if rng.random() < 0.8:  # after so many steps of this session, else from its start
        wanted = rng.randint(1, 3)
        for line in process.stderr:
            if line.startswith("step "):
                wanted -= 1
            if not wanted:
                break
        delay_s = rng.uniform(0, 0.6)
    else:
        delay_s = rng.uniform(0, 8)
    time.sleep(delay_s)
    ended = process.poll() == 0
    process.kill()
    process.stderr.close()
    process.wait()
    return ended


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def trial(kills: int, steps: int, seed: int, folder: Path) -> tuple[int, bool]:
    """Kill `kills` times at most, resume to the end; (kills that hit, whether the patches are equal)."""
    rng = random.Random(seed)
    whole, broken = folder / "whole", folder / "broken"
    for path in (whole, broken):
        path.mkdir(parents=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment(), "check": True}
    subprocess.run(command("-o", "run", *settings(steps)), cwd=whole, **quiet)
    hit = 0
    while hit < kills:
        resuming = (broken / "run" / "recipe.toml").exists()
        words = command("--resume", "run") if resuming else command("-o", "run", "--force", *settings(steps))
        if run_and_kill(words, broken, rng):
            break
        hit += 1
    resuming = (broken / "run" / "recipe.toml").exists()
    words = command("--resume", "run") if resuming else command("-o", "run", "--force", *settings(steps))
    subprocess.run(words, cwd=broken, **quiet)
    patches = [(path / "run" / "patch.safetensors").read_bytes() for path in (whole, broken)]
    return hit, patches[0] == patches[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = trials = 0
    while total < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            hit, equal = trial(min(10, options.kills - total), 16, options.seed + trials, Path(folder))
        total, trials = total + hit, trials + 1
        print(
            f"run {trials}: {hit} kills, patch {'identical' if equal else 'DIFFERENT'}; {total} kills",
            flush=True,
        )
        if not equal:
            sys.exit(1)


if __name__ == "__main__":
    main()
