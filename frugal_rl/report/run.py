"""A run's folder as a page: what it learned, took, changed and said. Unfinished runs too.

Only reads, and of the journal only the headers, so a run in progress is not disturbed. What is not there (a
summary before the end, a phase's peak on a system that does not tell it) is said to be unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..analysis import place_of
from ..config import Recipe
from ..console import duration, size
from ..journal import Journal
from ..patch import Patch, PatchError
from .page import Key, Section, code, figure, folded, grid, note, page, table, tiles
from .plots import (
    WIDE,
    Format,
    Level,
    Series,
    Span,
    areas,
    brief,
    byte_ticks,
    heat,
    lines,
    mebibytes,
    percent,
    spans,
)

PHASES = ("generate", "verify", "learn")
MOST_ROWS = 120  # of a table
MOST_BINS = 100  # of steps in the heat map, and of stretches of each phase
NEAR_LIMIT = 0.7  # of max_tokens: from here on a plot of lengths shows it
MOST_SAMPLES = 8  # steps whose responses are shown
VERDICTS = ("correct", "wrong", "no_answer", "timeout", "error")
QUANTILES = ("p01", "p05", "p50", "p95", "p99")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder as far as it was written. `entries`: a step's changed entries by tensor."""

    folder: Path
    recipe: Recipe
    rows: list[Row] = field(default_factory=list)
    entries: list[Mapping[str, int]] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    validations: list[Row] = field(default_factory=list)
    session: Row | None = None
    summary: Row | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.rows)


def read_run(folder: Path) -> Run:
    """Raises InputError where it is not a run folder."""
    journal, recipe = Journal.open(folder)
    run = Run(folder, recipe, session=_read_json(folder / "session.json"))
    for number, path in enumerate(sorted((folder / "journal").glob("[0-9]*.safetensors")), start=1):
        try:
            header = Patch.header(path)
        except PatchError as error:
            run.notes.append(f"steps from {number} on are left out: {error}")
            break
        if path != journal.path(number) or header.meta.get("step") != number:
            run.notes.append(f"steps from {number} on are left out: {path.name} does not follow")
            break
        run.rows.append(header.meta["metrics"])
        run.samples.extend(header.meta.get("samples", []))
        run.entries.append({name: tensor.entries for name, tensor in header.tensors.items()})
    run.validations.extend(_read_lines(folder / "validation.jsonl", run.step))
    summary = _read_json(folder / "summary.json")
    if summary is not None and summary.get("steps") == run.step:  # else it is of an earlier session
        return Run(**{**run.__dict__, "summary": summary})
    return run


def _read_json(path: Path) -> Row | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written yet, or by another version
        return None
    return found if isinstance(found, dict) else None


def _read_lines(path: Path, last: int) -> list[Row]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the line that is being written
            break
        if row["step"] <= last:
            rows.append(row)
    return rows


# --- the page


def as_page(run: Run) -> str:
    """A self-contained HTML file."""
    sections = [Section("Learning", _learning(run)), Section("Memory and time", _resources(run))]
    sections += [Section("What changed", _changes(run)), Section("Sampler and learner", _sampler(run))]
    sections += [Section("Responses", _responses(run)), Section("Reproduce", _reproduce(run))]
    notes = "".join(note(text) for text in [*_remarks(run), *run.notes])
    recipe = run.recipe
    lead = (
        f"{recipe.model.name} on {recipe.data.source}, reward {recipe.reward.kind}, {recipe.loss.algorithm}, "
        f"SGD with lr {recipe.learner.lr:g}, {recipe.rollout.prompts} prompts x {recipe.rollout.samples} "
        f"samples, {recipe.model.weights} weights, seed {recipe.train.seed}"
    )
    return page(f"Run {run.folder.resolve().name}", lead, tiles(_headline(run)) + notes, sections)


def _remarks(run: Run) -> list[str]:
    if run.summary is None:
        return [f"Unfinished: {run.step} of {run.recipe.train.steps} steps are in the journal."]
    if run.step < run.recipe.train.steps:
        return [f"Stopped after {run.step} of {run.recipe.train.steps} steps."]
    return []


