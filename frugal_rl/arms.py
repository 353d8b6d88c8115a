"""The ways to learn that are compared: plain SGD and its baselines, by name, and what each must hold.

    learner.kind    trains                              master weights    beside the weights, bytes an entry
    sgd             all, a layer at a time (learn.py)   none              0
    sgd-momentum    all (baselines.py)                  float32           4 master, 4 momentum, 4 gradient
    adamw           all                                 float32           4 master, 8 moments, 4 gradient
    adamw8bit       all                                 float32           4 master, 2 moments, 4 gradient
    lora            adapters on all linear layers       float32 adapters  16 an adapter's entry

The masters are float32 because that is what makes these methods work as they are run: AdamW's update has
about the size of its learning rate, 1e-6 for LLMs, and half a unit in the last place of a bf16 weight of
0.02 is 6e-5. Without a master it would be rounded away, and with it the comparison. What the gradient is
computed at, and what is sampled, is the master rounded to the checkpoint's format (mixed precision,
arXiv 1710.03740), or for LoRA the base plus the adapters in float32, unmerged.

Optimizer settings are those of huggingface/trl (transformers' TrainingArguments): betas 0.9 and 0.999,
eps 1e-8, no weight decay, the learning rate constant as in arXiv 2602.07729. LoRA's are those of "LoRA
Without Regret" and TRL's reproduction of it: all linear layers, alpha 32, AdamW.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

KINDS = ("sgd", "sgd-momentum", "adamw", "adamw8bit", "lora")
DENSE = frozenset({"sgd-momentum", "adamw", "adamw8bit"})
MOMENTUM, RANK, ALPHA = 0.9, 16, 32.0
STATE_BYTES = {"sgd-momentum": 4.0, "adamw": 8.0, "adamw8bit": 2.0}  # an entry
MASTER_BYTES = GRADIENT_BYTES = 4


def forms_of(kind: str) -> tuple[str, ...]:
    """The forms of weights (memory.FORMS) that a kind can be trained on."""
    return ("bf16",) if kind in DENSE else ("bf16", "int8") if kind == "lora" else ("bf16", "int8", "host")


def check_learner(
    kind: str, weights: str, momentum: float | None, rank: int | None, alpha: float | None, where: str
) -> None:
    """Raises InputError for a pair of keys that contradict each other; `where` names their source."""
    at = f'{where}: [learner] kind = "{kind}"'
    for key, value, owner in (
        ("momentum", momentum, "sgd-momentum"),
        ("rank", rank, "lora"),
        ("alpha", alpha, "lora"),
    ):
        if value is not None and kind != owner:
            raise InputError(f'{at} with {key} = {value:g}, which is for kind = "{owner}"; leave {key} out')
    if weights not in forms_of(kind):
        why = "a step of it changes every entry" if kind in DENSE else "its adapters are not streamed"
        raise InputError(
            f'{at} with [model] weights = "{weights}": {why}; expected weights = '
            + " or ".join(f'"{form}"' for form in forms_of(kind))
        )


def check_resumable(kind: str, folder: Path) -> None:
    """Raises InputError for a kind whose state is not in the journal of the run in `folder`."""
    if kind != "sgd":
        raise InputError(
            f"{folder} trains with learner.kind = {kind!r}, whose state is not in the journal: it cannot go "
            f"on, only plain SGD's can. Begin anew: frugal-rl train --recipe {folder / 'recipe.toml'} -o NEW"
        )


def extra_bytes(kind: str, parameters: int, storage_bytes: int, adapter_entries: int) -> tuple[int, int]:
    """What a kind holds beside the weights: at all times, and while it learns.

    A master is the weights themselves where they are stored in float32.
    """
    if kind == "lora":
        return adapter_entries * (MASTER_BYTES + 8), adapter_entries * GRADIENT_BYTES
    if kind not in DENSE:
        return 0, 0
    master = 0 if storage_bytes == MASTER_BYTES else MASTER_BYTES
    return int(parameters * (master + STATE_BYTES[kind])), parameters * GRADIENT_BYTES


@dataclass(frozen=True)
class Arm:
    """One line of a comparison, as `adamw`, `lora:16`, `lora-int8:1`, `sgd-int8` or `sgd-momentum:0.9`."""

    name: str
    kind: str
    weights: str
    number: float | None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Raises InputError."""
        head, colon, tail = text.strip().partition(":")
        kind, weights = head, "bf16"
        for form in ("int8", "host"):
            if head.endswith(f"-{form}"):
                kind, weights = head.removesuffix(f"-{form}"), form
        expected = (
            "expected sgd, sgd-int8, sgd-host, sgd-momentum[:MOMENTUM], adamw, adamw8bit, lora[:RANK] or "
            "lora-int8[:RANK]"
        )
        if kind not in KINDS:
            raise InputError(f"--arms: {text!r} is no arm: {expected}")
        number = None
        if colon:
            if kind not in ("lora", "sgd-momentum"):
                raise InputError(f"--arms: {text!r}: {kind} has no number; {expected}")
            try:
                number = int(tail) if kind == "lora" else float(tail)
            except ValueError as error:
                raise InputError(f"--arms: {text!r}: {tail!r} is not a number; {expected}") from error
            if not (number >= 1 if kind == "lora" else 0 <= number < 1):
                limits = "a rank of at least 1" if kind == "lora" else "a momentum of 0 up to below 1"
                raise InputError(f"--arms: {text!r}: expected {limits}")
        elif kind in ("lora", "sgd-momentum"):
            number = RANK if kind == "lora" else MOMENTUM
        check_learner(kind, weights, None, None, None, f"--arms {text}")
        shown = "" if number is None else f":{number:g}"
        return cls(f"{head}{shown}", kind, weights, number)

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-")

    def overrides(self) -> list[str]:
        """What makes a recipe this arm's, but for the learning rate."""
        keys = [f'learner.kind="{self.kind}"', f'model.weights="{self.weights}"']
        if self.number is not None:
            keys.append(f"learner.{'rank' if self.kind == 'lora' else 'momentum'}={self.number!r}")
        return keys

    def default_grid(self, sgd_lr: float, hidden: int) -> tuple[float, ...]:
        """Three learning rates to try where nobody names any.

        SGD: around the recipe's own; with momentum m its steps add up to 1 / (1 - m) times as much, so
        around (1 - m) times it. AdamW: Adam's rates go with 1 / width (arXiv 2203.03466), 1e-5 and less at
        4096, where the papers take 1e-6; LoRA: ten times those of AdamW ("LoRA Without Regret").
        """
        if self.kind == "sgd":
            factors, most = (1 / 3, 1.0, 3.0), sgd_lr
        elif self.kind == "sgd-momentum":
            factors, most = (1 / 3, 1.0, 3.0), sgd_lr * (1 - (self.number or 0.0))
        else:
            factors, most = (0.1, 0.3, 1.0), 0.04 / hidden * (10 if self.kind == "lora" else 1)
        return tuple(float(f"{most * factor:.0e}") for factor in factors)
