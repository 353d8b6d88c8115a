"""What leaves a run: the trained folder, a GGUF with an Ollama Modelfile, or the patch with a model card.

All three are the base with the run's patch, exactly: the folder in every bit; the GGUF is the base's own
conversion with the patch applied to it, which is the conversion of that folder (gguf/change.py).

Ollama's templates are Go's, a model's is Jinja. Here the latter is rendered with marks for what is said,
read as

    head (where no system message comes first), then each turn's text between two fixed pieces, then the cue

and written down only if that gives the same text for several conversations; otherwise the Modelfile has no
template, and the command says so. Differs: space around what is said stays, where a template trims it.

Source: ollama/ollama docs/modelfile.md, docs/template.md.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import Recipe
from .errors import InputError
from .gguf import change
from .gguf.vocab import vocabulary_of
from .gguf.write import convert
from .journal import Journal
from .models import EMBEDDED, ModelFiles, find_model, load_tokenizer, stop_ids
from .patch import Patch

Messages = list[dict[str, str]]
CARD, MODELFILE, PATCH_FILE, RECIPE_FILE = "README.md", "Modelfile", "patch.safetensors", "recipe.toml"


@dataclass(frozen=True)
class Finished:
    """A run's policy after some step. `recipe` is the run's own."""

    run: Path
    recipe: Recipe
    files: ModelFiles
    patch: Patch


def finished(run: Path, step: int | None) -> Finished:
    """After a step, or as the run ended. Raises InputError."""
    journal, recipe = Journal.open(run)
    files = find_model(recipe.model.name)
    if step is not None:
        return Finished(run, recipe, files, patch_at(run, step))
    path = run / PATCH_FILE
    if not path.exists():
        steps = len(list((journal.folder / "journal").glob("[0-9]*.safetensors")))
        raise InputError(
            f"{run}: has not ended, so it has no {PATCH_FILE}; go on with frugal-rl train --resume {run}, or "
            f"export one of its {steps} steps with --step N"
        )
    return Finished(run, recipe, files, Patch.load(path))


def patch_at(run: Path, step: int) -> Patch:
    """The patch of the policy that a run had after a step, for its checkpoint. Raises InputError."""
    journal, recipe = Journal.open(run)
    if recipe.learner.kind == "lora":
        raise InputError(
            f"{run} trained adapters, and only the last step's are kept: {run / 'adapter'}, and merged "
            f"{run / 'patch.safetensors'}"
        )
    steps = list(journal.replay(last=step, keep=True))
    if journal.step < step:
        raise InputError(f"{run} has {journal.step} steps, not {step}")
    files = find_model(recipe.model.name)
    meta = {"recipe": recipe.to_toml(), "metrics": journal.metrics[-1]}
    if recipe.model.weights == "int8":  # its steps are made for the dequantised base
        import torch

        from .policy import load_policy
        from .weights import export

        policy = load_policy(files, load_tokenizer(files), torch.device("cpu"), form="int8")
        for one in steps:
            policy.weights.write_patch_(one)
        return export(policy.weights, files.folder, files.name, meta)[0]
    made = checkpoint.merge(files.folder, steps, meta)
    return Patch(made.tensors, checkpoint.base_info(files.folder, files.name), made.meta)


def as_folder(done: Finished, out: Path, *, force: bool) -> list[str]:
    """Write the trained checkpoint, with its base's other files. Returns what to tell. Raises InputError."""
    checkpoint.apply(done.files.folder, done.patch, out, force=force)
    return [f"{out}: {done.files.name} with {done.patch.entries:,} entries changed, verified"]


