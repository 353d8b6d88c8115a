"""One self-contained HTML page: no network, no script, light and dark by the reader's own setting.

    page(title, lead, [section(...), ...]);   a section holds tiles, figures and tables, made here

What is said in colour is said in words too: a figure has a legend and, folded away, its numbers as a table.
Every text that comes from outside is escaped by what takes it; functions that return HTML say so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .plots import SMALL

# contrast to the ground at least 3; neighbours, and any two of the first five, are told apart with each kind
# of colour-blindness too (a test holds both)
LIGHT = ("#2a6fc9", "#9f532a", "#03a786", "#bb8008", "#840c5f", "#7e64cc", "#475303", "#918c86")
DARK = ("#5b9df0", "#c74000", "#14dbc4", "#eaa21b", "#b86f8f", "#cdabfc", "#697f06", "#a9a49f")

ROOT_CSS = """
:root { color-scheme: light dark; --ground: #f6f5f2; --card: #ffffff; --ink: #1c1b19; --soft: #5f5e5a;
  --line: #e1dfd9; --axis: #9b9993; --mark: #fff3d6; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ground: #141413; --card: #1e1e1c; --ink: #f0efec;
  --soft: #b1afa8; --line: #353532; --axis: #77756f; --mark: #45381a; DARK } }
"""

PLOT_CSS = """
svg text { font-family: inherit; fill: var(--soft); font-size: 11px; }
svg .name { fill: var(--soft); }
svg .value { fill: var(--ink); font-size: 10px; }
svg .levelname { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--axis); stroke-width: 1; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 5 4; }
svg .level { stroke: var(--c, var(--ink)); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .band { fill: var(--c); opacity: .16; }
svg .area { fill: var(--c); stroke: var(--card); stroke-width: 1; }
svg .bar { fill: var(--c); }
svg .dot { fill: var(--c); stroke: var(--card); stroke-width: 1; }
svg .hit { fill: transparent; }
svg .cell { fill: var(--c0); }
svg .nothing { fill: var(--line); }
SERIES
"""

PAGE_CSS = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 24px 16px 56px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 10px; }
h3 { font-size: .95rem; margin: 0 0 2px; font-weight: 600; }
p { margin: 0 0 10px; max-width: 75ch; }
.lead, .note, figcaption, dt { color: var(--soft); }
.note, figcaption { font-size: .84rem; }
nav { margin: 12px 0 0; font-size: .9rem; }
nav a { margin-right: 14px; }
a { color: var(--c0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px;
  margin: 18px 0 0; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 10px 12px; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
.tile span { font-size: .82rem; color: var(--soft); display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px;
  align-items: start; }
figure { margin: 0; padding: 10px 12px 8px; min-width: 0; }
figure.whole { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
svg.plot { display: block; width: 100%; height: auto; margin: 4px 0 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 4px 0 0; padding: 0;
  font-size: .82rem; color: var(--soft); }
.legend i { display: inline-block; width: 12px; height: 10px; border-radius: 2px; margin-right: 5px;
  background: var(--c); }
.legend i.dash { height: 0; border-top: 2px dashed var(--c); background: none; border-radius: 0;
  vertical-align: middle; }
details { margin-top: 6px; font-size: .84rem; }
summary { cursor: pointer; color: var(--soft); }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; margin: 4px 0; }
th, td { text-align: right; padding: 3px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
thead th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.card { padding: 10px 12px 2px; min-width: 0; }
pre { margin: 0; padding: 10px 12px; overflow-x: auto; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo,
  Consolas, monospace; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.prompt { color: var(--soft); }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; border: 0; padding: 4px 0; background: none; }
.badge { display: inline-block; font-size: .78rem; padding: 0 7px; border-radius: 9px;
  border: 1px solid var(--c, var(--axis)); }
.good { --c: var(--c2); } .bad { --c: var(--c1); }
"""

DRAWING_CSS = """
svg { overflow: visible; font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  sans-serif; }
svg .ground { fill: var(--card); }
svg .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
"""


def _style(css: str) -> str:
    def names(palette: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(palette))

    series = "\n".join(f".s{i} {{ --c: var(--c{i}); }}" for i in range(len(LIGHT)))
    return css.replace("LIGHT", names(LIGHT)).replace("DARK", names(DARK)).replace("SERIES", series)


@dataclass(frozen=True)
class Section:
    """`body` is HTML."""

    title: str
    body: str

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


@dataclass(frozen=True)
class Key:
    """A legend's entry."""

    name: str
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Of a drawing: a plot (SVG) of SMALL width with its title and legend."""

    title: str
    plot: str
    keys: Sequence[Key]


def page(title: str, lead: str, head: str, sections: Sequence[Section]) -> str:
    """The whole file. `head`: HTML above the sections, such as tiles."""
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>{s.body}</section>' for s in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style(ROOT_CSS + PLOT_CSS + PAGE_CSS)}</style></head>\n"
        f'<body><main><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{head}'
        f'<nav aria-label="sections">{links}</nav></header>\n{body}</main></body></html>\n'
    )


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """HTML: the numbers to see first; (name, value, what it is out of)."""

    def words(text: str) -> str:
        return escape(text).replace(" %", "&nbsp;%").replace("e-", "e&#8209;")  # not broken over lines

    boxes = "".join(
        f'<div class="tile"><span>{words(name)}</span><b>{words(value)}</b><span>{words(note)}</span></div>'
        for name, value, note in values
    )
    return f'<div class="tiles">{boxes}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML: words left in the first column, numbers right in the others."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(
    title: str,
    plot: str,
    *,
    keys: Sequence[Key] = (),
    note: str = "",
    numbers: str = "",
    whole: bool = False,
) -> str:
    """HTML: a plot (SVG) with its title, legend and a line on how to read it; `numbers`: a table's HTML.

    `whole`: over the whole page, where others stand beside each other.
    """
    legend = "".join(
        f'<li class="s{k.colour}"><i{" class=dash" if k.dashed else ""}></i>{escape(k.name)}</li>'
        for k in keys
    )
    legend = f'<ul class="legend">{legend}</ul>' if keys else ""
    more = f"<details><summary>numbers</summary>{numbers}</details>" if numbers else ""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return (
        f"<figure{' class=whole' if whole else ''}><h3>{escape(title)}</h3>{legend}"
        f'<div class="scroll">{plot}</div>{caption}{more}</figure>'
    )


def grid(figures: Sequence[str]) -> str:
    """HTML: figures beside each other, as many as there is room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def note(text: str) -> str:
    """HTML: a line for the reader."""
    return f'<p class="note">{escape(text)}</p>'


def code(text: str) -> str:
    """HTML: commands or a file, as they stand."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, body: str) -> str:
    """HTML that is shown when asked for; `body` is HTML."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def drawing(panels: Sequence[Panel], columns: int = 2) -> str:
    """An SVG file of several plots, light and dark, for where a page cannot be shown."""
    gap, line, letter, width, head = 16, 16, 6.8, SMALL, 26
    parts, tops = [], [float(gap)]
    for first in range(0, len(panels), columns):
        row, top = panels[first : first + columns], tops[-1]
        legends = [_legend(panel.keys, width, line, letter) for panel in row]
        keys = max(height for _, height in legends)
        heights = [_height(panel.plot) for panel in row]
        for place, (panel, (legend, _), height) in enumerate(zip(row, legends, heights, strict=True)):
            x = gap + place * (width + gap)
            parts.append(
                f'<g transform="translate({x} {top:.0f})">'
                f'<text class="title" y="14">{escape(panel.title)}</text>'
                f'<g transform="translate(0 {head})">{legend}</g>'
                f'<svg y="{head + keys}" width="{width}" height="{height}">{panel.plot}</svg></g>'
            )
        tops.append(top + head + keys + max(heights) + gap)
    whole = gap + columns * (width + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {tops[-1]:.0f}" width="{whole}" '
        f'height="{tops[-1]:.0f}"><style>{_style(ROOT_CSS + PLOT_CSS)}{DRAWING_CSS}</style>'
        f'<rect class="ground" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _height(plot: str) -> float:
    found = re.search(r'viewBox="0 0 \S+ (\S+)"', plot)
    assert found is not None, "a plot of plots.py has a view box"
    return float(found[1])


def _legend(keys: Sequence[Key], width: int, line: int, letter: float) -> tuple[str, int]:
    """SVG: entries beside each other, in new lines where a letter's width says so; and its height."""
    x, y, parts = 0.0, 0, []
    for key in keys:
        long = 17 + letter * len(key.name) + 14
        if x and x + long > width:
            x, y = 0.0, y + line
        parts.append(
            f'<rect class="bar s{key.colour}" x="{x:.0f}" y="{y}" width="12" height="10" rx="2"/>'
            f'<text x="{x + 17:.0f}" y="{y + 9}">{escape(key.name)}</text>'
        )
        x += long
    return "".join(parts), y + line if keys else 0
