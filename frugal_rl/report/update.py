"""What analysis.py measured of an update, as JSON, as text and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..analysis import (
    ULP_LIMITS,
    Counts,
    History,
    Overlap,
    Spread,
    TensorUpdate,
    Update,
    mean_rank,
    mean_spread,
    ulp_label,
)
from .page import Key, Section, figure, grid, note, page, table, tiles
from .plots import SMALL, Series, bars, brief, heat, lines, percent

NARROW_LAYERS = 8  # a heat map of more layers goes over the whole page
RULES = ("in any bit", "by more than 1e-5")
SOURCES = (
    "Definitions: changed entries and their tolerance, o1 and o2 as in arXiv 2505.11711; effective rank, the "
    "directions that hold 99 % of the squared singular values, as in arXiv 2602.07729; rank, singular values "
    "above max(O, I) * 2**-23 of the largest. Chance: as many changed entries in each tensor, placed at "
    "random."
)


@dataclass(frozen=True)
class Study:
    """What was analysed, in words, and what was found. `other`: another update it was compared with."""

    title: str
    base: str
    update: Update
    history: History | None = None
    other: tuple[str, Overlap] | None = None


# --- JSON


def as_json(study: Study) -> dict[str, Any]:
    """Everything, for a machine."""
    update = study.update
    return {
        "title": study.title,
        "base": study.base,
        **asdict(update.total),
        "kinds": [{"kind": kind, **_group(tensors)} for kind, tensors in update.by(_kind).items()],
        "layers": [{"layer": layer, **_group(tensors)} for layer, tensors in update.by(_layer).items()],
        "ulps": [
            {"ulps": ulp_label(i), "at_least": ULP_LIMITS[i], "entries": entries}
            for i, entries in enumerate(update.ulps)
        ],
        "tensors": [asdict(tensor) for tensor in update.tensors],
        "steps": None if study.history is None else _steps(study.history),
        "overlap": None if study.other is None else {"with": study.other[0], **study.other[1].as_json()},
    }


def _group(tensors: Sequence[TensorUpdate]) -> dict[str, Any]:
    rank, rows, columns = mean_rank(tensors), mean_spread(tensors, "rows"), mean_spread(tensors, "columns")
    return {
        **asdict(_sum(tensors)),
        "effective_rank_share": None
        if rank is None
        else dict(zip(("mean", "low", "high"), rank, strict=True)),
        "rows": None if rows is None else asdict(rows),
        "columns": None if columns is None else asdict(columns),
    }


def _steps(history: History) -> dict[str, Any]:
    persistence = history.persistence
    return {
        "touched": history.touched,
        "times": history.times(),
        "persistence": None if persistence is None else persistence.as_json(),
        "each": [
            {
                "step": s.step,
                "touched": s.touched,
                "fresh": s.fresh,
                "previous": None if s.previous is None else s.previous.as_json(),
            }
            for s in history.steps
        ],
    }


def _kind(tensor: TensorUpdate) -> str:
    return tensor.kind


def _layer(tensor: TensorUpdate) -> int | None:
    return tensor.layer


def _sum(tensors: Sequence[TensorUpdate]) -> Counts:
    return sum((t.counts for t in tensors), Counts())


def _shares(counts: Counts) -> tuple[float, float]:
    entries = max(1, counts.entries)
    return counts.changed_any / entries, counts.changed_1e5 / entries


# --- text


def as_text(study: Study) -> str:
    """For a terminal."""
    update, blocks = study.update, [_headline(study)]
    tables = [_kind_table(update), _layer_table(update), _ulp_table(update), _spread_table(update)]
    blocks += [_columns(head, rows) for head, rows in tables if rows]
    if study.history is not None:
        blocks.append("\n".join([_columns(*_times_table(study.history)), *_step_lines(study.history)]))
    if study.other is not None:
        blocks.append(_overlap_line(*study.other))
    return "\n\n".join(blocks)


def _headline(study: Study) -> str:
    total = study.update.total
    any_bit, moved = _shares(total)
    return (
        f"{study.title}, base {study.base}\n"
        f"{total.changed_any:,} of {total.entries:,} entries changed in any bit ({percent(any_bit)}), "
        f"{total.changed_1e5:,} by more than 1e-5 ({percent(moved)})"
    )


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right; a head may have two lines."""
    lines_of_head = [list(line) for line in zip(*(_two_lines(name) for name in head), strict=True)]
    if not any(lines_of_head[0]):
        lines_of_head = lines_of_head[1:]
    every = [*lines_of_head, *rows]
    widths = [max(len(row[c]) for row in every) for c in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )


