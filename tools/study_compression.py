"""Training on rollouts from a compressed KV cache: dense, uncorrected and corrected, side by side.

    python tools/study_compression.py base FOLDER            the base model, about 10 minutes
    python tools/study_compression.py budgets FOLDER         what compression alone costs the base
    python tools/study_compression.py runs FOLDER OUT [--seeds 0,1,2] [--arms dense,naive,sparse-rl]
    python tools/study_compression.py report OUT             of all runs below OUT: table, OUT/compression.svg

The task is `rounds:4`: `3; 4 rounds of a4b7c2d9e5`, whose working `1:a3+4=7,b7+7=14,...` is 154 to 218 tokens
long. Every step needs the sum before it and its digit in the prompt: what an evicted entry costs shows.
The base is the embedded model, which can add digits, taught this task; it can work a problem out but seldom
does (`WORKED_SHARE`), otherwise it guesses.
Runs are `frugal-rl train` in processes of their own; one that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import build_tiny
import torch

from frugal_rl.config import load_recipe
from frugal_rl.evaluate import evaluate
from frugal_rl.generate.engine import Engine
from frugal_rl.generate.eviction import Eviction
from frugal_rl.generators import GENERATORS, Draw
from frugal_rl.models import find_model
from frugal_rl.rewards.answers import Verdict
from frugal_rl.session import Reporter, open_session
from frugal_rl.tasks import is_heldout

TASK_LEVEL: Final = 4
TASK: Final = f"rounds:{TASK_LEVEL}"
LEVELS: Final = (1, 2, 4)  # of the lessons: most is learned on short answers
SKILL_STEPS: Final = 420
HABIT_STEPS: Final = 40
BATCH: Final = 48
SEEN_TOKENS: Final = 32  # that the base has learned to work from, besides the prompt
WORKED_SHARE: Final = 0.35
WORKED_TOKENS: Final = 20  # an answer that is guessed has two
BUFFER: Final = 16  # entries besides the budget
PROBLEMS: Final = 100  # held out
SEED: Final = 4321


def working(prompt: str) -> str:
    """Every sum on the way, by the name of its digit, and the last one again on a line of its own."""
    total, rounds, *digits = (int(n) for n in re.findall(r"\d+", prompt))
    steps = []
    for turn in range(1, rounds + 1):
        for name, digit in zip("abcde", digits, strict=True):
            steps.append(f"{turn}{name}{total}+{digit}={total + digit}")
            total = (total + digit) % 10
    return f"{','.join(steps)}\n{total}"


def prompt_and_recent(label_BT: torch.Tensor) -> torch.Tensor:
    """A token sees the prompt, which has no labels, and of what is before it as much as the lesson leaves.

    Every second lesson leaves everything, the others the last SEEN_TOKENS. Returns bool [B, 1, T, T].
    """
    place_T = torch.arange(label_BT.shape[1])
    back_TT = place_T[:, None] - place_T
    first_B = (label_BT != build_tiny.IGNORED).int().argmax(dim=1)
    prompt_BT = place_T < first_B[:, None]
    whole_B = torch.arange(len(label_BT)) % 2 == 0
    seen_BTT = (back_TT < SEEN_TOKENS) | prompt_BT[:, None, :] | whole_B[:, None, None]
    return (seen_BTT & (back_TT >= 0))[:, None]


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts and answers: the skill at every length, then the habit at the task's."""
    draw, coin = Draw(SEED), random.Random(SEED)
    for step in itertools.count():
        level = TASK_LEVEL if step >= SKILL_STEPS else coin.choice(LEVELS)
        batch: list[tuple[str, str]] = []
        while len(batch) < BATCH:
            prompt, answer = GENERATORS["rounds"].make(draw, level)
            if is_heldout(prompt):
                continue
            worked = step < SKILL_STEPS or coin.random() < WORKED_SHARE
            batch.append((prompt, working(prompt) if worked else answer))
        yield batch