def as_gguf(done: Finished, out: Path, kind: str, *, force: bool) -> list[str]:
    """Write a folder with a GGUF and a Modelfile. Returns what to tell. Raises InputError."""
    tokenizer = load_tokenizer(done.files)
    stops = stop_ids(done.files, tokenizer)
    vocabulary = vocabulary_of(tokenizer, done.files.config, done.files.name, stops)
    begins = bool(vocabulary["tokenizer.ggml.add_bos_token"][1])
    file = f"{Path(done.files.name).name}-{done.run.resolve().name}-{kind}.gguf"
    notes = []

    def fill(folder: Path) -> None:
        path = folder / file
        convert(done.files, path, kind, vocabulary)
        change.apply(path, done.patch, done.files.folder)
        template = go_template(tokenizer, begins=begins)
        if template is None:
            notes.append(
                f"{out / MODELFILE}: its chat template cannot be written for Ollama, which falls back to its "
                "own guess; llama.cpp reads it from the GGUF"
            )
        text = modelfile(file, template, [tokenizer.decode([i]) for i in sorted(stops)], done.recipe)
        (folder / MODELFILE).write_text(text, encoding="utf-8")

    _write_folder(out, fill, force)
    size = (out / file).stat().st_size
    name = Path(done.files.name).name.lower()
    return [
        f"{out / file}: {size:,} bytes, {done.patch.entries:,} entries changed",
        *notes,
        f"run it             ollama create {name} -f {out / MODELFILE}, or llama-cli -m {out / file}",
    ]


def as_patch(done: Finished, out: Path, *, force: bool) -> list[str]:
    """Write a folder with the patch, its recipe and a model card. Returns what to tell. Raises InputError."""

    def fill(folder: Path) -> None:
        done.patch.save(folder / PATCH_FILE)
        (folder / RECIPE_FILE).write_text(done.recipe.to_toml(), encoding="utf-8")
        (folder / CARD).write_text(card(done), encoding="utf-8")

    _write_folder(out, fill, force)
    size = (out / PATCH_FILE).stat().st_size
    return [f"{out}: {PATCH_FILE} ({size:,} bytes), {RECIPE_FILE} and {CARD}, the model card"]


def _write_folder(out: Path, fill: Callable[[Path], None], force: bool) -> None:
    """A folder that appears whole. Raises InputError where something else is there."""
    if out.exists():
        if not force:
            raise InputError(f"{out}: exists; give another folder, or --force to replace it")
        ours = out.is_dir() and any((out / name).is_file() for name in (MODELFILE, CARD))
        if not ours and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(
                f"{out}: is no earlier export, so --force does not replace it; remove it yourself"
            )
    sibling = out.with_name(f".{out.name}.{os.getpid()}.partial")
    sibling.mkdir(parents=True)
    try:
        fill(sibling)
        if out.exists():
            shutil.rmtree(out)
        os.rename(sibling, out)
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


# --- Ollama


@dataclass(frozen=True)
class Turns:
    """A chat template as fixed pieces: `around` has the text before and after what each role says."""

    head: str
    around: Mapping[str, tuple[str, str]]
    cue: str

    def render(self, messages: Messages) -> str:
        parts = [] if messages[0]["role"] == "system" else [self.head]
        for message in messages:
            before, after = self.around[message["role"]]
            parts.append(before + message["content"] + after)
        return "".join([*parts, self.cue])

    def go(self) -> str:
        """For a Modelfile."""
        texts = [self.head, self.cue, *(piece for pair in self.around.values() for piece in pair)]
        if any("{{" in text or "}}" in text or '"""' in text for text in texts):
            raise ValueError("a piece of the template means something to Ollama")
        branches = "".join(
            f'{{{{ {"else " * (number > 0)}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(self.around.items())
        )
        head = f"{{{{ if not .System }}}}{self.head}{{{{ end }}}}" if self.head else ""
        return f"{head}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.cue}"


def go_template(tokenizer: Any, *, begins: bool) -> str | None:
    """The tokenizer's chat template for Ollama; None where there is none, or it is no row of turns.

    `begins`: the beginning-of-sequence token comes by itself, so the template must not say it again.
    """
    from jinja2 import TemplateError

    def render(messages: Messages, cue: bool = True) -> str:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=cue))
        return text.removeprefix(tokenizer.bos_token) if begins and tokenizer.bos_token else text

    if not tokenizer.chat_template:
        return None
    try:
        turns = _turns(render)
        return turns.go() if turns is not None else None
    except (TemplateError, ValueError):  # the template refuses a role or an order, or a mark is not found
        return None


