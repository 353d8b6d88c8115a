"""`frugal-rl analyse` as a person uses it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from frugal_rl import checkpoint

from .test_cli import SMALL, refused, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps in `run`."""
    folder = tmp_path_factory.mktemp("analyse")
    run("train", "-o", "run", *SMALL, cwd=folder)
    return folder


class Page(HTMLParser):
    """Every tag is closed, and nothing is fetched from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert (value or "").startswith("#"), (tag, value)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_run_is_analysed_with_its_steps(trained: Path) -> None:
    summary = json.loads((trained / "run" / "summary.json").read_text())
    found = json.loads(run("analyse", "run", "--json", cwd=trained).stdout)
    assert (found["entries"], found["changed_any"], found["changed_1e5"]) == (
        summary["parameters"],
        summary["changed_any"],
        summary["changed_1e5"],
    )
    assert sum(row["entries"] for row in found["ulps"]) == summary["changed_any"]
    rows = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["touched"] for s in found["steps"]["each"]] == [row["changed_step"] for row in rows]
    assert sum(found["steps"]["times"]) == found["steps"]["touched"] >= summary["changed_any"]
    text = run("analyse", "run", cwd=trained).stdout
    for word in (f"{summary['changed_any']:,} of", "v_proj", "Gini (chance)", "Jaccard", "ULPs"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 150


def test_a_patch_and_two_checkpoints_tell_the_same_as_the_run(trained: Path, tiny_folder: Path) -> None:
    if not (trained / "after").exists():
        checkpoint.apply(tiny_folder, trained / "run" / "patch.safetensors", trained / "after")
    of_run = json.loads(run("analyse", "run", "--json", cwd=trained).stdout)
    of_patch = json.loads(run("analyse", "run/patch.safetensors", "--json", cwd=trained).stdout)
    of_both = json.loads(run("analyse", "tiny", "after", "--json", cwd=trained).stdout)
    same = ("entries", "changed_any", "changed_1e5", "kinds", "layers", "ulps", "tensors")
    assert [of_run[k] for k in same] == [of_patch[k] for k in same] == [of_both[k] for k in same]
    assert of_patch["steps"] is None and of_both["base"] == "tiny"


def test_an_update_overlaps_with_itself_wholly(trained: Path) -> None:
    both = ("analyse", "run", "--with", "run/patch.safetensors", "--no-rank")
    found = json.loads(run(*both, "--json", cwd=trained).stdout)["overlap"]
    assert (found["jaccard"], found["o1"], found["o2"]) == (1, 1, 1)
    assert found["same_way"] == found["common"] > found["common_chance"]
    assert "Jaccard 1.000, chance 0.0" in run(*both, cwd=trained).stdout


def test_the_page_is_one_file_with_plots_and_tables(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run("analyse", "run", "--with", "run", "--html", page, cwd=trained)
    text = page.read_text()
    tags = Page(text).tags
    assert tags.count("svg") >= 9
    assert tags.count("table") >= tags.count("svg")  # every plot's numbers stand beside it
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "exists" in refused("analyse", "run", "--html", page, cwd=trained)
    run("analyse", "run", "--html", page, "--force", cwd=trained)


def test_names_from_outside_cannot_write_html(trained: Path) -> None:
    name = "<b>run"
    shutil.copytree(trained / "run", trained / name)
    run("analyse", name, "--no-rank", "--html", "escaped.html", cwd=trained)
    text = (trained / "escaped.html").read_text()
    assert "&lt;b&gt;run" in text and name not in text
    Page(text)


def test_an_int8_run_is_analysed_on_its_checkpoint(tmp_path: Path) -> None:
    run("train", "-o", "run", *SMALL, "--set", "model.weights=int8", cwd=tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = json.loads(run("analyse", "run", "--no-rank", "--json", cwd=tmp_path).stdout)
    assert found["changed_any"] == summary["changed_any"] - summary["export_lost"]


def test_what_cannot_be_analysed_is_refused(trained: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert "no such run" in refused("analyse", "nothing", cwd=tmp_path)
    assert "BASE TRAINED" in refused("analyse", tiny_folder, cwd=tmp_path)
    assert "--with run2" in refused("analyse", "run", "run2", cwd=trained)
    assert "cannot be written" in refused("report", "run", "-o", "/proc/page.html", cwd=trained)
    assert "--base is for a patch" in refused("analyse", "run", "--base", "tiny", cwd=trained)
    assert "is a folder" in refused("analyse", "run", "--html", ".", cwd=trained)
    assert "no such folder" in refused("analyse", "run", "--html", "no/page.html", cwd=trained)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    refused("analyse", tmp_path / "bad.safetensors", cwd=tmp_path)
    (tmp_path / "run" / "journal").mkdir(parents=True)
    shutil.copy(trained / "run" / "recipe.toml", tmp_path / "run")
    assert "no steps yet" in refused("analyse", "run", cwd=tmp_path)


def test_a_torn_last_step_is_left_out_and_left_alone(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    last = tmp_path / "run" / "journal" / "00000003.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    done = run("analyse", "run", "--no-rank", "--json", cwd=tmp_path)
    assert len(json.loads(done.stdout)["steps"]["each"]) == 2
    assert "left out" in done.stderr and last.exists()
