"""Plain SGD at three sizes: how the share of changed entries and the right learning rate go with size.

    python tools/study_size.py bases OUT [--sizes 1M,10M,28M]      the models, each a folder in OUT
    python tools/study_size.py runs OUT [--sizes ...] [--seeds 2]  frugal-rl train, a process a run
    python tools/study_size.py report OUT                          table, OUT/size.json and OUT/size.svg

The models have the embedded one's four layers and head size and are wider (`HIDDEN`). All are taught the
same short task in the same way (build_tiny.train): the last digit of a sum of four digits, worked
(`7+8=15;5+6=11;1+9=10;0`) in a third of the answers of the last lessons and guessed (`=0`) in the others.
So a base is right where it works the sum out, and has a habit to change, as the embedded one has.

Each size is trained by GRPO at the middle three of `RATES`, and at the next one as long as the best is at an
edge. Best is the highest training reward, mean over the second half of the steps and the seeds. bf16 weights,
clip 1, one step a batch. A run that is finished is not repeated.

Beside them stand what papers report of LLMs (`PAPERS`), of other tasks, batches and numbers of steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from frugal_rl.report.page import Key, Panel, drawing
from frugal_rl.report.plots import Series, brief, lines, percent

HIDDEN: Final = {"1M": 128, "10M": 448, "28M": 768}
RATES: Final = (0.003, 0.01, 0.03, 0.1, 0.3)
STEPS: Final = 15
PROMPTS, SAMPLES, HELDOUT = 8, 8, 200
SKILL_STEPS: Final = {"1M": 230, "10M": 90, "28M": 80}  # the loss of the worked answers is then below 0.05
HABIT_STEPS: Final = 50
BATCH: Final = 48
PEAK_LR: Final = {"1M": 3e-3, "10M": 1.5e-3, "28M": 1e-3}
WORKED_SHARE: Final = 1 / 3
TERMS: Final = 4
ANSWER_TOKENS: Final = 32  # the longest working and its end are 24
SEED: Final = 77


@dataclass(frozen=True)
class Paper:
    """Reported of plain SGD with bf16 weights; a share is of all entries."""

    source: str
    points: tuple[tuple[float, float], ...]  # parameters, share
    rule: str


PAPERS: Final = (
    Paper("arXiv 2602.07729, about 270 steps", ((1.7e9, 6e-4), (8e9, 1e-4)), "more than 1e-5"),
    Paper("a replication of it, step 10", ((7.6e9, 3.8e-5),), "more than 1e-5"),
    Paper("a replication of it, step 10", ((7.6e9, 1.59e-3),), "any bit"),
)
PAPERS_RATE: Final = 0.1  # of all of these


# --- the bases


def rows() -> list[dict[str, str]]:
    """All problems there are, in random order."""
    made = [
        {"prompt": "+".join(map(str, terms)) + "?", "answer": str(sum(terms) % 10)}
        for terms in itertools.product(range(1, 10), repeat=TERMS)
    ]
    random.Random(SEED).shuffle(made)
    return made


def split(held: bool) -> list[dict[str, str]]:
    from frugal_rl.tasks import is_heldout

    return [row for row in rows() if is_heldout(row["prompt"]) == held]


def lessons(skill_steps: int) -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts and answers: the skill, then the habit."""
    import build_tiny

    problems, coin = split(held=False), random.Random(SEED)
    for step in itertools.count():
        batch = []
        for row in coin.sample(problems, BATCH):
            worked = step < skill_steps or coin.random() < WORKED_SHARE
            batch.append(
                (row["prompt"], build_tiny.working(row["prompt"]) if worked else f"={row['answer']}")
            )
        yield batch


def build_base(out: Path, size: str) -> None:
    import build_tiny
    import torch

    if (out / size).exists():
        return
    torch.set_num_threads(1)
    folder = out / f"{size}.unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    build_tiny.write_tokenizer(folder)
    torch.manual_seed(SEED)
    model = build_tiny.new_model(HIDDEN[size])
    tokenizer = build_tiny.AutoTokenizer.from_pretrained(folder)
    skill = SKILL_STEPS[size]
    began = time.monotonic()
    build_tiny.train(model, tokenizer, lessons(skill), skill + HABIT_STEPS, peak_lr=PEAK_LR[size])
    model.to(torch.bfloat16).save_pretrained(folder)
    folder.rename(out / size)
    print(f"{size}: {sum(p.numel() for p in model.parameters()):,} parameters, ", end="")
    print(f"{time.monotonic() - began:.0f} s", flush=True)


