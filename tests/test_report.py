"""Plots and pages, and the report of a run: finished, unfinished, damaged, of an earlier version."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from frugal_rl.patch import Patch
from frugal_rl.report import page, plots
from frugal_rl.report.run import as_page, read_run

from .test_cli import SMALL, refused, run
from .test_cli_analyse import Page


def numbers(svg: str, tag: str, name: str) -> list[float]:
    return [float(e.attrib[name]) for e in ElementTree.fromstring(svg).iter(tag) if name in e.attrib]


# --- plots


@pytest.mark.parametrize("low, high", [(0, 1), (0.43, 0.98), (0, 0), (-3e-6, 4e-6), (1, 30), (0, 987654321)])
def test_ticks_are_round_and_cover_the_range(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high * (1 - 1e-9)
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (1234567, "1.23M"), (0.25, "0.25"), (-2e-6, "-2e-06"), (30, "30"), (15000, "15k")],
)
def test_numbers_are_brief(value: float, shown: str) -> None:
    assert plots.brief(value) == shown
    assert plots.percent(0.0712) == "7.12 %"
    assert plots.mebibytes(300 * 2**20) == "300 MiB"
    assert plots.mebibytes(1000 * 2**20) == "1000 MiB"


def test_a_drawing_has_its_plots_beside_and_below_each_other_and_none_overlap() -> None:
    plot = plots.lines([plots.Series("a", [(0, 0.0), (9, 1.0)])], label="x", x_title="step")
    tall = plots.bars([(f"r{n}", [1.0]) for n in range(20)], ["a"], label="x", x_title="bytes")
    keys = [page.Key(f"a long name <{n}>", n) for n in range(6)]
    made = page.drawing([page.Panel(f"p{n}", p, keys) for n, p in enumerate((plot, tall, plot))])
    drawn, space = ElementTree.fromstring(made), "{http://www.w3.org/2000/svg}"
    boxes = []
    for panel in drawn.findall(f"{space}g"):
        x, y = map(float, re.findall(r"[0-9.]+", panel.attrib["transform"]))
        inner = panel.find(f"{space}svg")
        assert inner is not None
        low = y + float(inner.attrib["y"])
        assert [e.text for e in panel.iter(f"{space}text")].count("a long name <5>") == 1
        boxes.append((x, y, x + float(inner.attrib["width"]), low + float(inner.attrib["height"])))
        legend = [float(e.attrib["y"]) for e in panel.findall(f"{space}g/{space}rect")]
        assert 26 + max(legend) + 10 < float(inner.attrib["y"])  # above its plot
    assert boxes[0][1] == boxes[1][1] and boxes[0][2] <= boxes[1][0]
    assert boxes[2][0] == boxes[0][0] and boxes[2][1] >= max(boxes[0][3], boxes[1][3])
    assert float(drawn.attrib["height"]) >= boxes[2][3] and float(drawn.attrib["width"]) >= boxes[1][2]
    for colours in (page.LIGHT, page.DARK):
        assert colours[0] in made


def test_ticks_of_both_axes_are_written_as_asked_for() -> None:
    svg = plots.lines(
        [plots.Series("a", [(6, 1.0), (9, 2.0)])],
        label="x",
        x_title="parameters",
        x_format=lambda x: plots.brief(10**x),
        y_format=lambda y: f"{y:g} points",
    )
    words = [e.text for e in ElementTree.fromstring(svg).iter("text")]
    assert {"1M", "10M", "100M", "1G", "1 points", "2 points"} <= set(words)
    assert "a: 2 points at 1G" in svg


def test_a_lines_points_stand_where_the_axes_say() -> None:
    svg = plots.lines(
        [plots.Series("a", [(0, 0.0), (5, 1.0), (10, 0.5)])], label="x", x_title="step", y_low=0
    )
    drawn = ElementTree.fromstring(svg).find(".//polyline[@class='line s0']")
    assert drawn is not None
    places = [tuple(map(float, p.split(","))) for p in drawn.attrib["points"].split()]
    left, right = plots.LEFT, plots.SMALL - plots.RIGHT
    top, bottom = plots.TOP, plots.HEIGHT - plots.BOTTOM
    assert places[0] == (left, bottom)
    assert places[1] == pytest.approx(((left + right) / 2, top), abs=0.1)
    assert places[2] == pytest.approx((right, (top + bottom) / 2), abs=0.1)


def test_a_gap_is_not_drawn_over() -> None:
    svg = plots.lines(
        [plots.Series("a", [(0, 0.0), (1, 1.0), (2, None), (3, 1.0), (4, 0.0)])], label="x", x_title="step"
    )
    assert svg.count("<polyline") == 2


def test_many_points_are_averaged_not_dropped() -> None:
    series = plots.Series("a", [(float(n), float(n % 2)) for n in range(10_000)])
    svg = plots.lines([series], label="x", x_title="step", y_low=0, y_high=1)
    drawn = ElementTree.fromstring(svg).find(".//polyline")
    assert drawn is not None
    points = drawn.attrib["points"].split()
    assert len(points) <= plots.MOST_POINTS
    middle = (plots.TOP + plots.HEIGHT - plots.BOTTOM) / 2
    assert all(abs(float(p.split(",")[1]) - middle) < 10 for p in points)  # means of 25 are 0.5 +- 0.02


def test_a_bars_length_is_its_value() -> None:
    rows: list[tuple[str, list[float | None]]] = [("a", [2.0, 1.0]), ("b", [4.0, None])]
    for stacked in (False, True):
        svg = plots.bars(rows, ["x", "y"], label="bars", x_title="n", stacked=stacked)
        widths = numbers(svg, "rect", "width")
        assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
        assert widths[2] == pytest.approx(2 * widths[0], abs=0.2)
        assert widths[3] == 0
    starts = numbers(svg, "rect", "x")
    assert starts[1] == pytest.approx(starts[0] + widths[0], abs=0.2)


def test_areas_of_shares_fill_the_plot() -> None:
    shares = [("a", [0.25, 0.5]), ("b", [0.75, 0.5])]
    svg = plots.areas([1, 2], shares, label="x", x_title="step")
    areas = ElementTree.fromstring(svg).findall(".//polygon")
    last = [tuple(map(float, p.split(","))) for p in areas[-1].attrib["points"].split()]
    assert [y for _, y in last[:2]] == [plots.TOP, plots.TOP]
    assert "at last" in svg and "nothing to show" in plots.areas([], [], label="x", x_title="step")


def test_a_heat_maps_depth_is_its_value_and_the_unknown_is_marked() -> None:
    svg = plots.heat(["a", "b"], ["1", "2"], [[0.5, 1.0], [None, 0.0]], label="x", x_title="step")
    depths = [e.attrib.get("fill-opacity") for e in ElementTree.fromstring(svg).iter("rect")][:4]
    assert depths == ["0.500", "1.000", None, "0.000"]
    assert svg.count('class="nothing"') == 1


def test_spans_are_as_high_as_their_values_under_their_levels() -> None:
    parts = [plots.Span(0, 1, 100.0, 0, "a"), plots.Span(1, 3, 50.0, 1, "b")]
    svg = plots.spans(
        parts, label="x", x_title="s", y_format=plots.brief, levels=[plots.Level(200.0, "limit")]
    )
    heights, widths = numbers(svg, "rect", "height"), numbers(svg, "rect", "width")
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.1)
    assert "limit: 200" in svg


def test_every_plot_says_what_it_is_and_what_is_empty_says_so() -> None:
    empty = [
        plots.lines([], label="nothing <1>", x_title="x"),
        plots.bars([("a", [0.0])], ["n"], label="nothing <1>", x_title="x"),
        plots.heat(["a"], ["b"], [[None]], label="nothing <1>", x_title="x"),
        plots.spans([], label="nothing <1>", x_title="x", y_format=plots.brief),
    ]
    for svg in empty:
        root = ElementTree.fromstring(svg)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"].startswith("nothing <1>")
        assert "nothing to show yet" in svg


def test_light_and_dark_have_the_same_colours_by_name() -> None:
    text = page.page("t", "l", "", [])
    light, dark = text.split("prefers-color-scheme: dark", 1)
    names = [set(re.findall(r"(--\w+): #", part)) for part in (light, dark)]
    assert names[1] <= names[0] and len(names[1]) >= plots.COLOURS + 5
    assert len(page.LIGHT) == len(page.DARK) == plots.COLOURS


def linear(colour: str) -> np.ndarray:
    """sRGB as light."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    """Ottosson, 2020."""
    to_cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    to_lab = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ np.clip(light, 0, 1))


BLIND = {  # Machado, Oliveira, Fernandes 2009, severity 1
    "none": np.eye(3),
    "protan": [[0.15229, 1.05258, -0.20487], [0.11450, 0.78628, 0.09922], [-0.00388, -0.04812, 1.05200]],
    "deutan": [[0.36732, 0.86065, -0.22797], [0.28009, 0.67250, 0.04741], [-0.01182, 0.04294, 0.96888]],
    "tritan": [[1.25553, -0.07675, -0.17878], [-0.07841, 0.93081, 0.14760], [0.00473, 0.69137, 0.30390]],
}


@pytest.mark.parametrize("palette, ground", [(page.LIGHT, "#ffffff"), (page.DARK, "#1e1e1c")])
def test_colours_stand_out_and_apart_for_every_eye(palette: tuple[str, ...], ground: str) -> None:
    """Contrast 3: WCAG 2.2, 1.4.11. Distance 0.1 in OKLab: five just noticeable differences of 0.02."""
    luminance = [0.05 + linear(c) @ [0.2126, 0.7152, 0.0722] for c in (*palette, ground)]
    assert all(max(x, luminance[-1]) / min(x, luminance[-1]) >= 3 for x in luminance[:-1])
    for sight in BLIND.values():
        seen = [oklab(np.array(sight) @ linear(c)) for c in palette]
        pairs = {(i, i + 1) for i in range(7)} | {(i, j) for j in range(5) for i in range(j)}
        assert min(np.linalg.norm(seen[i] - seen[j]) for i, j in pairs) >= 0.1


def test_what_comes_from_outside_is_escaped() -> None:
    bad = "<script>alert(1)</script>\"'&"
    parts = [
        page.tiles([(bad, bad, bad)]),
        page.table([bad], [[bad]]),
        page.figure(bad, plots.lines([plots.Series(bad, [(1, 1.0)])], label=bad, x_title=bad, y_title=bad)),
        page.figure("f", plots.bars([(bad, [1.0])], [bad], label=bad, x_title=bad), keys=[page.Key(bad, 0)]),
        page.figure("f", plots.heat([bad], [bad], [[1.0]], label=bad, x_title=bad, row_title=bad), note=bad),
        page.note(bad) + page.code(bad) + page.folded(bad, ""),
    ]
    text = page.page(bad, bad, "", [page.Section(bad, part) for part in parts])
    assert "<script" not in text
    Page(text)


# --- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps in `run`, evaluated after two."""
    folder = tmp_path_factory.mktemp("report")
    run("train", "-o", "run", *SMALL, "--set", "train.eval_every=2", cwd=folder)
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def test_the_report_has_what_the_run_did_in_one_file(trained: Path) -> None:
    done = run("report", "run", cwd=trained)
    assert "report.html" in done.stderr and done.stdout == ""
    run("report", "run", cwd=trained)  # its own file is written anew
    text = (trained / "run" / "report.html").read_text()
    tags = Page(text).tags
    assert tags.count("svg") >= 14
    assert not re.search(r"https?://|@import|url\(", text)
    summary = json.loads((trained / "run" / "summary.json").read_text())
    sample = json.loads((trained / "run" / "samples.jsonl").read_text().splitlines()[-1])
    for shown in (
        f"{summary['patch_bytes']:,} bytes",
        f"{summary['changed_any']:,}",
        "planned, learning",
        "frugal-rl train --recipe run/recipe.toml -o again",
        "source = &quot;last-digit&quot;",
        sample["response"].splitlines()[0],
        "transformers",
    ):
        assert shown in text, shown
    assert "Unfinished" not in text


