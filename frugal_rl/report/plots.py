"""Plots as SVG text: lines, stacked areas, bars, a heat map, spans of time. No library, no script.

A plot names its colours (`.s0` to `.s7`, `--ink`, ...) and the page defines them, so light and dark need one
drawing. Width and height are the view box's; the page scales it, so text is legible only if a plot is shown
at about its own width: SMALL goes beside others, WIDE over the whole page. Marks carry a <title>, which a
browser shows as a tooltip; numbers to read belong in a table beside the plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

SMALL, WIDE = 380, 1120  # widths, in CSS pixels at scale 1
HEIGHT = 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 24, 38
MOST_POINTS = 400  # of a line; more are averaged in bins
MOST_DOTS = 150  # with a tooltip each
COLOURS = 8
WIDEST_CELL = 32  # of a heat map

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) in the order of x, y None where there is a gap.

    `band`: (x, low, high), drawn behind. `colour`: index of the page's palette; None: by its place.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    dots: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line with words, such as a limit."""

    value: float
    name: str
    colour: int | None = None


@dataclass(frozen=True)
class Span:
    """A stretch of the x axis, from `begin` to `end`, filled up to `value`."""

    begin: float
    end: float
    value: float
    colour: int
    title: str


# --- numbers


def brief(value: float) -> str:
    """1234567 as 1.23M, 0.0000123 as 1.2e-05."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.2g}"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share: 0.0712 as 7.12 %."""
    shown = 100 * value
    return f"{shown:.1e} %" if 0 < abs(shown) < 1e-3 else f"{shown:.3g} %"


def mebibytes(value: float) -> str:
    """Bytes, as MiB or GiB."""
    if abs(value) >= 2**30:
        return f"{value / 2**30:.3g} GiB"
    return f"{value / 2**20:.3g} MiB" if abs(value) < 1000 * 2**20 else f"{value / 2**20:.0f} MiB"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def byte_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """The same, round in MiB or GiB."""
    unit = 2**30 if high >= 2**30 else 2**20
    return [unit * t for t in ticks(low / unit, high / unit, count)]


# --- the frame


