"""`frugal-rl export`: a run's policy in the form that others take."""

from __future__ import annotations

from pathlib import Path

import click

from .errors import FrugalError, InputError

KINDS = ("q8_0", "bf16", "f16", "f32")


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["hf", "gguf", "patch"]), required=True, help="See above."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--step", type=click.IntRange(1), help="The policy after this step [as the run ended].")
@click.option("--type", "kind", type=click.Choice(KINDS), help="Of the GGUF's matrices [q8_0].")
@click.option("--push", metavar="OWNER/NAME", help="Then upload the folder to the hub, privately.")
@click.option("--force", is_flag=True, help="Replace an earlier export.")
def export(
    run: Path, form: str, output: Path, step: int | None, kind: str | None, push: str | None, force: bool
) -> None:
    """Write the policy of RUN as a folder.

    hf: the trained checkpoint, with tokenizer and config. gguf: a GGUF with chat template, and a Modelfile
    for Ollama. patch: the patch with a model card and the recipe.
    """
    from . import export as exports

    if kind is not None and form != "gguf":
        raise InputError(f"--type is for --format gguf, which {form} is not")
    if push is not None:
        _check_name(push)
    done = exports.finished(run, step)
    if form == "hf":
        lines = exports.as_folder(done, output, force=force)
    elif form == "gguf":
        lines = exports.as_gguf(done, output, kind or "q8_0", force=force)
    else:
        lines = exports.as_patch(done, output, force=force)
    click.echo("\n".join(lines))
    if push is not None:
        click.echo(f"pushed             {_push(push, output)}")


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push {name}: is no name of the hub: {error}") from error
    if "/" not in name:
        raise InputError(f"--push {name}: say whose it is: OWNER/{name}")


def _push(name: str, folder: Path) -> str:
    """Upload a folder. Returns its address. Raises FrugalError where the hub does not take it."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:
        why = str(error).partition("\n")[0] or repr(error)
        raise FrugalError(
            f"{folder} is written but was not pushed: {why}; "
            f"with a network and a login (hf auth login): hf upload {name} {folder}"
        ) from error
    return str(url)