def _two_lines(name: str) -> tuple[str, str]:
    above, _, below = name.rpartition("\n")
    return above, below


def _kind_table(update: Update) -> tuple[list[str], list[list[str]]]:
    rows = []
    for kind, tensors in update.by(_kind).items():
        counts = _sum(tensors)
        any_bit, moved = _shares(counts)
        rows.append([kind, f"{counts.entries:,}", percent(any_bit), percent(moved), _rank_cell(tensors)])
    return ["kind", "entries", "any bit", "> 1e-5", "effective rank\nof full (range)"], rows


def _spread_table(update: Update) -> tuple[list[str], list[list[str]]]:
    head = ["changed entries gather in", "columns\nGini (chance)", "columns\nin top 1 % (chance)"]
    head += ["rows\nGini (chance)", "rows\nin top 1 % (chance)"]
    rows = []
    for kind, tensors in update.by(_kind).items():
        sides = [mean_spread(tensors, side) for side in ("columns", "rows")]
        if any(sides):
            rows.append([kind, *(cell for side in sides for cell in _spread_cells(side))])
    return head, rows


def _rank_cell(tensors: Sequence[TensorUpdate]) -> str:
    rank = mean_rank(tensors)
    if rank is None:
        return "-"
    estimated = any(t.rank is not None and t.rank.error is not None for t in tensors)
    mean, low, high = (f"{100 * share:.3g}" for share in rank)
    return f"{'about ' if estimated else ''}{mean} % ({low} to {high})"


