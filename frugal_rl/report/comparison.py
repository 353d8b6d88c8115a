"""A comparison as a page: curves with the seeds' range, what each arm costs, and the table.

Reads compare.results alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..compare import PHASES
from ..compare_table import commands, grid_table, notes, points, rows
from .page import Key, Panel, Section, code, drawing, figure, grid, note, page, table, tiles
from .plots import Series, bars, byte_ticks, lines, mebibytes, percent

Results = Mapping[str, Any]
HELD = ("weights", "masters, states or adapters", "gradient of the whole model")
FILES = ("patch", "adapter")
RULES = ("any bit", "by more than 1e-5")


def as_page(results: Results, command: str) -> str:
    """A self-contained HTML file. `command` made it."""
    names, body = rows(results)
    arms = {name: results["arms"][name] for name in names}
    head = tiles([_tile(name, arm) for name, arm in arms.items()])
    sections = []
    if arms:
        sections = [
            Section("Curves", grid(_curves(arms))),
            Section("Cost", grid([_peaks_figure(arms), _bytes_figure(arms), _files_figure(arms)])),
            Section("Update", grid([_changed_figure(arms), _rates_figure(arms)])),
            Section("Table", table(["", *names], [[title, *cells] for title, cells in body])),
        ]
    sections += [
        Section("Learning rates", table(*grid_table(results))),
        Section("About these numbers", "".join(note(text) for text in notes(results))),
        Section("Again", code("\n".join([command, "", *commands(results)]))),
    ]
    title = f"Comparison: {', '.join(results['arms'])}"
    return page(title, f"recipe {results['recipe']}, seeds {_words(results['seeds'])}", head, sections)


def as_drawing(results: Results) -> str:
    """An SVG file: how the arms learn, what they change, hold and leave."""
    names, _ = rows(results)
    arms = {name: results["arms"][name] for name in names}
    accuracy = [_mean(name, arm, "step") for name, arm in arms.items()]
    return drawing(
        [
            Panel(
                "Held-out accuracy by step",
                _shares(accuracy, "held-out accuracy by step", "step"),
                _keys(names),
            ),
            Panel("Training reward by step", _reward_lines(arms), _keys(names)),
            Panel("Changed entries", _changed_bars(arms), _keys(RULES)),
            Panel("Held for the weights while learning", _bytes_bars(arms), _keys(HELD)),
            Panel("What a run leaves", _files_bars(arms), _keys(FILES)),
            Panel("Training reward by learning rate", _rate_lines(arms), _keys(names)),
        ]
    )


def _tile(name: str, arm: Mapping[str, Any]) -> tuple[str, str, str]:
    against = arm.get("against", {})
    said = f"{points(against)} points, {against['verdict']}" if "verdict" in against else "the reference"
    return f"{name}: held-out accuracy", percent(arm["accuracy"]["value"]), said


def _words(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _curves(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    keys = _keys(arms)
    accuracy = [_mean(name, arm, "step") for name, arm in arms.items()]
    by_time = [_mean(name, arm, "seconds") for name, arm in arms.items()]
    band = "Mean over the seeds; the band goes from the lowest to the highest."
    return [
        figure(
            "Held-out accuracy against steps",
            _shares(accuracy, "held-out accuracy by step", "step"),
            keys=keys,
            note=band,
            numbers=_numbers(accuracy, "step"),
        ),
        figure(
            "Held-out accuracy against seconds of training",
            _shares(by_time, "held-out accuracy by seconds", "seconds"),
            keys=keys,
            note=f"{band} Seconds are the seeds' mean at that step, evaluations left out.",
            numbers=_numbers(by_time, "second"),
        ),
        figure(
            "Training reward against steps",
            _reward_lines(arms),
            keys=keys,
            note=band,
        ),
    ]


def _shares(series: Sequence[Series], label: str, x_title: str) -> str:
    return lines(series, label=label, x_title=x_title, y_format=percent, y_low=0.0, y_high=1.0)


def _keys(names: Iterable[str]) -> list[Key]:
    return [Key(name, place) for place, name in enumerate(names)]


def _mean(name: str, arm: Mapping[str, Any], axis: str) -> Series:
    """Over the seeds, at every step that all of them evaluated."""
    curves = [{point["step"]: point for point in run["curve"]} for run in arm["runs"]]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step]["accuracy"] for curve in curves] for step in steps]
    xs = [sum(curve[step][axis] for curve in curves) / len(curves) for step in steps]
    return _banded(name, xs, values)


def _reward_lines(arms: Mapping[str, Mapping[str, Any]]) -> str:
    series = [_rewards(name, arm) for name, arm in arms.items()]
    return lines(series, label="training reward by step", x_title="step")


def _rewards(name: str, arm: Mapping[str, Any]) -> Series:
    runs = [run["rewards"] for run in arm["runs"]]
    values = [list(step) for step in zip(*runs, strict=False)]
    return _banded(name, [float(n) for n in range(1, len(values) + 1)], values)


def _banded(name: str, xs: Sequence[float], values: Sequence[Sequence[float]]) -> Series:
    return Series(
        name,
        [(x, sum(v) / len(v)) for x, v in zip(xs, values, strict=True)],
        band=[(x, min(v), max(v)) for x, v in zip(xs, values, strict=True)],
    )


def _numbers(series: Sequence[Series], x_name: str) -> str:
    cells = [
        [one.name, f"{x:.4g}", percent(y or 0.0), percent(low), percent(high)]
        for one in series
        for (x, y), (_, low, high) in zip(one.points, one.band, strict=True)
    ]
    return table(["arm", x_name, "mean", "lowest seed", "highest seed"], cells)


def _peaks_figure(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Measured, phase by phase."""
    parts = [(name, [arm["phase_peak_bytes"][phase] for phase in PHASES]) for name, arm in arms.items()]
    return figure(
        "Peak memory by phase",
        bars(
            parts,
            PHASES,
            label="peak memory of each phase",
            x_title="bytes",
            x_format=mebibytes,
            make_ticks=byte_ticks,
        ),
        keys=_keys(PHASES),
        note="Of all steps the most, mean over the seeds. On a CPU it is the process's resident memory, with "
        "its libraries (bitsandbytes and peft import more) and what it freed but kept.",
        numbers=table(
            ["arm", *PHASES],
            [[name, *("unknown" if x is None else mebibytes(x) for x in sizes)] for name, sizes in parts],
        ),
    )