def _turns(render: Callable[..., str]) -> Turns | None:
    def said(*rows: tuple[str, str]) -> Messages:
        return [{"role": role, "content": text} for role, text in rows]

    one = said(("user", "<<U>>"))
    plain, cued = render(one, cue=False), render(one)
    if not cued.startswith(plain):
        return None
    cue = cued[len(plain) :]
    two = said(("user", "<<U>>"), ("assistant", "<<A>>"))
    # what ends a conversation is what follows its last turn, so it is known of both
    start, after_user = plain.split("<<U>>")
    _, after_answer = render(two, cue=False).split("<<A>>")
    _, rest = render(said(("user", "<<U>>"), ("assistant", "<<A>>"), ("user", "<<V>>")), cue=False).split(
        "<<U>>"
    )
    before_answer, rest = rest.split("<<A>>")
    before_answer = before_answer.removeprefix(after_user)
    before_user = rest.split("<<V>>")[0].removeprefix(after_answer)
    head = start.removesuffix(before_user)
    around = {"user": (before_user, after_user), "assistant": (before_answer, after_answer)}
    conversations = [one, said(("user", "a\n b"), ("assistant", "c"), ("user", "d"))]
    try:
        first = render(said(("system", "<<S>>"), ("user", "<<U>>")), cue=False)
        before_system, rest = first.split("<<S>>")
        after_system = rest.split("<<U>>")[0].removesuffix(before_user)
        around = {"system": (before_system, after_system), **around}
        conversations.append(said(("system", "be f"), ("user", "g"), ("assistant", "h"), ("user", "i")))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
    turns = Turns(head, around, cue)
    same = all(turns.render(conversation) == render(conversation) for conversation in conversations)
    return turns if same else None


def modelfile(file: str, template: str | None, stops: Sequence[str], recipe: Recipe) -> str:
    """What `ollama create` reads."""
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop.strip() and '"' not in stop]
    lines.append(f"PARAMETER temperature {recipe.rollout.temperature:g}")
    return "\n".join(lines) + "\n"


# --- the model card


def card(done: Finished) -> str:
    """Markdown with the hub's metadata: base model, scores, how to apply the patch, the recipe."""
    name, patch = done.files.name, done.patch
    on_hub = not Path(name).is_dir() and name.count("/") == 1
    own = f"[{name}](https://huggingface.co/{name})" if on_hub else f"`{Path(name).name}`"
    metrics = patch.meta.get("metrics", {})
    after = "accuracy_exported" if metrics.get("accuracy_exported") else "accuracy_after"
    scores = [
        f"| {label} | {one['value']:.1%} | {one['low']:.1%} to {one['high']:.1%} | {one['problems']} |"
        for label, key in (("base", "accuracy_before"), ("trained", after))
        if (one := metrics.get(key))
    ]
    table = ["| held-out accuracy | | 95 % | problems |", "|---|---|---|---|", *scores, ""] if scores else []
    front = ["library_name: frugal_rl", "tags:", "- reinforcement-learning", "- sparse-patch"]
    front += [f"base_model: {name}"] if on_hub else []
    fingerprint = patch.base.fingerprint or "unknown"
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# A patch for {Path(name).name}",
            "",
            f"All parameters of {own} trained by reinforcement learning with verifiable rewards",
            "(frugal_rl, SGD). This is the difference, bit for bit: "
            f"{patch.entries:,} entries of {len(patch.tensors)} tensors.",
            "",
            *table,
            "## Use",
            "",
            "```sh",
            "pip install frugal-rl",
            f"frugal-rl patch apply {name if on_hub or name in EMBEDDED else 'BASE'} {PATCH_FILE} -o trained",
            "```",
            "",
            f"The base is recognised by its bits (fingerprint `{fingerprint}`); any other is refused.",
            "A GGUF of the base takes the patch too: `frugal-rl patch apply base.gguf "
            f"{PATCH_FILE} --in-place`.",
            "",
            "## Recipe",
            "",
            "```toml",
            done.recipe.to_toml().strip(),
            "```",
            "",
        ]
    )
