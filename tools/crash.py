"""Kill a training run at random moments, resume it each time, and compare its patch with an unbroken run's.

    python tools/crash.py --kills 200

A kill (SIGKILL) comes at a random time after the process starts or after one of its steps ends, so that
loading, generating, learning, writing the journal and evaluating are all hit. The last patch must be
byte-identical. Its form of 5 kills is in the test suite.

Run once with --kills 200 (commit 8b481a0, 2 cores, about 95 minutes on a busy machine): 20 trials of 10
kills, 30 runs killed and finished, each patch identical to that of its trial's unbroken run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
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
    process.kill()
    process.stderr.close()
    status = process.wait()
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(words)} failed by itself with exit status {status}")
    return status == 0


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def trial(kills: int, steps: int, seed: int, folder: Path) -> tuple[int, bool]:
    """Kill until `kills` have hit, going on after each; (runs it took, whether all their patches are equal).

    A run that ends before it was killed often enough is compared, and another one is begun.
    """
    rng = random.Random(seed)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment(), "check": True}

    def words(inside: Path) -> list[str]:
        begun = (inside / "run" / "recipe.toml").exists()
        return command("--resume", "run") if begun else command("-o", "run", "--force", *settings(steps))

    def patch(inside: Path) -> bytes:
        return (inside / "run" / "patch.safetensors").read_bytes()

    whole = folder / "whole"
    whole.mkdir(parents=True)
    subprocess.run(words(whole), cwd=whole, **quiet)
    hit = runs = 0
    while hit < kills:
        runs += 1
        broken = folder / f"broken-{runs}"
        broken.mkdir()
        while hit < kills and not run_and_kill(words(broken), broken, rng):
            hit += 1
        subprocess.run(words(broken), cwd=broken, **quiet)
        if patch(broken) != patch(whole):
            return runs, False
    return runs, True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = trials = 0
    while total < options.kills:
        kills = min(10, options.kills - total)
        with tempfile.TemporaryDirectory() as folder:
            runs, equal = trial(kills, 16, options.seed + trials, Path(folder))
        total, trials = total + kills, trials + 1
        patches = "identical" if equal else "DIFFERENT"
        print(f"trial {trials}: {kills} kills in {runs} runs, patches {patches}; {total} kills", flush=True)
        if not equal:
            sys.exit(1)


if __name__ == "__main__":
    main()
