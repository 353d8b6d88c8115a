"""A comparison as a table: for a terminal and as markdown, from compare.results alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .compare import PHASES
from .console import size

Row = tuple[str, list[str]]
Results = Mapping[str, Any]
APART = 0.2  # of accuracy between two seeds of a rate: more, and the rate is called unstable


def rows(results: Results) -> tuple[list[str], list[Row]]:
    """Arms that have results, and a row a quantity."""
    arms = {name: value for name, value in results["arms"].items() if "error" not in value}
    reference = results["reference"]
    target = f"{results['target_accuracy']:.1%}"
    out: list[Row] = []

    def row(title: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        out.append((title, [cell(value) for value in arms.values()]))

    row("learning rate, best of its grid", _rate)
    row("held-out accuracy (95 %)", lambda v: interval(v["accuracy"]))
    row("lowest and highest seed", _spread)
    row("training reward, mean of all steps", lambda v: _seeds(v, "mean_reward", "{:.3f}".format))
    row(f"less {reference}'s, same problems (95 %)", _against)
    row("McNemar's exact p, by seed", _mcnemar)
    row(f"steps to {target}, by evaluations", lambda v: _reached(v, "step"))
    row(f"seconds of training to {target}", lambda v: _reached(v, "seconds"))
    row("checkpoint + patch: accuracy (95 %)", lambda v: interval(v["applied"]))
    row("that, less the trained policy's (95 %)", _applied)
    row(
        "norm of the update lost by merging", lambda v: f"{v['merge_lost']:.1%}" if "merge_lost" in v else "0"
    )
    row("changed entries, any bit", lambda v: _seeds(v, "changed_any", _share_of(v)))
    row("changed entries, by more than 1e-5", lambda v: _seeds(v, "changed_1e5", _share_of(v)))
    row("patch (lora: the merged delta), bytes", lambda v: _seeds(v, "patch_bytes", "{:,.0f}".format))
    row("adapter, bytes", lambda v: f"{v['adapter_bytes']:,.0f}" if "adapter_bytes" in v else "-")
    row("peak memory, its libraries included", lambda v: _seeds(v, "peak_memory_bytes", _bytes))
    for phase in PHASES:
        row(f"  of the phase {phase}", lambda v, phase=phase: _peak(v["phase_peak_bytes"][phase]))  # type: ignore[misc]
    row("  weights and patch in memory", lambda v: _bytes(v["weights_bytes"]))
    row("  masters, states or adapters", lambda v: _bytes(v["optimizer_bytes"]))
    row("  gradient of the whole model", lambda v: _bytes(v["gradient_bytes"]))
    row("  KV pool, planned", lambda v: size(v["plan"]["generating"]["KV pool"]))
    row("  activations and boundaries, planned", lambda v: size(_activations(v["plan"]["learning"])))
    for phase in PHASES:
        key = f"{phase}_seconds"
        row(f"seconds a step: {phase}", lambda v, key=key: _seeds(v, key, "{:.2f}".format))  # type: ignore[misc]
    row("tokens sampled a second", lambda v: _seeds(v, "tokens_per_s", "{:,.0f}".format))
    row("seconds of a run's training", lambda v: _seeds(v, "train_seconds", "{:.0f}".format))
    return list(arms), out


def interval(value: Mapping[str, float]) -> str:
    return f"{value['value']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def points(value: Mapping[str, float]) -> str:
    """A difference in percentage points."""
    low, high = 100 * value["low"], 100 * value["high"]
    return f"{100 * value['value']:+.1f} ({low:+.1f} to {high:+.1f})"


def _rate(value: Mapping[str, Any]) -> str:
    return f"{value['lr']:g}{' (edge)' if value['edge'] else ''}"


def _last(value: Mapping[str, Any]) -> list[float]:
    return [run["curve"][-1]["accuracy"] for run in value["runs"]]


def _spread(value: Mapping[str, Any]) -> str:
    return f"{min(_last(value)):.1%}, {max(_last(value)):.1%}"


def _apart(value: Mapping[str, Any]) -> float:
    return max(_last(value)) - min(_last(value))


def _against(value: Mapping[str, Any]) -> str:
    found = value.get("against")
    if found is None:
        return "-"
    return found["error"] if "error" in found else f"{points(found)}: {found['verdict']}"


def _mcnemar(value: Mapping[str, Any]) -> str:
    found = value.get("against", {}).get("mcnemar_p")
    return ", ".join(f"{p:.2g}" for p in found) if found else "-"


def _reached(value: Mapping[str, Any], key: str) -> str:
    found = value["reached"]
    if found[key] is None:
        return f"{found['seeds']} of {len(value['runs'])} seeds"
    return _seeds(found, key, "{:.0f}".format)


def _seeds(value: Mapping[str, Any], key: str, form: Callable[[float], str]) -> str:
    """The mean and, where they differ in print, the lowest and highest seed."""
    low, high = map(form, value["span"][key])
    return form(value[key]) if low == high else f"{form(value[key])} ({low} to {high})"


def _share_of(value: Mapping[str, Any]) -> Callable[[float], str]:
    return lambda count: f"{count / value['parameters']:.2%}"


def _applied(value: Mapping[str, Any]) -> str:
    if value["kind"] != "lora" and value["weights"] == "bf16":
        return "0, exact"
    return points(value["applied_less_trained"])


def _bytes(count: float) -> str:
    return size(round(count)) if count else "0"


def _peak(count: float | None) -> str:
    return "unknown" if count is None else _bytes(count)


def _activations(learning: Mapping[str, int]) -> int:
    return learning["boundary states"] + learning["micro-batch"] + learning["gradient scratch"]


def notes(results: Results) -> list[str]:
    """What a reader must know of the table."""
    out = [
        "Same problems, rollout seeds, loss and layer-by-layer pass for all; each arm had the same number of "
        "runs, its learning rate chosen by training reward, not by held-out problems.",
        "Intervals: bootstrap over problems and seeds (10,000 draws); an accuracy's is at least Wilson's. A "
        "difference whose interval has 0 in it is called within noise. Other brackets: lowest and highest "
        "seed.",
    ]
    for name, value in results["arms"].items():
        if "error" in value:
            out.append(f"{name} has no result: {value['error']}")
        elif value["edge"]:
            out.append(
                f"{name}: the best learning rate is at the edge of its grid; a wider one may do better"
            )
        if "error" not in value and (apart := _apart(value)) > APART:
            out.append(
                f"{name}: its seeds end {100 * apart:.0f} points apart: the learning rate, chosen on the "
                "first seed, is not a stable one; name a grid without it (--lr-grid)"
            )
        if "error" not in value and len(value["seeds_finished"]) < len(results["seeds"]):
            seeds = ", ".join(map(str, value["seeds_finished"]))
            out.append(f"{name}: only seeds {seeds} of {len(results['seeds'])} finished")
    return out + [f"failed: {folder}: {why}" for folder, why in results["failed"].items()]


def text(results: Results) -> str:
    """For a terminal."""
    names, body = rows(results)
    lines = [["", *names], *([title, *cells] for title, cells in body)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*(line.rstrip() for line in shown if names), "", *notes(results)])


def markdown(results: Results, command: Sequence[str]) -> str:
    """The table, the grids, the curves and the commands, as a file of its own."""
    names, body = rows(results)
    blocks = [
        f"# Comparison: {', '.join(results['arms'])}",
        f"`{shlex.join(command)}`",
        _table(["", *names], [[title, *cells] for title, cells in body]),
        "\n".join(f"- {note}" for note in notes(results)),
        "## Learning rates (first seed)",
        _table(*grid_table(results)),
    ]
    done = {name: results["arms"][name] for name in names}
    if done:
        blocks += ["## Held-out accuracy by step (mean, lowest to highest seed)", _curves(done)]
        blocks += ["## Each run again", "```sh\n" + "\n".join(commands(results)) + "\n```"]
    return "\n\n".join(blocks) + "\n"


def grid_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and lines: what each learning rate of each grid came to."""
    return ["arm", "learning rate", "reward, second half", "held-out accuracy"], [
        [name, f"{point['lr']:g}", *_grid_cells(point)]
        for name, value in results["arms"].items()
        for point in value["grid"]
    ]


def commands(results: Results) -> list[str]:
    """Of every run that is in the table."""
    return [run["command"] for value in results["arms"].values() for run in value.get("runs", [])]


def _grid_cells(point: Mapping[str, Any]) -> list[str]:
    if point["error"] is not None:
        return [point["error"], "-"]
    return [f"{point['reward']:.3f}", f"{point['accuracy']['value']:.1%}"]


def _curves(arms: Mapping[str, Any]) -> str:
    by_step: dict[int, dict[str, list[float]]] = {}
    for name, value in arms.items():
        for run in value["runs"]:
            for point in run["curve"]:
                by_step.setdefault(point["step"], {}).setdefault(name, []).append(point["accuracy"])

    def cell(found: list[float] | None) -> str:
        if not found:
            return "-"
        return f"{sum(found) / len(found):.1%} ({min(found):.1%} to {max(found):.1%})"

    lines = [
        [str(step), *(cell(found.get(name)) for name in arms)] for step, found in sorted(by_step.items())
    ]
    return _table(["step", *arms], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
