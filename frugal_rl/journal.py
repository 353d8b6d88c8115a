"""The run folder: what a run leaves, written so that a crash at any instant costs no committed step.

    recipe.toml         the resolved recipe
    session.json        the plan and the environment of the last session
    journal/00000001.safetensors ...   one small patch a step, written once, with the step's counters,
                        metrics and samples and the hash of the file before; base + all is the policy
    validation.jsonl    a line for each evaluation on the held-out problems: step, accuracy, and a 1 or
                        a 0 for each problem
    metrics.jsonl       a line a step, written anew from the journal when a run goes on
    samples.jsonl       a few responses a step, as they were judged; written as metrics.jsonl is
    problems.json       how many problems, their hash, what the base solved; left_out.jsonl: the others
    summary.json, patch.safetensors    at the end of every session

Law: all state of a run is (recipe, base, journal). Random numbers are functions of the seed and of
counters, and the counters are in the journal, so a resumed run goes on as if it had never stopped.
A step counts as done when its file has its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .config import Recipe, load_recipe
from .errors import InputError
from .patch import Patch, PatchError, write_atomically

SAMPLE_CHARACTERS = 2000  # of a prompt or a response that is kept


def shortened(text: str) -> str:
    """A long text without its middle."""
    left = len(text) - SAMPLE_CHARACTERS
    if left <= 0:
        return text
    half = SAMPLE_CHARACTERS // 2
    return f"{text[:half]} [... {left:,} characters left out ...] {text[-half:]}"


@dataclass
class Journal:
    """An open run folder. `step`, `drawn` and `tip` follow the last committed step."""

    folder: Path
    step: int = 0
    drawn: int = 0  # problems drawn so far, the data's only state
    tip: str = ""  # hash of the last step's file
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a person should be told

    @classmethod
    def create(
        cls, folder: Path, recipe: Recipe, *, force: bool, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Journal:
        """A new run, with `files`. Raises InputError if the folder exists and `force` is not given."""
        if folder.exists():
            if not force:
                raise InputError(
                    f"{folder} exists: choose another with -o, go on with --resume {folder}, "
                    "or replace it with --force"
                )
            if not (folder / "recipe.toml").exists():
                raise InputError(f"{folder} exists and is not a run: it is not replaced")
            shutil.rmtree(folder)
        sibling = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        (sibling / "journal").mkdir(parents=True)
        write_atomically(sibling / "recipe.toml", recipe.to_toml().encode())
        for name in ("metrics.jsonl", "samples.jsonl"):
            (sibling / name).touch()
        for name, data in files.items():
            write_atomically(sibling / name, data)
        os.rename(sibling, folder)  # a run folder appears whole
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> tuple[Journal, Recipe]:
        """An existing run, nothing replayed yet. Raises InputError."""
        if not (folder / "recipe.toml").exists():
            raise InputError(f"{folder} is not a run folder: it has no recipe.toml")
        return cls(folder), load_recipe(str(folder / "recipe.toml"))

    def path(self, step: int) -> Path:
        return self.folder / "journal" / f"{step:08d}.safetensors"

    def replay(self, last: int | None = None, *, keep: bool = False) -> Iterator[Patch]:
        """The committed steps in order (up to step `last`); advances the counters.

        A damaged last file is set aside (left where it is with `keep`, for those who only read), and
        `notes` says so; damage before it raises PatchError, since the steps behind it cannot be trusted.
        """
        paths = sorted((self.folder / "journal").glob("[0-9]*.safetensors"))
        for number, path in enumerate(paths[:last], start=1):
            try:
                data = path.read_bytes()
                patch = Patch.decode(data, str(path))
                if (patch.meta.get("step"), patch.meta.get("previous")) != (number, self.tip):
                    raise PatchError(f"{path} does not follow the step before it")
            except PatchError as error:
                if path != paths[-1]:
                    raise
                aside = path.with_suffix(".damaged")
                if not keep:
                    os.replace(path, aside)
                self.notes.append(f"left out: {error}" if keep else f"set aside {aside}: {error}")
                return
            self._advance(patch.meta, data)
            yield patch

    def _advance(self, meta: Mapping[str, Any], data: bytes) -> None:
        self.step, self.drawn = int(meta["step"]), int(meta["drawn"])
        self.metrics.append(dict(meta["metrics"]))
        self.samples += meta.get("samples", [])  # runs of earlier versions have none
        self.tip = blake2b(data, digest_size=16).hexdigest()

    def commit(
        self,
        patch: Patch,
        drawn: int,
        metrics: Mapping[str, Any],
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> int:
        """Make a step durable, then add its lines for people. Returns the bytes of its file."""
        meta = {"step": self.step + 1, "drawn": drawn, "previous": self.tip, "metrics": dict(metrics)}
        meta["samples"] = [dict(sample) for sample in samples]
        data = Patch(patch.tensors, patch.base, meta).encode()
        write_atomically(self.path(self.step + 1), data)
        self._advance(meta, data)
        self._append("metrics.jsonl", [json.dumps(metrics)])
        # as the journal gives them back: a run that was resumed leaves the same file
        self._append("samples.jsonl", [json.dumps(sample, sort_keys=True) for sample in samples])
        return len(data)

    def _append(self, name: str, lines: list[str]) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)

    def restore(self) -> None:
        """Bring the files beside the journal to the steps replayed."""
        self._rewrite("metrics.jsonl", self.metrics)
        self._rewrite("samples.jsonl", self.samples)
        path = self.folder / "validation.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:  # the line that was being written when the run was cut off
                break
            if row["step"] <= self.step:
                self.validations.append(row)
        self._rewrite("validation.jsonl", self.validations)

    def _rewrite(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.folder / name, text.encode())

    def validate(self, step: int, accuracy: Mapping[str, Any], correct: str = "") -> None:
        """Note an evaluation on the held-out problems; each step is evaluated once.

        `correct`: a 1 or a 0 for each problem, kept in the file alone.
        """
        if any(row["step"] == step for row in self.validations):
            return
        row = {"step": step, "accuracy": dict(accuracy)}
        self.validations.append({**row, "correct": correct} if correct else row)
        self._rewrite("validation.jsonl", self.validations)

    def best(self) -> dict[str, Any]:
        """The evaluation with the highest accuracy, the earliest of equals."""
        row = max(self.validations, key=lambda row: (row["accuracy"]["value"], -row["step"]))
        return {"step": row["step"], "accuracy": row["accuracy"]}

    def since_best(self) -> int:
        """How many evaluations came after the best one."""
        return sum(row["step"] > self.best()["step"] for row in self.validations)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_atomically(self.folder / name, (json.dumps(value, indent=2) + "\n").encode())