def test_numbers_on_the_page_are_those_of_the_journal(copy: Path) -> None:
    found = read_run(copy)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert found.rows == rows
    assert [sum(step.values()) for step in found.entries] == [row["changed_step"] for row in rows]
    assert [v["step"] for v in found.validations] == [0, 2, 3]
    assert found.summary is not None and found.notes == []


def test_an_unfinished_run_has_a_report(copy: Path) -> None:
    (copy / "summary.json").unlink()
    (copy / "patch.safetensors").unlink()
    (copy / "journal" / "00000003.safetensors").unlink()
    with open(copy / "validation.jsonl", "a") as file:
        file.write('{"step": 4, "acc')
    text = as_page(read_run(copy))
    assert "Unfinished: 2 of 3 steps" in text
    assert "eval --patch" not in text and "--resume" in text
    Page(text)


def test_a_run_before_its_first_step_has_a_report(copy: Path) -> None:
    for file in [*(copy / "journal").iterdir(), copy / "summary.json", copy / "session.json"]:
        file.unlink()
    (copy / "validation.jsonl").unlink()
    text = as_page(read_run(copy))
    assert "Unfinished: 0 of 3 steps" in text
    Page(text)


@pytest.mark.parametrize("left", [0, 60, -40])
def test_a_damaged_step_ends_the_report_before_it_and_is_left_alone(copy: Path, left: int) -> None:
    path = copy / "journal" / "00000002.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    found = read_run(copy)
    assert found.step == 1
    assert "steps from 2 on are left out" in found.notes[0]
    assert "steps from 2 on are left out" in as_page(found)
    assert path.exists()