# --- the runs


def run_folder(out: Path, size: str, rate: float, seed: int) -> Path:
    return out / "runs" / f"{size}-lr-{rate:g}-seed-{seed}"


def run(out: Path, size: str, rate: float, seed: int) -> None:
    """One run; what is done already is kept."""
    folder = run_folder(out, size, rate, seed)
    if (folder / "summary.json").exists():
        return
    words = [
        f"model.name={out.resolve() / size}",
        f"data.source={out.resolve() / 'train.jsonl'}",
        f"data.heldout={out.resolve() / 'heldout.jsonl'}",
        f"rollout.prompts={PROMPTS}",
        f"rollout.samples={SAMPLES}",
        f"rollout.max_tokens={ANSWER_TOKENS}",
        f"learner.lr={rate}",
        f"train.steps={STEPS}",
        f"train.seed={seed}",
    ]
    changes = [part for word in words for part in ("--set", word)]
    command = [sys.executable, "-m", "frugal_rl", "train", "--recipe", "tiny", *changes, "--force"]
    subprocess.run([*command, "-o", str(folder)], check=True, stdout=subprocess.DEVNULL)
    found = read(out, size, rate, seed)
    print(
        f"{size} lr {rate:g} seed {seed}: reward {found['reward']:.3f}, held out {found['before']:.1%} -> "
        f"{found['after']:.1%}, changed {found['any_bit']:.3%}, {found['seconds']:.0f} s",
        flush=True,
    )


