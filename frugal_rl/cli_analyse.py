"""`frugal-rl analyse` and `frugal-rl report`: what an update did to the weights, what a run did."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .cli_patch import print_result
from .errors import InputError

if TYPE_CHECKING:
    from .analysis import History, Overlap
    from .checkpoint import Checkpoint
    from .patch import Patch


@click.command()
@click.argument("target", metavar="RUN|PATCH|BASE")
@click.argument("trained", required=False, type=click.Path(path_type=Path))
@click.option("--base", metavar="NAME", help="The base of PATCH [the one it names].")
@click.option("--with", "other", metavar="RUN|PATCH", help="Compare with another update of the same base.")
@click.option("--rank/--no-rank", default=True, help="Effective rank; most of the time it takes [--rank].")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with plots too.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def analyse(
    target: str,
    trained: Path | None,
    base: str | None,
    other: str | None,
    rank: bool,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure an update: how many entries changed, where, how far, in how many directions.

    Give a run, a patch, or two checkpoints: BASE TRAINED. A run tells its steps too: how many touched an
    entry, and whether neighbouring steps touch the same ones. Chance stands beside what has one.
    """
    from . import analysis
    from .checkpoint import HEAD, Checkpoint
    from .models import find_model
    from .report import update as view

    if html is not None:
        check_output(html, force)
    patch, base_name, history = _load(target, trained, base)
    files = find_model(base_name)
    checkpoint = Checkpoint(files.folder)
    copies = frozenset({HEAD} if files.config.get("tie_word_embeddings") else ())
    title = target if trained is None else str(trained)
    compared = None if other is None else (other, _overlap(patch, other, checkpoint))
    update = analysis.analyse(checkpoint, patch, ranks=rank, leave_out=copies)
    study = view.Study(title, base_name, update, history, compared)
    if html is not None:
        words = ["frugal-rl analyse", target, *([str(trained)] if trained else [])]
        words += ["--base", base] if base else []
        words += ["--with", other] if other else []
        write_page(html, view.as_page(study, " ".join(words)))
    print_result(view.as_json(study), as_json, lambda: view.as_text(study))


def check_output(path: Path, force: bool) -> None:
    """Raises InputError where a page cannot or must not be written, before anything is computed."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file, such as {path / 'page.html'}")
    if path.exists() and not force:
        raise InputError(f"{path} exists: choose another name, or --force to replace it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.parent}: there is no such folder to write {path.name} to")


def write_page(path: Path, text: str) -> None:
    """The file, whole or not at all; says so. Raises InputError."""
    from .patch import write_atomically

    data = text.encode()
    try:
        write_atomically(path, data)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another place") from error
    click.echo(f"{path}: {len(data):,} bytes, open it in a browser", err=True)


def _load(target: str, trained: Path | None, base: str | None) -> tuple[Patch, str, History | None]:
    """The update, the name of its base, and what a run's steps did."""
    from . import checkpoint
    from .models import find_model
    from .patch import Patch

    path = Path(target)
    is_run = (path / "recipe.toml").is_file()
    if trained is not None:
        if is_run or path.is_file():
            kind = "run" if is_run else "file"
            raise InputError(f"{target} is a {kind}, no checkpoint: compare two updates by --with {trained}")
        if base is not None:
            raise InputError("--base is for a patch: BASE TRAINED has its base")
        return checkpoint.diff(find_model(target).folder, trained, name=target), target, None
    if is_run:
        if base is not None:
            raise InputError("--base is for a patch: a run has its base in its recipe")
        return _load_run(path)
    if path.is_dir():
        raise InputError(f"{target} is no run (it has no recipe.toml); for two checkpoints give BASE TRAINED")
    if not path.exists():
        raise InputError(f"{target}: there is no such run or patch; for two checkpoints give BASE TRAINED")
    patch = Patch.load(path)
    return patch, base or patch.base.name, None


def _load_run(run: Path) -> tuple[Patch, str, History]:
    from .analysis import history_of
    from .export import patch_at
    from .journal import Journal

    journal, recipe = Journal.open(run)
    history = history_of(journal.replay(keep=True))
    for note in journal.notes:
        click.echo(note, err=True)
    if not journal.step:
        raise InputError(f"{run} has no steps yet")
    return patch_at(run, journal.step), recipe.model.name, history


def _overlap(patch: Patch, other: str, base: Checkpoint) -> Overlap:
    from .analysis import overlap

    theirs, _, _ = _load(other, None, None)
    return overlap(patch.tensors, theirs.tensors, base)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page [RUN/report.html].")
@click.option("--force", is_flag=True, help="Replace the file given by -o if it exists.")
def report(run: Path, output: Path | None, force: bool) -> None:
    """Write a page of plots, numbers and responses of RUN, finished or not. It reads without a network."""
    from .report import run as view

    path = output or run / "report.html"
    if output is not None:
        check_output(path, force)
    write_page(path, view.as_page(view.read_run(run)))