def _spread_cells(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "-", "-"
    return (
        f"{spread.gini:.2f} ({spread.gini_chance:.2f})",
        f"{100 * spread.top:.3g} % ({100 * spread.top_chance:.3g})",
    )


def _layer_table(update: Update) -> tuple[list[str], list[list[str]]]:
    rows = []
    for layer, tensors in sorted(update.by(_layer).items(), key=lambda item: _order(item[0])):
        counts = _sum(tensors)
        any_bit, moved = _shares(counts)
        name = "outside" if layer is None else str(layer)
        rows.append([name, f"{counts.entries:,}", percent(any_bit), percent(moved), _rank_cell(tensors)])
    return ["layer", "entries", "any bit", "> 1e-5", "effective rank\nof full (range)"], rows


def _order(layer: int | None) -> tuple[bool, int]:
    return layer is None, layer or 0


def _ulp_table(update: Update) -> tuple[list[str], list[list[str]]]:
    changed = max(1, update.total.changed_any)
    return ["ULPs", "entries", "of changed"], [
        [ulp_label(i), f"{entries:,}", percent(entries / changed)]
        for i, entries in enumerate(update.ulps)
        if entries
    ]


def _times(history: History) -> list[tuple[str, int]]:
    """Entries by how many steps touched them, in classes that double."""
    times, out, first = history.times(), [], 1
    while first <= len(times):
        last = min(len(times), 2 * (first - 1)) if first > 2 else first
        entries = sum(times[first - 1 : last])
        out.append((f"{first}" if first == last else f"{first} to {last}", entries))
        first = last + 1
    return out


def _times_table(history: History) -> tuple[list[str], list[list[str]]]:
    touched = max(1, history.touched)
    return ["touched by steps", "entries", "of touched"], [
        [name, f"{entries:,}", percent(entries / touched)] for name, entries in _times(history) if entries
    ]


def _step_lines(history: History) -> list[str]:
    out = [f"{history.touched:,} entries were touched by any of {len(history.steps)} steps"]
    pairs = history.persistence
    if pairs is not None and pairs.jaccard is not None and pairs.jaccard_chance is not None:
        out.append(
            f"neighbouring steps touch the same entries: Jaccard {pairs.jaccard:.3f}, chance "
            f"{pairs.jaccard_chance:.3f}; {pairs.common / max(1, pairs.second):.1%} of a step's entries were "
            "touched by the step before"
        )
    return out


def _overlap_line(name: str, both: Overlap) -> str:
    if both.jaccard is None or both.jaccard_chance is None:
        return f"with {name}: neither changes anything"
    same = (
        f"; {both.same_way / both.common:.1%} of these moved the same way"
        if both.common and both.same_way is not None
        else ""
    )
    return (
        f"with {name}: {both.common:,} entries in common, chance {both.common_chance:,.0f}{same}\n"
        f"Jaccard {both.jaccard:.3f}, chance {both.jaccard_chance:.3f}; "
        f"o1 {both.common / max(1, both.first):.1%}, o2 {both.common / max(1, both.second):.1%}"
    )


# --- the page


def as_page(study: Study, command: str) -> str:
    """A self-contained HTML file. `command` made it."""
    update = study.update
    total = update.total
    any_bit, moved = _shares(total)
    ranks = mean_rank(update.tensors)
    columns = mean_spread(update.tensors, "columns")
    ones = update.ulps[1] / max(1, total.changed_any)
    head = tiles(
        [
            ("changed in any bit", percent(any_bit), f"{total.changed_any:,} of {total.entries:,}"),
            ("changed by more than 1e-5", percent(moved), f"{total.changed_1e5:,} entries"),
            ("changed by one ULP", percent(ones), "of the changed entries"),
            *([("effective rank", percent(ranks[0]), "of full rank, mean of all matrices")] if ranks else []),
            *(
                [
                    (
                        "in the fullest 1 % of columns",
                        percent(columns.top),
                        f"chance {percent(columns.top_chance)}",
                    )
                ]
                if columns
                else []
            ),
        ]
    )
    sections = [Section("Where", _where(update)), Section("How", _how(update))]
    if study.history is not None:
        sections.append(Section("Step by step", _history(study.history)))
    if study.other is not None:
        sections.append(Section("Overlap", _overlap(*study.other)))
    sections.append(Section("About these numbers", note(SOURCES) + note(f"Made by: {command}")))
    return page(f"Update: {study.title}", f"against the base {study.base}", head, sections)


def _where(update: Update) -> str:
    layers = sorted({t.layer for t in update.tensors if t.layer is not None})
    kinds = list(dict.fromkeys(t.kind for t in update.tensors if t.layer is not None))
    found = {(t.layer, t.kind): _shares(t.counts)[0] for t in update.tensors}
    cells = [[found.get((layer, kind)) for layer in layers] for kind in kinds]
    kind_rows = [(kind, _shares(_sum(tensors))) for kind, tensors in update.by(_kind).items()]
    layer_series = [
        Series(
            name,
            [(layer, _shares(_sum(tensors))[rule]) for layer, tensors in _in_layers(update, layers)],
            dots=len(layers) < 60,
        )
        for rule, name in enumerate(RULES)
    ]
    keys = [Key(name, place) for place, name in enumerate(RULES)]
    figures = [
        figure(
            "Changed share by kind of tensor",
            bars(
                kind_rows,
                RULES,
                label="changed share by kind",
                x_title="of the kind's entries",
                x_format=percent,
            ),
            keys=keys,
            numbers=table(*_kind_table(update)),
        ),
        figure(
            "Changed share by layer",
            lines(
                layer_series,
                label="changed share by layer",
                x_title="layer",
                y_title="of the layer's entries",
                y_format=percent,
                y_low=0,
            ),
            keys=keys,
            numbers=table(*_layer_table(update)),
        ),
    ]
    if layers and kinds:
        numbers = table(
            ["", *(f"layer {layer}" for layer in layers)],
            [
                [kind, *("-" if v is None else percent(v) for v in row)]
                for kind, row in zip(kinds, cells, strict=True)
            ],
        )
        plot = heat(
            kinds,
            [str(layer) for layer in layers],
            cells,
            label="share changed in any bit, by layer and kind",
            x_title="layer",
        )
        figures.append(
            figure("Share changed in any bit", plot, numbers=numbers, whole=len(layers) > NARROW_LAYERS)
        )
    return grid(figures)


def _in_layers(update: Update, layers: Sequence[int]) -> list[tuple[int, list[TensorUpdate]]]:
    groups = update.by(_layer)
    return [(layer, groups[layer]) for layer in layers]


def _how(update: Update) -> str:
    changed = max(1, update.total.changed_any)
    ulps = [(ulp_label(i), [entries / changed]) for i, entries in enumerate(update.ulps) if entries]
    figures = [
        figure(
            "How far entries moved",
            bars(ulps, ["share"], label="ULPs", x_title="of the changed entries", x_format=percent),
            note="In units in the last place: by one ULP means to the next number that the format has.",
            numbers=table(*_ulp_table(update)),
        )
    ]
    ranked = {kind: mean_rank(tensors) for kind, tensors in update.by(_kind).items()}
    shares = [(kind, [rank[0]]) for kind, rank in ranked.items() if rank is not None]
    if shares:
        figures.append(
            figure(
                "Effective rank of the update",
                bars(shares, ["mean"], label="effective rank", x_title="of full rank", x_format=percent),
                note="Directions that hold 99 % of the squared singular values; mean over the layers.",
                numbers=_rank_numbers(update),
            )
        )
    for side, title in (
        ("columns", "Concentration by input column"),
        ("rows", "Concentration by output row"),
    ):
        spreads = {kind: mean_spread(tensors, side) for kind, tensors in update.by(_kind).items()}
        rows = [(kind, [s.gini, s.gini_chance]) for kind, s in spreads.items() if s is not None]
        if not rows:
            continue
        numbers = table(
            ["kind", "Gini", "chance", "in the top 1 %", "chance"],
            [
                [kind, f"{s.gini:.3f}", f"{s.gini_chance:.3f}", percent(s.top), percent(s.top_chance)]
                for kind, s in spreads.items()
                if s is not None
            ],
        )
        figures.append(
            figure(
                title,
                bars(rows, ["Gini", "chance"], label=title, x_title="Gini coefficient of changed entries"),
                keys=[Key("measured", 0), Key("chance", 1)],
                note=f"0: every one of the {side} has as many changed entries; 1: all are in one.",
                numbers=numbers,
            )
        )
    return grid(figures)


def _rank_numbers(update: Update) -> str:
    rows = []
    for tensor in update.tensors:
        if tensor.rank is not None:
            rank = tensor.rank
            error = "exact" if rank.error is None else f"± {rank.error:.1f}"
            number = "-" if rank.numerical is None else f"{rank.numerical:,}"
            rows.append(
                [tensor.name, f"{rank.effective:.4g}", error, number, f"{rank.full:,}", percent(rank.share)]
            )
    return table(["tensor", "effective rank", "error", "rank", "full", "share"], rows)


def _history(history: History) -> str:
    steps = history.steps
    touched = [
        Series("touched", [(s.step, float(s.touched)) for s in steps]),
        Series("of these for the first time", [(s.step, float(s.fresh)) for s in steps]),
    ]
    jaccard = [
        Series("measured", [(s.step, s.previous.jaccard if s.previous else None) for s in steps]),
        Series(
            "chance",
            [(s.step, s.previous.jaccard_chance if s.previous else None) for s in steps],
            dashed=True,
        ),
    ]
    times = [(name, [entries / max(1, history.touched)]) for name, entries in _times(history) if entries]
    shown = [("-", "-")] + [
        tuple("-" if v is None else f"{v:.4f}" for v in (s.previous.jaccard, s.previous.jaccard_chance))
        for s in steps
        if s.previous is not None
    ]
    figures = [
        figure(
            "Entries a step touches",
            lines(touched, label="entries touched", x_title="step", y_title="entries", y_low=0),
            keys=[Key("touched", 0), Key("for the first time", 1)],
            numbers=table(
                ["step", "touched", "for the first time"],
                [[str(s.step), f"{s.touched:,}", f"{s.fresh:,}"] for s in steps],
            ),
        ),
        figure(
            "The same entries as the step before",
            lines(jaccard, label="Jaccard", x_title="step", y_title="Jaccard", y_low=0),
            keys=[Key("measured", 0), Key("chance", 1, dashed=True)],
            note="Common entries of two neighbouring steps, of all that either touches.",
            numbers=table(
                ["step", "Jaccard", "chance"],
                [[str(s.step), *pair] for s, pair in zip(steps, shown, strict=True)],
            ),
        ),
        figure(
            "How many steps touched an entry",
            bars(times, ["share"], label="times touched", x_title="of the touched entries", x_format=percent),
            note=f"{brief(float(history.touched))} entries were touched by any step.",
            numbers=table(*_times_table(history)),
        ),
    ]
    return grid(figures)


def _overlap(name: str, both: Overlap) -> str:
    if both.jaccard is None or both.jaccard_chance is None:
        return note(_overlap_line(name, both))
    rows: list[tuple[str, list[float | None]]] = [
        ("Jaccard", [both.jaccard, both.jaccard_chance]),
        ("o1", [both.common / max(1, both.first), both.common_chance / max(1, both.first)]),
        ("o2", [both.common / max(1, both.second), both.common_chance / max(1, both.second)]),
    ]
    plot = bars(rows, ["measured", "chance"], label="overlap", x_title="share", x_format=percent, width=SMALL)
    numbers = table(
        ["", "measured", "chance"],
        [[text, *("-" if v is None else percent(v) for v in values)] for text, values in rows],
    )
    return grid(
        [
            figure(
                f"Entries in common with {name}",
                plot,
                keys=[Key("measured", 0), Key("chance", 1)],
                note=_overlap_line(name, both).replace("\n", ". "),
                numbers=numbers,
            )
        ]
    )