def _headline(run: Run) -> list[tuple[str, str, str]]:
    scores = {row["step"]: row["accuracy"] for row in run.validations}
    first, last = scores.get(0), scores[max(scores)] if scores else None
    out = []
    if last is not None:
        interval = f"95 %: {percent(last['low'])} to {percent(last['high'])}, step {max(scores)}"
        out.append(("held-out accuracy", percent(last["value"]), interval))
        if first is not None and len(scores) > 1:
            out.append(("before training", percent(first["value"]), f"{first['problems']} problems"))
    out.append(("steps", f"{run.step}", f"of {run.recipe.train.steps}"))
    if run.rows:
        row = run.rows[-1]
        seconds = sum(r["seconds"] for r in run.rows)
        out.append(("time", duration(seconds), f"{seconds / run.step:.2f} s a step"))
        planned = (run.session or {}).get("planned_memory_bytes")
        beside = "plan unknown" if planned is None else f"planned {size(planned)}"
        out.append(("peak memory", size(max(r["peak_memory_bytes"] for r in run.rows)), beside))
        out.append(
            ("changed entries", f"{row['changed_any']:,}", f"{row['changed_1e5']:,} by more than 1e-5")
        )
    if run.summary is not None:
        share = percent(run.summary["changed_any"] / run.summary["parameters"])
        out.append(("patch", f"{run.summary['patch_bytes']:,} bytes", f"{share} of all entries changed"))
    return out


def _curve(run: Run, key: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row.get(key)) for row in run.rows]