def build_base(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    build_tiny.write_tokenizer(folder)
    tiny = find_model("tiny").folder
    model = build_tiny.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = build_tiny.AutoTokenizer.from_pretrained(folder)
    build_tiny.train(model, tokenizer, lessons(), SKILL_STEPS + HABIT_STEPS, seen=prompt_and_recent)
    model.to(torch.bfloat16).save_pretrained(folder)


# --- what compression alone costs


def cost_of_compression(
    folder: Path, methods: list[str], budgets: list[int], samples: int, problems: int
) -> None:
    """Of the base's sampled answers that are worked out: how many are right, by method and budget."""
    recipe = load_recipe("tiny", settings(folder))
    quiet = Reporter(lambda text: None, lambda row: None)
    with open_session(recipe, quiet, training=False) as session:
        rows = session.problems.heldout[:problems]

        def share(eviction: Eviction | None) -> str:
            policy = session.policy
            engine = Engine(policy.decoder, 64, policy.stop_ids, 1024, eviction=eviction)
            done = evaluate(
                policy,
                engine,
                session.verifier,
                rows,
                max_tokens=recipe.rollout.max_tokens,
                samples=samples,
                temperature=1.0,
            )
            worked = [a for a in done.answers if len(a.rollout.response_ids) > WORKED_TOKENS]
            right = sum(a.judgement.verdict is Verdict.CORRECT for a in worked)
            length = sum(len(a.rollout.response_ids) for a in worked) / max(1, len(worked))
            return (
                f"{right} of {len(worked)} worked answers right ({right / max(1, len(worked)):.1%}), "
                f"{length:.0f} tokens long; all answers {done.score.value:.1%}"
            )

        print(f"dense             {share(None)}", flush=True)
        for method in methods:
            for budget in budgets:
                line = share(Eviction(method, budget, BUFFER))  # type: ignore[arg-type]
                print(f"{method:<10}{budget:>4} + {BUFFER}  {line}", flush=True)


# --- runs


def settings(folder: Path) -> list[str]:
    """What differs from the recipe `tiny`."""
    return [
        f"model.name={folder}",
        f"data.source={TASK}",
        f"data.heldout={PROBLEMS}",
        "reward.kind=numeric",
        "rollout.max_tokens=240",
        "rollout.prompts=8",
    ]


def arm_settings(arm: str, method: str, budget: int) -> list[str]:
    if arm == "dense":
        return []
    changes = [f"rollout.kv_budget={budget}", f"rollout.kv_buffer={BUFFER}", f"rollout.eviction={method}"]
    if arm == "naive":
        return [*changes, "loss.correction=off", "loss.uncorrected=true"]
    return [*changes, f"loss.correction={arm}"]


def run_arm(folder: Path, out: Path, arm: str, seed: int, given: argparse.Namespace) -> None:
    """One run and its scores, dense and compressed; what is done already is kept."""
    run, done = out / f"{arm}-{seed}", out / f"{arm}-{seed}.json"
    if done.exists():
        return
    command = [sys.executable, "-m", "frugal_rl"]
    cache = [f"--kv-budget={given.budget}", f"--kv-buffer={BUFFER}", f"--eviction={given.method}"]
    if run.exists():
        subprocess.run([*command, "train", "--resume", str(run)], check=True, stdout=subprocess.DEVNULL)
    else:
        words = [*settings(folder), *arm_settings(arm, given.method, given.budget)]
        words += [f"train.steps={given.steps}", f"train.seed={seed}", *given.set]
        changes = [part for word in words for part in ("--set", word)]
        subprocess.run([*command, "train", *changes, "-o", str(run)], check=True, stdout=subprocess.DEVNULL)
    scores = []
    for step in sorted({given.steps // 2, given.steps}):
        patch = out / f"{arm}-{seed}-{step}.safetensors"
        at = ["patch", "at", str(run), "--step", str(step), "-o", str(patch), "--force"]
        subprocess.run([*command, *at], check=True, stdout=subprocess.DEVNULL)
        row: dict[str, Any] = {"step": step}
        for name, words in (("dense", ["--eviction=none"]), ("compressed", cache)):
            eval_words = ["eval", "--patch", str(patch), "--json", *words]
            output = subprocess.run([*command, *eval_words], check=True, stdout=subprocess.PIPE).stdout
            score = json.loads(output)
            row[name] = score["accuracy"]
            row[f"{name}_tokens"] = score["response_tokens"]
        scores.append(row)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    about = {"method": given.method, "budget": given.budget, "buffer": BUFFER, "steps": given.steps}
    done.write_text(json.dumps({"arm": arm, "seed": seed, **about, "scores": scores, "metrics": rows}))
    last = scores[-1]
    print(
        f"{arm:<10} seed {seed}: dense {last['dense']['value']:.1%} ({last['dense_tokens']:.0f} tokens), "
        f"compressed {last['compressed']['value']:.1%} ({last['compressed_tokens']:.0f} tokens)",
        flush=True,
    )


# --- the table and the plot


def label(run: dict[str, Any]) -> str:
    return "dense" if run["arm"] == "dense" else f"{run['arm']} {run['budget']}"


def report(out: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(out.rglob("*-[0-9].json"))]
    names = sorted({label(r) for r in runs}, key=lambda name: (name != "dense", name.split()[::-1]))
    heads = ("greedy, dense cache", "greedy, compressed")
    print(f"arm           seeds  {heads[0]:<32}  {heads[1]:<26}tokens  astray    out")
    for name in names:
        mine = [run for run in runs if label(run) == name]

        def spread(key: str, mine: list[dict[str, Any]] = mine) -> str:
            values = [run["scores"][-1][key]["value"] for run in mine]
            return f"{sum(values) / len(values):5.1%} ({', '.join(f'{v:.0%}' for v in values)})"

        def late(key: str, mine: list[dict[str, Any]] = mine) -> float:
            values = [row.get(key, 0.0) for run in mine for row in run["metrics"][-10:]]
            return sum(values) / len(values)

        tokens = sum(run["scores"][-1]["dense_tokens"] for run in mine) / len(mine)
        first = [
            next((r["step"] for r in run["metrics"] if r.get("astray_share", 0) > 0.1), 0) for run in mine
        ]
        print(
            f"{name:<14}{len(mine):>5}  {spread('dense'):<32}  {spread('compressed'):<26}{tokens:6.0f}  "
            f"{late('astray_share'):6.1%} {late('masked_share'):6.1%}  first above 10 %: {first}"
        )
    plot(runs, names, out / "compression.svg")


def plot(runs: list[dict[str, Any]], names: list[str], path: Path) -> None:
    """Mean over seeds, step by step, and the range."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    panels = {
        "correct": "correct, share of rollouts",
        "response_tokens": "length of a rollout, tokens",
        "astray_share": "rollouts gone astray, share",
        "masked_share": "tokens left out, share",
    }
    colours = dict(zip(["dense", "80", "64", "48"], ["black", "C0", "C1", "C3"], strict=True))
    plt.rcParams |= {"svg.hashsalt": "frugal_rl", "font.size": 9}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for (key, title), axis in zip(panels.items(), axes.flat, strict=True):
        for name in names:
            curves = [[row.get(key, 0.0) for row in run["metrics"]] for run in runs if label(run) == name]
            steps = range(1, 1 + min(map(len, curves)))
            columns = [[curve[i - 1] for curve in curves] for i in steps]
            colour, style = colours.get(name.split()[-1], "C7"), ":" if name.startswith("naive") else "-"
            axis.plot(steps, [sum(c) / len(c) for c in columns], style, color=colour, label=name)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(steps, low, high, alpha=0.08, color=colour, linewidth=0)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["base", "budgets", "runs", "report"])
    parser.add_argument("folder", type=Path, help="of the base, or of the runs for report")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the runs")
    parser.add_argument("--budgets", default="48,64", help="of `budgets`")
    parser.add_argument("--methods", default="snapkv,rkv,h2o,streaming", help="of `budgets`")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--arms", default="dense,naive,sparse-rl")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--budget", type=int, default=48)
    parser.add_argument("--set", action="append", default=[], help="more settings of the runs")
    given = parser.parse_args()
    if given.what == "base":
        build_base(given.folder)
    elif given.what == "budgets":
        budgets = [int(word) for word in given.budgets.split(",")]
        methods = given.methods.split(",")
        cost_of_compression(given.folder, methods, budgets, given.samples, given.problems)
    elif given.what == "runs":
        if given.out is None:
            parser.error("runs need OUT, a folder for them")
        given.out.mkdir(parents=True, exist_ok=True)
        for seed in given.seeds.split(","):
            for arm in given.arms.split(","):
                run_arm(given.folder.resolve(), given.out, arm, int(seed), given)
    else:
        report(given.folder)


if __name__ == "__main__":
    main()