@dataclass(frozen=True)
class _Frame:
    """From values to places: x and y ticks decide the range."""

    width: float
    height: float
    x_low: float
    x_high: float
    y_ticks: Sequence[float]

    def x(self, value: float) -> float:
        inner = self.width - LEFT - RIGHT
        return LEFT + inner * (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        inner = self.height - TOP - BOTTOM
        return TOP + inner * (1 - (min(max(value, low), high) - low) / (high - low))

    def axes(
        self,
        x_title: str,
        y_title: str,
        y_format: Format,
        x_ticks: Sequence[float],
        x_format: Format = brief,
    ) -> list[str]:
        out = []
        for tick in self.y_ticks:
            y = self.y(tick)
            out.append(
                f'<line class="rule" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(_text(LEFT - 6, y + 3.5, y_format(tick), anchor="end"))
        base = self.height - BOTTOM
        out.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{base}" y2="{base}"/>')
        for tick in x_ticks:
            if self.x_low <= tick <= self.x_high:
                out.append(_text(self.x(tick), base + 14, x_format(tick)))
        middle = LEFT + (self.width - LEFT - RIGHT) / 2
        out.append(_text(middle, self.height - 6, x_title, kind="name"))
        if y_title:
            out.append(_text(2, 10, y_title, kind="name", anchor="start"))
        return out


def _text(x: float, y: float, words: str, *, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """Never shown much larger than it is drawn, nor so small that its text is lost: the page then scrolls."""
    limits = f"max-width:{1.3 * width:.0f}px;min-width:{min(0.85 * width, 0.9 * WIDE):.0f}px"
    return (
        f'<svg class="plot" viewBox="0 0 {width:.0f} {height:.0f}" style="{limits}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _whole_ticks(low: float, high: float, count: int) -> list[float]:
    """Ticks of steps or counts: whole numbers."""
    return [t for t in ticks(low, high, count) if abs(t - round(t)) < 1e-9]


def _averaged(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most MOST_POINTS: the mean of each bin of neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    out: list[tuple[float, float | None]] = []
    for first in range(0, len(points), size):
        chunk = points[first : first + size]
        known = [y for _, y in chunk if y is not None]
        out.append((chunk[len(chunk) // 2][0], sum(known) / len(known) if known else None))
    return out


# --- plots


def lines(
    series: Sequence[Series],
    *,
    label: str,
    x_title: str,
    y_title: str = "",
    x_format: Format = brief,
    y_format: Format = brief,
    y_low: float | None = None,
    y_high: float | None = None,
    levels: Sequence[Level] = (),
    width: int = SMALL,
    make_ticks: Callable[[float, float, int], list[float]] = ticks,
) -> str:
    """Curves over one x axis. `label` says to those who cannot see it what it is."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if y is not None]
    ys += [y for s in series for _, low, high in s.band for y in (low, high)] + [lv.value for lv in levels]
    if not xs or not ys:
        return _empty(width, label)
    low, high = min(ys) if y_low is None else y_low, max(ys) if y_high is None else y_high
    frame = _Frame(width, HEIGHT, min(xs), max(xs), make_ticks(low, high, 5))
    wanted = 6 if width == SMALL else 11
    parts = frame.axes(x_title, y_title, y_format, _whole_ticks(min(xs), max(xs), wanted), x_format)
    for place, one in enumerate(series):
        parts += _line(frame, one, place if one.colour is None else one.colour, x_format, y_format)
    parts += [_level(frame, level, y_format) for level in levels]
    return _svg(width, HEIGHT, label, parts)


def _line(frame: _Frame, one: Series, place: int, x_format: Format, y_format: Format) -> list[str]:
    colour, out = f"s{place % COLOURS}", []
    if one.band:
        upper = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in one.band]
        lower = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(one.band)]
        out.append(f'<polygon class="band {colour}" points="{" ".join(upper + lower)}"/>')
    points = _averaged(one.points)
    piece: list[str] = []
    dash = " dashed" if one.dashed else ""
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            piece.append(f"{frame.x(x):.1f},{frame.y(y):.1f}")
        elif piece:
            out.append(f'<polyline class="line {colour}{dash}" points="{" ".join(piece)}"/>')
            piece = []
    known = [(x, y) for x, y in points if y is not None]
    if len(known) <= MOST_DOTS:
        dot = f"dot {colour}" if one.dots or len(known) == 1 else "hit"
        for x, y in known:
            tip = f"{escape(one.name)}: {y_format(y)} at {x_format(x)}"
            radius = 3.5 if dot != "hit" else 6
            out.append(
                f'<circle class="{dot}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}">'
                f"<title>{tip}</title></circle>"
            )
    return out


def _level(frame: _Frame, level: Level, y_format: Format) -> str:
    y = frame.y(level.value)
    above = y - 4 if y > TOP + 14 else y + 12
    colour = "" if level.colour is None else f" s{level.colour % COLOURS}"
    return (
        f'<line class="level{colour}" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="levelname" x="{frame.width - RIGHT}" y="{above:.1f}" text-anchor="end">'
        f"{escape(level.name)}: {y_format(level.value)}</text>"
    )


def areas(
    xs: Sequence[float], shares: Sequence[tuple[str, Sequence[float]]], *, label: str, x_title: str
) -> str:
    """Shares that add up to 1 at each x, stacked from the bottom in their order."""
    if not xs:
        return _empty(SMALL, label)
    frame = _Frame(SMALL, HEIGHT, min(xs), max(xs), ticks(0, 1, 5))
    parts, below = [], [0.0] * len(xs)
    edges = list(xs) if len(xs) > 1 else [xs[0], xs[0] + 1]
    if len(xs) == 1:
        frame = _Frame(SMALL, HEIGHT, edges[0], edges[1], ticks(0, 1, 5))
    for place, (name, values) in enumerate(shares):
        above = [b + v for b, v in zip(below, values, strict=True)]
        tops = above if len(xs) > 1 else above * 2
        bottoms = below if len(xs) > 1 else below * 2
        upper = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(edges, tops, strict=True)]
        lower = [f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(edges, bottoms, strict=True)]
        title = f"<title>{escape(name)}: {percent(values[0])} at first, {percent(values[-1])} at last</title>"
        points = " ".join(upper + lower[::-1])
        parts.append(f'<polygon class="area s{place % COLOURS}" points="{points}">{title}</polygon>')
        below = above
    axes = frame.axes(x_title, "", percent, _whole_ticks(min(xs), max(xs), 6))
    return _svg(SMALL, HEIGHT, label, [*parts, *axes])


def bars(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    names: Sequence[str],
    *,
    label: str,
    x_title: str,
    x_format: Format = brief,
    stacked: bool = False,
    width: int = SMALL,
    make_ticks: Callable[[float, float, int], list[float]] = ticks,
) -> str:
    """Horizontal bars from 0: for each row one value of each name, beside each other or `stacked`."""
    totals = [[v or 0.0 for v in values] for _, values in rows]
    most = max((sum(t) if stacked else max(t) for t in totals if t), default=0.0)
    if not most:
        return _empty(width, label)
    thick, top = 12, 8
    row_height = (thick if stacked else thick * len(names)) + 9
    left = min(width * 0.4, 12 + 6.8 * max(len(text) for text, _ in rows))
    height, inner = top + row_height * len(rows) + BOTTOM, width - left - 52
    marks = make_ticks(0, most, 4)
    parts = []
    for mark in marks:
        x = left + inner * mark / marks[-1]
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x, height - BOTTOM + 14, x_format(mark)))
    for number, (text, values) in enumerate(rows):
        y, x, end = top + row_height * number + 4, left, left
        parts.append(_text(left - 6, y + (row_height - 9) / 2 + 3.5, text, anchor="end"))
        for place, value in enumerate(values):
            length = inner * (value or 0.0) / marks[-1]
            tip = f"{escape(text)}, {escape(names[place])}: {'unknown' if value is None else x_format(value)}"
            parts.append(
                f'<rect class="bar s{place % COLOURS}" x="{x:.1f}" y="{y:.1f}" width="{length:.1f}" '
                f'height="{thick - 1}"><title>{tip}</title></rect>'
            )
            end = max(end, x + length)
            if stacked:
                x += length
            else:
                shown = "" if value is None else x_format(value)
                parts.append(_text(left + length + 4, y + thick - 2.5, shown, kind="value", anchor="start"))
                y += thick
        if stacked:
            parts.append(_text(end + 4, y + 9.5, x_format(sum(totals[number])), kind="value", anchor="start"))
    parts.append(_text(left + inner / 2, height - 6, x_title, kind="name"))
    return _svg(width, height, label, parts)


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    label: str,
    x_title: str,
    value_format: Format = percent,
    row_title: str = "",
) -> str:
    """A cell for each row and column, the deeper the larger its value; 0 is the page's own colour.

    As wide as its columns need, up to WIDE.
    """
    known = [v for row in values for v in row if v is not None]
    most = max(known, default=0.0)
    if not most:
        return _empty(SMALL, label)
    left, cell = 12 + 6.2 * max(len(text) for text in [*rows, row_title]), 18 if len(rows) <= 24 else 12
    width = min(WIDE, max(SMALL, left + WIDEST_CELL * len(columns) + RIGHT))
    each = min(WIDEST_CELL, (width - left - RIGHT) / len(columns))
    inner, top = each * len(columns), 20
    height = top + cell * len(rows) + BOTTOM + 26
    gap = 1.0 if each > 4 else 0.0
    parts = []
    for r, (text, row) in enumerate(zip(rows, values, strict=True)):
        y = top + cell * r
        parts.append(_text(left - 6, y + cell / 2 + 3.5, text, anchor="end"))
        for c, value in enumerate(row):
            box = f'x="{left + each * c:.2f}" y="{y}" width="{each - gap:.2f}" height="{cell - 1}"'
            if value is None:
                parts.append(f'<rect class="nothing" {box}/>')
                continue
            tip = f"{escape(text)}, {escape(columns[c])}: {value_format(value)}"
            parts.append(
                f'<rect class="cell" {box} fill-opacity="{value / most:.3f}"><title>{tip}</title></rect>'
            )
    base = top + cell * len(rows)
    every = max(1, math.ceil(max(6.5 * max(map(len, columns)) + 6, 20) / each))
    for c in range(0, len(columns), every):
        parts.append(_text(left + each * (c + 0.5), base + 14, columns[c]))
    parts.append(_text(left + inner / 2, base + 30, x_title, kind="name"))
    parts.append(_text(2, 11, row_title, kind="name", anchor="start"))
    parts += _scale(left, base + 40, most, value_format)
    return _svg(width, height, label, parts)


def _scale(x: float, y: float, most: float, value_format: Format) -> list[str]:
    """What the depth of a heat map's cells means."""
    steps = 10
    out = [f'<text class="tick" x="{x:.1f}" y="{y + 9}">0</text>']
    for n in range(1, steps + 1):
        out.append(
            f'<rect class="cell" x="{x + 8 + 12 * (n - 1):.1f}" y="{y}" width="12" height="11" '
            f'fill-opacity="{n / steps}"/>'
        )
    out.append(_text(x + 14 + 12 * steps, y + 9, value_format(most), anchor="start"))
    return out


def spans(
    parts_of_time: Sequence[Span],
    *,
    label: str,
    x_title: str,
    y_format: Format,
    levels: Sequence[Level] = (),
    width: int = WIDE,
    make_ticks: Callable[[float, float, int], list[float]] = ticks,
) -> str:
    """Stretches of the x axis, each filled from 0 up to its value in its colour."""
    if not parts_of_time:
        return _empty(width, label)
    high = max(*(s.value for s in parts_of_time), *(lv.value for lv in levels), 0.0)
    frame = _Frame(width, HEIGHT, parts_of_time[0].begin, parts_of_time[-1].end, make_ticks(0, high, 5))
    parts = frame.axes(x_title, "", y_format, ticks(frame.x_low, frame.x_high, 11))
    for span in parts_of_time:
        x, y = frame.x(span.begin), frame.y(span.value)
        parts.append(
            f'<rect class="bar s{span.colour % COLOURS}" x="{x:.2f}" y="{y:.1f}" '
            f'width="{max(0.3, frame.x(span.end) - x):.2f}" height="{HEIGHT - BOTTOM - y:.1f}">'
            f"<title>{escape(span.title)}</title></rect>"
        )
    parts += [_level(frame, level, y_format) for level in levels]
    return _svg(width, HEIGHT, label, parts)


def _empty(width: float, label: str) -> str:
    words = f'<text class="tick" x="{width / 2:.0f}" y="34" text-anchor="middle">nothing to show yet</text>'
    return _svg(width, 60, f"{label}: nothing to show yet", [words])