def test_a_summary_of_an_earlier_session_is_not_shown(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "steps": 2}))
    assert read_run(copy).summary is None


def test_a_run_of_a_version_without_peaks_and_samples_has_a_report(copy: Path) -> None:
    new = ("phase_peak_bytes", "reward_std", "ended_tokens", "shortest_tokens")
    for path in (copy / "journal").glob("*.safetensors"):
        step = Patch.load(path)
        metrics = {k: v for k, v in step.meta["metrics"].items() if k not in new}
        meta = {"step": step.meta["step"], "metrics": metrics}
        Patch(step.tensors, step.base, meta).save(path)
    (copy / "session.json").unlink()
    text = as_page(read_run(copy))
    assert "peaks of single phases are not known" in text
    assert "kept no responses" in text and "plan unknown" in text
    Page(text)


def test_a_long_run_is_thinned(copy: Path) -> None:
    found = read_run(copy)
    rows = [{**found.rows[n % 3], "step": n + 1} for n in range(1000)]
    long = type(found)(**{**found.__dict__, "rows": rows, "entries": found.entries * 334})
    long.entries.pop()
    long.entries.pop()
    text = as_page(long)
    Page(text)
    assert "Every 9th step; all are in metrics.jsonl" in text
    assert "mean of 10 steps" in text
    assert len(text) < 2_000_000


def test_what_has_no_report_is_refused(trained: Path, tmp_path: Path) -> None:
    assert "recipe.toml" in refused("report", tmp_path, cwd=tmp_path)
    (tmp_path / "page.html").write_text("mine")
    assert "exists" in refused("report", "run", "-o", tmp_path / "page.html", cwd=trained)
    assert "no such folder" in refused("report", "run", "-o", "no/page.html", cwd=trained)
    run("report", "run", "-o", tmp_path / "page.html", "--force", cwd=trained)
    assert (tmp_path / "page.html").read_text() != "mine"
