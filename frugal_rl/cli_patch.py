"""`frugal-rl patch ...`: make, apply, take off, check and join patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .errors import InputError


def print_result(value: Any, as_json: bool, text: Callable[[], str]) -> None:
    """One JSON object, or the text for people, on standard output."""
    click.echo(json.dumps(value) if as_json else text())


@click.group()
def patch() -> None:
    """Make, apply, take off, check and join patches. BASE is a folder, an embedded or a hub model."""


def _folder(name: str) -> Path:
    from .models import find_model

    path = Path(name)
    return path if path.is_dir() else find_model(name).folder


def _target(output: Path | None, in_place: bool) -> None:
    if (output is None) != in_place:
        raise InputError("say where the result goes: either -o FOLDER or --in-place")


@patch.command()
@click.argument("base")
@click.argument("trained", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The patch file.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def diff(base: str, trained: Path, output: Path, force: bool) -> None:
    """Write the patch that turns BASE into TRAINED."""
    from . import checkpoint

    _refuse_existing(output, force)
    made = checkpoint.diff(_folder(base), trained, name=base)
    written = made.save(output)
    each = f", {written / made.entries:.2f} bytes each" if made.entries else ""
    click.echo(f"{output}: {made.entries:,} entries of {len(made.tensors)} tensors, {written:,} bytes{each}")


@patch.command("apply")
@click.argument("base")
@click.argument("file", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--in-place", is_flag=True, help="Rewrite the touched bytes of BASE itself (crash-safe).")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
def apply_command(base: str, file: Path, output: Path | None, in_place: bool, force: bool) -> None:
    """Write BASE with PATCH, bit for bit the trained model."""
    from . import checkpoint

    _target(output, in_place)
    if in_place:
        done = checkpoint.apply_in_place(Path(base), file)
    else:
        assert output is not None
        done = checkpoint.apply(_folder(base), file, output, force=force)
    click.echo(f"{output or base}: {done.entries:,} entries of {done.tensors} tensors changed, verified")


@patch.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--in-place", is_flag=True, help="Rewrite the touched bytes of FOLDER itself (crash-safe).")
@click.option("--force", is_flag=True, help="Replace the output folder if it exists.")
def revert(folder: Path, file: Path, output: Path | None, in_place: bool, force: bool) -> None:
    """Take PATCH off FOLDER: the base again, byte for byte."""
    from . import checkpoint

    _target(output, in_place)
    if in_place:
        done = checkpoint.revert_in_place(folder, file)
    else:
        assert output is not None
        done = checkpoint.revert(_folder(str(folder)), file, output, force=force)
    click.echo(f"{output or folder}: {done.entries:,} entries of {done.tensors} tensors restored, verified")


@patch.command()
@click.argument("folder")
@click.argument("file", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("--full", is_flag=True, help="Compare every tensor, not the touched entries alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(folder: str, file: Path, full: bool, as_json: bool) -> None:
    """Say whether FOLDER is PATCH's base or has it applied. Exit code 2 if it is neither."""
    from . import checkpoint

    found = checkpoint.verify(_folder(folder), file, full=full)
    meaning = {"base": "is the base of this patch", "applied": "has this patch applied"}[found.state]
    how = "every tensor compared" if full else "touched entries compared"
    print_result(
        {**asdict(found), "folder": folder, "patch": str(file)},
        as_json,
        lambda: f"{folder} {meaning}: {found.entries:,} entries of {found.tensors} tensors, {how}",
    )


@patch.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="PATCH")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(file: Path, as_json: bool) -> None:
    """Print what PATCH says of itself (its header alone is read)."""
    from .patch import Patch

    header = Patch.header(file)

    def text() -> str:
        each = f", {header.file_bytes / header.entries:.2f} each" if header.entries else ""
        lines = [
            f"format       {header.format}",
            f"base         {header.base_name} (fingerprint {header.base_fingerprint or 'unknown'})",
            f"entries      {header.entries:,} in {len(header.tensors)} tensors",
            f"bytes        {header.file_bytes:,}{each}",
        ]
        lines += [f"{k:<12} {json.dumps(v)}" for k, v in header.meta.get("metrics", {}).items()]
        rows = sorted(header.tensors.items(), key=lambda item: -item[1].entries)
        lines += [f"  {t.entries:>12,}  {t.dtype} {list(t.shape)}  {name}" for name, t in rows]
        return "\n".join(lines)

    value = {**asdict(header), "entries": header.entries}
    print_result(value, as_json, text)


@patch.command()
@click.argument("base")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATCH...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The patch file.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def merge(base: str, files: tuple[Path, ...], output: Path, force: bool) -> None:
    """Join patches, each made on top of the one before, into one for BASE."""
    from . import checkpoint

    _refuse_existing(output, force)
    made = checkpoint.merge(_folder(base), files)
    click.echo(
        f"{output}: {made.entries:,} entries of {len(made.tensors)} tensors, {made.save(output):,} bytes"
    )


@patch.command("at")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", required=True, type=click.IntRange(1), help="The step, counted from 1.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The patch file.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def at_step(run: Path, step: int, output: Path, force: bool) -> None:
    """Write the patch of the policy that RUN had after a step."""
    from . import checkpoint
    from .journal import Journal
    from .models import find_model

    _refuse_existing(output, force)
    journal, recipe = Journal.open(run)
    if recipe.learner.kind == "lora":
        raise InputError(
            f"{run} trained adapters, and only the last step's are kept: {run / 'adapter'}, and merged "
            f"{run / 'patch.safetensors'}"
        )
    steps = list(journal.replay(last=step))
    if journal.step < step:
        raise InputError(f"{run} has {journal.step} steps, not {step}")
    files = find_model(recipe.model.name)
    meta = {"recipe": recipe.to_toml(), "metrics": journal.metrics[-1]}
    if recipe.model.weights == "int8":  # its steps are made for the dequantised base
        import torch

        from .models import load_tokenizer
        from .policy import load_policy
        from .weights import export

        policy = load_policy(files, load_tokenizer(files), torch.device("cpu"), form="int8")
        for one in steps:
            policy.weights.write_patch_(one)
        made, _ = export(policy.weights, files.folder, files.name, meta)
    else:
        made = checkpoint.merge(files.folder, steps, meta)
        made = type(made)(made.tensors, checkpoint.base_info(files.folder, files.name), made.meta)
    click.echo(f"{output}: step {step}, {made.entries:,} entries, {made.save(output):,} bytes")


def _refuse_existing(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise InputError(f"{output} exists: choose another name, or --force to replace it")