def _numbers(run: Run, columns: Mapping[str, Callable[[Row], Any]], show: Format = brief) -> str:
    """A table of steps, thinned where there are many."""
    every = -(-len(run.rows) // MOST_ROWS) or 1
    chosen = [row for i, row in enumerate(run.rows) if i % every == 0 or i == len(run.rows) - 1]

    def cell(value: Any) -> str:
        return "-" if value is None else show(value)

    rows = [[str(row["step"]), *(cell(get(row)) for get in columns.values())] for row in chosen]
    thinned = note(f"Every {every}th step; all are in metrics.jsonl.") if every > 1 else ""
    return table(["step", *columns], rows) + thinned


def _plot(
    run: Run,
    title: str,
    keys: Mapping[str, str],
    *,
    show: Format = brief,
    explain: str = "",
    levels: Sequence[Level] = (),
    **limits: Any,
) -> str:
    """A figure of one curve for each of a step's numbers; `keys`: name to what it is called."""
    present = {k: name for k, name in keys.items() if any(row.get(k) is not None for row in run.rows)}
    series = [Series(name, _curve(run, key)) for key, name in present.items()]
    plot = lines(series, label=title, x_title="step", y_format=show, levels=levels, **limits)
    legend = [Key(name, place) for place, name in enumerate(present.values())] if len(present) > 1 else []
    columns = {name: (lambda row, key=key: row.get(key)) for key, name in present.items()}
    return figure(title, plot, keys=legend, note=explain, numbers=_numbers(run, columns, show))


# --- learning


def _learning(run: Run) -> str:
    parts = sorted({key for row in run.rows for key in row if key.startswith("reward/")})
    figures = [_reward(run), _accuracy(run), _verdicts(run)]
    if parts:
        names = {key: key.removeprefix("reward/") for key in parts}
        figures.append(
            _plot(run, "Parts of the reward", names, explain="Mean of each part, before its weight.")
        )
    figures += [
        _lengths(run),
        _signal(run),
        _plot(run, "Entropy", {"entropy": "entropy"}, explain="Nats a token.", y_low=0),
        _plot(
            run,
            "Gradient norm",
            {"gradient_norm": "norm before clipping"},
            y_low=0,
            levels=[Level(run.recipe.learner.clip, "clipped at")],
        ),
    ]
    if any(row.get("kl") is not None for row in run.rows):
        figures.append(_plot(run, "KL to the reference", {"kl": "KL"}, explain="Nats a token.", y_low=0))
    return grid(figures)


def _lengths(run: Run) -> str:
    keys = {"response_tokens": "mean", "longest_tokens": "longest"}
    if any(row["truncated"] for row in run.rows):
        keys["ended_tokens"] = "mean of those that ended"
    most = run.recipe.rollout.max_tokens
    near = any(row["longest_tokens"] > NEAR_LIMIT * most for row in run.rows)
    levels = [Level(most, "limit")] if near else []
    return _plot(run, "Response length", keys, explain="Tokens.", y_low=0, levels=levels)


def _reward(run: Run) -> str:
    count = run.recipe.rollout.prompts * run.recipe.rollout.samples
    band = []
    for row in run.rows:
        if row.get("reward_std") is not None:
            both = 2 * row["reward_std"] / math.sqrt(count)
            band.append((row["step"], row["reward"] - both, row["reward"] + both))
    series = [Series("reward", _curve(run, "reward"), band)]
    least = min([0.0, *(low for _, low, _ in band), *(row["reward"] for row in run.rows)])
    plot = lines(series, label="mean reward of a step's responses", x_title="step", y_low=least)
    explain = f"Mean of a step's {count} responses" + (
        "; the band is two standard errors, the responses taken as independent." if band else "."
    )
    columns = {"reward": lambda row: row["reward"], "standard deviation": lambda row: row.get("reward_std")}
    return figure("Reward", plot, note=explain, numbers=_numbers(run, columns))


def _accuracy(run: Run) -> str:
    points = [(row["step"], row["accuracy"]) for row in run.validations]
    series = Series(
        "held-out accuracy",
        [(step, score["value"]) for step, score in points],
        [(step, score["low"], score["high"]) for step, score in points],
        dots=True,
        colour=2,
    )
    plot = lines([series], label="held-out accuracy", x_title="step", y_format=percent, y_low=0, y_high=1)
    numbers = table(
        ["step", "accuracy", "95 % from", "to", "problems"],
        [
            [str(step), *(percent(s[k]) for k in ("value", "low", "high")), f"{s['problems']:,}"]
            for step, s in points
        ],
    )
    explain = "Greedy answers to problems that are not trained on; the band is the 95 % interval."
    return figure("Held-out accuracy", plot, note=explain, numbers=numbers)


def _verdicts(run: Run) -> str:
    names = [name for name in VERDICTS if any(row["verdicts"].get(name) for row in run.rows)]
    totals = [sum(row["verdicts"].values()) for row in run.rows]
    shares = [
        (name, [row["verdicts"].get(name, 0) / total for row, total in zip(run.rows, totals, strict=True)])
        for name in names
    ]
    plot = areas([row["step"] for row in run.rows], shares, label="verdicts", x_title="step")
    columns = {name: (lambda row, name=name: row["verdicts"].get(name, 0)) for name in names}
    keys = [Key(name.replace("_", " "), place) for place, name in enumerate(names)]
    return figure("Verdicts", plot, keys=keys, note="Of a step's responses.", numbers=_numbers(run, columns))


def _signal(run: Run) -> str:
    def no_signal(row: Row) -> float:
        return 1 - float(row["signal_groups"]) / row["groups"]

    series = [
        Series("groups without signal", [(row["step"], no_signal(row)) for row in run.rows]),
        Series("truncated responses", _curve(run, "truncated")),
    ]
    plot = lines(series, label="groups without signal", x_title="step", y_format=percent, y_low=0, y_high=1)
    keys = [Key(s.name, place) for place, s in enumerate(series)]
    explain = "A group whose responses all earn the same teaches nothing."
    columns: dict[str, Callable[[Row], Any]] = {
        "without signal": no_signal,
        "truncated": lambda r: r["truncated"],
    }
    return figure("Lost to learning", plot, keys=keys, note=explain, numbers=_numbers(run, columns, percent))


# --- memory and time


def _resources(run: Run) -> str:
    shares = [
        (
            phase,
            [row["phase_seconds"].get(phase, 0.0) / sum(row["phase_seconds"].values()) for row in run.rows],
        )
        for phase in PHASES
    ]
    plot = areas([row["step"] for row in run.rows], shares, label="time by phase", x_title="step")
    columns = {phase: (lambda row, phase=phase: row["phase_seconds"].get(phase)) for phase in PHASES}
    keys = [Key(phase, place) for place, phase in enumerate(PHASES)]
    figures = [
        _memory(run),
        figure(
            "Where the time goes",
            plot,
            keys=keys,
            note="Share of a step; the table has seconds. Most verifying is done while sampling.",
            numbers=_numbers(run, columns),
        ),
        _plot(run, "Seconds a step", {"seconds": "seconds"}, y_low=0),
        _plot(run, "Tokens sampled a second", {"tokens_per_s": "tokens/s"}, y_low=0),
    ]
    return grid(figures)


def _memory(run: Run) -> str:
    title = "Memory over time"
    if not any((row.get("phase_peak_bytes") or {}).get(p) for row in run.rows for p in PHASES):
        return figure(
            title, _memory_by_step(run), note="The peaks of single phases are not known.", whole=True
        )
    levels = []
    if run.session is not None:
        held, plan = run.session["held_memory_bytes"], run.session["plan"]
        levels = [
            Level(held + plan[f"{name}_bytes"], f"planned, {name}") for name in ("generating", "learning")
        ]
    plot = spans(
        _phase_spans(run),
        label="peak memory of each phase over time",
        x_title="seconds of training",
        y_format=mebibytes,
        levels=levels,
        make_ticks=byte_ticks,
    )
    columns = {
        phase: (lambda row, phase=phase: (row.get("phase_peak_bytes") or {}).get(phase)) for phase in PHASES
    }
    explain = "The height of a stretch is the peak of its phase, the weights included."
    if run.session is not None and not run.session["environment"]["devices"]:
        explain += (
            " On a CPU it is the process's resident memory, its libraries and what it freed but kept too."
        )
    keys = [Key(phase, place) for place, phase in enumerate(PHASES)]
    numbers = _numbers(run, {**columns, "since the start": lambda row: row["peak_memory_bytes"]}, mebibytes)
    return figure(title, plot, keys=keys, note=explain, numbers=numbers, whole=True)


def _phase_spans(run: Run) -> list[Span]:
    """Neighbouring steps together where there are many, their phases one after the other."""
    together = -(-run.step // MOST_BINS)
    out, now = [], 0.0
    for first in range(0, run.step, together):
        rows = run.rows[first : first + together]
        steps = (
            f"step {rows[0]['step']}" if len(rows) == 1 else f"steps {rows[0]['step']} to {rows[-1]['step']}"
        )
        for place, phase in enumerate(PHASES):
            seconds = sum(row["phase_seconds"].get(phase, 0.0) for row in rows)
            peaks = [peak for row in rows if (peak := (row.get("phase_peak_bytes") or {}).get(phase))]
            if peaks:
                words = f"{steps}, {phase}: {mebibytes(max(peaks))}, {seconds:.2f} s"
                out.append(Span(now, now + seconds, max(peaks), place, words))
            now += seconds
    return out


def _memory_by_step(run: Run) -> str:
    return lines(
        [Series("peak since the start", _curve(run, "peak_memory_bytes"))],
        label="peak memory",
        x_title="step",
        y_format=mebibytes,
        y_low=0,
        width=WIDE,
        make_ticks=byte_ticks,
    )


# --- what changed


def _changes(run: Run) -> str:
    return grid(
        [
            _plot(
                run,
                "Entries that differ from the base",
                {"changed_any": "in any bit", "changed_1e5": "by more than 1e-5"},
                y_low=0,
            ),
            _plot(run, "Entries a step changes", {"changed_step": "entries"}, y_low=0),
            _by_layer(run),
        ]
    )


def _by_layer(run: Run) -> str:
    together = -(-run.step // MOST_BINS) or 1
    layers = sorted(
        {place_of(name)[0] for step in run.entries for name in step}, key=lambda n: (n is None, n or 0)
    )
    names = ["outside" if layer is None else str(layer) for layer in layers]
    columns, values = [], []
    for first in range(0, run.step, together):
        chunk = run.entries[first : first + together]
        columns.append(str(first + 1))
        sums = dict.fromkeys(layers, 0)
        for step in chunk:
            for name, entries in step.items():
                sums[place_of(name)[0]] += entries
        values.append([sums[layer] / len(chunk) for layer in layers])
    by_layer = [list(row) for row in zip(*values, strict=True)]
    plot = heat(
        names, columns, by_layer, label="changed entries by layer", x_title="step", value_format=brief,
        row_title="layer",
    )  # fmt: skip
    explain = "Entries that each step changes in a layer" + (
        f"; a cell is the mean of {together} steps." if together > 1 else "."
    )
    numbers = table(
        ["layer", *columns], [[n, *map(brief, row)] for n, row in zip(names, by_layer, strict=True)]
    )
    return figure("Changed entries by layer and step", plot, note=explain, numbers=numbers, whole=True)


# --- the sampler


def _sampler(run: Run) -> str:
    keys = [f"xi_{q}" for q in QUANTILES]

    def log_of(row: Row, key: str) -> float | None:
        return math.log(row[key]) if row.get(key) else None

    series = [
        Series(f"{float(q[1:]):g} %", [(row["step"], log_of(row, key)) for row in run.rows])
        for q, key in zip(QUANTILES, keys, strict=True)
    ]
    plot = lines(series, label="quantiles of the ratio", x_title="step", y_title="ln xi, nats")
    columns = {s.name: (lambda row, key=key: log_of(row, key)) for s, key in zip(series, keys, strict=True)}
    figures = [
        figure(
            "Learner over sampler, by token",
            plot,
            keys=[Key(s.name, place) for place, s in enumerate(series)],
            note="Quantiles of ln xi, the learner's log-probability less the sampler's: 0 if they agree.",
            numbers=_numbers(run, columns),
        ),
        _plot(
            run,
            "Rejected and masked",
            {"rejected_share": "responses rejected", "masked_share": "tokens masked"},
            show=percent,
            explain="What the correction leaves out.",
            y_low=0,
        ),
        _plot(
            run,
            "Clipped",
            {"clip_share": "tokens"},
            show=percent,
            explain="Tokens at the ratio's limit.",
            y_low=0,
        ),
    ]
    return grid(figures)


# --- what it said


def _responses(run: Run) -> str:
    steps = sorted({sample["step"] for sample in run.samples})
    if not steps:
        return note("This run kept no responses.")
    last = len(steps) - 1
    places = {round(last * n / (MOST_SAMPLES - 1)) for n in range(MOST_SAMPLES)} if last else {0}
    chosen = [steps[place] for place in sorted(places)]
    cards = []
    for step in chosen:
        for sample in run.samples:
            if sample["step"] == step:
                cards.append(_card(sample))
    said = "The first response to the first problems of a step, unchosen; all are in samples.jsonl."
    return note(said) + grid(cards)


def _card(sample: Row) -> str:
    good = "good" if sample["verdict"] == "correct" else "bad"
    cut = ", cut off at the limit" if sample["truncated"] else ""
    facts = f"reward {sample['reward']:g}, {sample['tokens']} tokens{cut}; expected {sample['answer']}"
    return (
        f'<div class="card"><h3>Step {sample["step"]} '
        f'<span class="badge {good}">{escape(sample["verdict"].replace("_", " "))}</span></h3>'
        f'<pre class="wrap"><span class="prompt">{escape(sample["prompt"])}</span>'
        f"{escape(sample['response'])}</pre>{note(facts)}</div>"
    )


# --- once more


def _reproduce(run: Run) -> str:
    folder = run.folder
    commands = [f"frugal-rl train --recipe {folder / 'recipe.toml'} -o again"]
    if run.summary is not None:
        patch = folder / "patch.safetensors"
        commands += [
            f"frugal-rl eval --patch {patch}",
            f"frugal-rl patch apply {run.recipe.model.name} {patch} -o trained",
        ]
    commands += [f"frugal-rl analyse {folder} --html update.html", f"frugal-rl train --resume {folder}"]
    body = code("\n".join(commands)) + folded(
        "recipe.toml, every default written out", code(run.recipe.to_toml())
    )
    environment = (run.session or {}).get("environment")
    if environment:
        shown = json.dumps(environment, indent=2)
        body += folded("environment of the last session", code(shown))
    return body