def read(out: Path, size: str, rate: float, seed: int) -> dict[str, Any]:
    """What came of a finished run."""
    folder = run_folder(out, size, rate, seed)
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    late = [row["reward"] for row in steps[len(steps) // 2 :]]
    norms = [row["gradient_norm"] for row in steps if row["gradient_norm"] is not None]
    return {
        "rate": rate,
        "seed": seed,
        "parameters": summary["parameters"],
        "reward": sum(late) / len(late),
        "before": summary["accuracy_before"]["value"],
        "after": summary["accuracy_after"]["value"],
        "any_bit": summary["changed_any"] / summary["parameters"],
        "by_1e5": summary["changed_1e5"] / summary["parameters"],
        "first_norm": norms[0] if norms else None,
        "patch_bytes": summary["patch_bytes"],
        "seconds": summary["train_seconds"],
    }


def finished(out: Path, size: str) -> dict[float, list[dict[str, Any]]]:
    """By rate, in the order of seeds."""
    found: dict[float, list[dict[str, Any]]] = {}
    for rate, seed in itertools.product(RATES, range(10)):
        if (run_folder(out, size, rate, seed) / "summary.json").exists():
            found.setdefault(rate, []).append(read(out, size, rate, seed))
    return found


def best_rate(found: dict[float, list[dict[str, Any]]]) -> float:
    return max(found, key=lambda rate: mean(found[rate], "reward"))


def run_size(out: Path, size: str, seeds: int) -> None:
    low, high = 1, len(RATES) - 2
    while True:
        for rate, seed in itertools.product(RATES[low : high + 1], range(seeds)):
            run(out, size, rate, seed)
        at = RATES.index(best_rate(finished(out, size)))
        wider = max(0, min(low, at - 1)), min(len(RATES) - 1, max(high, at + 1))
        if wider == (low, high):
            return
        low, high = wider


# --- the table and the plot


def report(out: Path) -> None:
    import torch
    import transformers

    sizes = {size: found for size in HIDDEN if (found := finished(out, size))}
    heads = (
        "size        parameters  rate   seeds  reward  held out           any bit   > 1e-5    norm, step 1"
    )
    print(heads)
    for size, by_rate in sizes.items():
        for rate, runs in by_rate.items():
            mark = "*" if rate == best_rate(by_rate) else " "
            print(
                f"{size:<10}{runs[0]['parameters']:>12,}  {rate:<5g}{mark}{len(runs):>6}  "
                f"{mean(runs, 'reward'):6.3f}  {runs[0]['before']:6.1%} -> {mean(runs, 'after'):6.1%}  "
                f"{mean(runs, 'any_bit'):8.3%}  {mean(runs, 'by_1e5'):8.3%}  {mean(runs, 'first_norm'):.3g}"
            )
    about = {
        "device": "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "steps": STEPS,
        "prompts": PROMPTS,
        "samples": SAMPLES,
    }
    runs_of = {size: [run for runs in found.values() for run in runs] for size, found in sizes.items()}
    (out / "size.json").write_text(json.dumps({**about, "runs": runs_of}, indent=1) + "\n")
    (out / "size.svg").write_text(plot(sizes))


def mean(runs: Sequence[dict[str, Any]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def plot(sizes: dict[str, dict[float, list[dict[str, Any]]]]) -> str:
    """Sizes, rates and shares are drawn by their logarithms."""
    best = [found[best_rate(found)] for found in sizes.values()]
    same = [found[PAPERS_RATE] for found in sizes.values() if PAPERS_RATE in found]
    shares = [
        Series(name, [logs(runs[0]["parameters"], mean(runs, key)) for runs in same], dots=True)
        for name, key in (("any bit, here", "any_bit"), ("more than 1e-5, here", "by_1e5"))
    ]
    shares += [Series(f"{p.rule}, {p.source}", [logs(*at) for at in p.points], dots=True) for p in PAPERS]
    rates = [
        Series("best of its grid, here", [logs(r[0]["parameters"], r[0]["rate"]) for r in best]),
        Series("arXiv 2602.07729 and a replication", [logs(n, PAPERS_RATE) for n in (1.7e9, 7.6e9, 8e9)]),
    ]
    rates = [Series(one.name, one.points, dots=True) for one in rates]

    def by_rate(key: str, scale: Callable[[float], float]) -> list[Series]:
        """Mean over the seeds; the band goes from the lowest to the highest."""
        out = []
        for size, found in sizes.items():
            at = [(math.log10(rate), [scale(run[key]) for run in runs]) for rate, runs in found.items()]
            means = [(x, sum(ys) / len(ys)) for x, ys in at]
            out.append(Series(size, means, band=[(x, min(ys), max(ys)) for x, ys in at], dots=True))
        return out

    def powers(low: float, high: float, count: int) -> list[float]:
        return [float(n) for n in range(math.floor(low), math.ceil(high) + 1)]

    def amount(power: float) -> str:
        return brief(10**power)

    parameters: dict[str, Any] = {"x_title": "parameters", "x_format": amount, "make_ticks": powers}
    rate: dict[str, Any] = {"x_title": "learning rate", "x_format": amount}
    rewards, changed = by_rate("reward", float), by_rate("any_bit", math.log10)

    def log_percent(power: float) -> str:
        return percent(10**power)

    return drawing(
        [
            Panel(
                f"Changed entries, learning rate {PAPERS_RATE:g} for all",
                lines(shares, label="changed entries by size", y_format=log_percent, **parameters),
                _keys(shares),
            ),
            Panel(
                "Best learning rate",
                lines(rates, label="best learning rate by size", y_format=amount, **parameters),
                _keys(rates),
            ),
            Panel(
                "Training reward, second half of the steps",
                lines(rewards, label="reward by learning rate", y_low=0, y_high=1, **rate),
                _keys(rewards),
            ),
            Panel(
                "Changed entries, any bit",
                lines(
                    changed,
                    label="changed entries by learning rate",
                    y_format=log_percent,
                    make_ticks=powers,
                    **rate,
                ),
                _keys(changed),
            ),
        ]
    )


def logs(x: float, y: float) -> tuple[float, float]:
    return math.log10(x), math.log10(y)


def _keys(series: Sequence[Series]) -> list[Key]:
    return [Key(one.name, place) for place, one in enumerate(series)]


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, stdout=subprocess.PIPE, check=False, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["bases", "runs", "report"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default=",".join(HIDDEN))
    parser.add_argument("--seeds", type=int, default=2, help="of each rate [2]")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "report":
        report(given.out)
        return
    for name, held in (("train", False), ("heldout", True)):
        mine = split(held)[: HELDOUT if held else None]
        (given.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    for size in given.sizes.split(","):
        if given.what == "bases":
            build_base(given.out, size)
        else:
            run_size(given.out, size, given.seeds)


if __name__ == "__main__":
    main()