def _held(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
    return [
        (name, [arm["weights_bytes"], arm["optimizer_bytes"], arm["gradient_bytes"]])
        for name, arm in arms.items()
    ]


def _bytes_bars(arms: Mapping[str, Mapping[str, Any]]) -> str:
    return bars(
        _held(arms),
        HELD,
        label="bytes held for the weights while learning",
        x_title="bytes",
        x_format=mebibytes,
        stacked=True,
        make_ticks=byte_ticks,
    )


def _bytes_figure(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """What the learner holds for an entry to be trained."""
    return figure(
        "Held for the weights while learning",
        _bytes_bars(arms),
        keys=_keys(HELD),
        note="Activations, boundary states and the KV pool come on top, the same for all arms.",
        numbers=table(["arm", *HELD], [[name, *map(mebibytes, sizes)] for name, sizes in _held(arms)]),
    )


def _files_bars(arms: Mapping[str, Mapping[str, Any]]) -> str:
    return bars(
        [(name, [arm["patch_bytes"], arm.get("adapter_bytes")]) for name, arm in arms.items()],
        FILES,
        label="bytes of the files",
        x_title="bytes",
        x_format=mebibytes,
        make_ticks=byte_ticks,
    )


def _files_figure(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """What a run leaves."""
    return figure(
        "What a run leaves",
        _files_bars(arms),
        keys=_keys(FILES),
        note="A patch is exact for what was trained; an adapter's patch merges it, and rounds.",
    )


def _changed(arms: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
    return [
        (name, [arm["changed_any"] / arm["parameters"], arm["changed_1e5"] / arm["parameters"]])
        for name, arm in arms.items()
    ]


def _changed_bars(arms: Mapping[str, Mapping[str, Any]]) -> str:
    return bars(
        _changed(arms),
        RULES,
        label="changed entries by rule",
        x_title="share of all entries",
        x_format=percent,
    )


def _changed_figure(arms: Mapping[str, Mapping[str, Any]]) -> str:
    return figure(
        "Changed entries",
        _changed_bars(arms),
        keys=_keys(RULES),
        note="Of the checkpoint, after the last step; an adapter's once it is merged.",
        numbers=table(["arm", *RULES], [[name, *map(percent, both)] for name, both in _changed(arms)]),
    )


def _rates_figure(arms: Mapping[str, Mapping[str, Any]]) -> str:
    return figure(
        "Training reward by learning rate",
        _rate_lines(arms),
        keys=_keys(arms),
        note="On the first seed; what the rate was chosen by.",
    )


def _rate_lines(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Reward of the second half of the steps by place in the arm's grid."""
    series = [
        Series(
            name,
            [(float(n + 1), point["reward"]) for n, point in enumerate(arm["grid"])],
            dots=True,
        )
        for name, arm in arms.items()
    ]
    return lines(
        series, label="reward by learning rate", x_title="place in the arm's grid, lowest rate first"
    )
