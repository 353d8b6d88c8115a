"""`frugal-rl compare`: the same recipe with different learners, measured side by side."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .cli_patch import print_result
from .errors import FrugalError


@click.command()
@click.argument("recipe", default="tiny")
@click.option("--arms", default="sgd,adamw,lora:1,lora:16", help="[sgd,adamw,lora:1,lora:16]")
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs at the best learning rate [3].")
@click.option("--lr-grid", "grids", multiple=True, metavar="ARM=LR,LR,...", help="Rates to try; repeatable.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key for all arms.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder [runs/compare-RECIPE].")
@click.option("--json", "as_json", is_flag=True, help="Print compare.json instead of the table.")
def compare(
    recipe: str,
    arms: str,
    seeds: int,
    grids: tuple[str, ...],
    overrides: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    """Train RECIPE with each of several learners, and say what differs by more than noise.

    ARMS: sgd, sgd-int8, sgd-host, sgd-momentum[:M], adamw, adamw8bit, lora[:RANK], lora-int8[:RANK]; the
    first is what the others are compared with. Each arm gets the same number of runs: its grid of learning
    rates on one seed, then the best on the other seeds. Run the command again to go on after Ctrl-C.
    Writes compare.json, compare.md, compare.html and compare.svg.
    """
    from . import compare as comparing
    from .compare_table import markdown, text
    from .patch import write_atomically
    from .report.comparison import as_drawing, as_page

    folder = output or Path("runs") / f"compare-{Path(recipe).stem}"
    named = [part for part in arms.split(",") if part.strip()]
    study = comparing.make_study(recipe, overrides, named, grids, seeds, folder, _hidden)

    def say(line: str) -> None:
        click.echo(line, err=True)

    failed: dict[str, str] = {}
    interrupted = False
    try:
        with _stoppable():
            comparing.run_all(study, say, failed)
    except KeyboardInterrupt:
        interrupted = True
    found = comparing.results(study, failed)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "compare.json", (json.dumps(found, indent=1) + "\n").encode())
    command = _command(recipe, arms, seeds, grids, overrides, output)
    write_atomically(folder / "compare.md", markdown(found, command).encode())
    write_atomically(folder / "compare.html", as_page(found, shlex.join(command)).encode())
    write_atomically(folder / "compare.svg", as_drawing(found).encode())
    say(", ".join(str(folder / f"compare.{kind}") for kind in ("json", "md", "html", "svg")))
    print_result(found, as_json, lambda: text(found))
    if interrupted:
        say("stopped; the same command goes on")
        sys.exit(130)
    if failed:
        raise FrugalError(
            f"{len(failed)} runs failed: {', '.join(failed)}; the same command tries them again"
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM are a KeyboardInterrupt here and in the runs, also where the shell ignores them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _hidden(name: str) -> int:
    """A model's width, from its config alone."""
    from .models import find_model

    return int(find_model(name).config["hidden_size"])


def _command(
    recipe: str,
    arms: str,
    seeds: int,
    grids: tuple[str, ...],
    overrides: tuple[str, ...],
    output: Path | None,
) -> list[str]:
    options: list[Any] = ["frugal-rl", "compare", recipe, "--arms", arms, "--seeds", str(seeds)]
    for grid in grids:
        options += ["--lr-grid", grid]
    for override in overrides:
        options += ["--set", override]
    return [*options, "-o", str(output)] if output else options
