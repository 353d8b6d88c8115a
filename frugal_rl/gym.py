"""reasoning-gym's tasks as problems: `gym:NAME`, about a hundred of them, made by its generators.

Invariants
- The sides of the split come from disjoint seeds. reasoning-gym makes item i of a data set from seed + i, so
  two seeds beside each other share nearly all items: held-out seeds begin at HELDOUT_SEED. A training
  prompt that a held-out one equals, by chance, is left out.
- Rows are made once, in a process of its own with PYTHONHASHSEED=0 (word_ladder, ransom_note and others
  depend on it), and kept in the cache folder, by task and version: every later run reads the same rows.
- A row's `metadata` is Python literals as text, because the scorers tell tuples from lists and JSON does
  not; the scorer (rewards/gym.py) reads them with ast.literal_eval, which runs nothing.
- An answer of None, where many are right, is the empty text.

Source: open-thought/reasoning-gym, reasoning_gym/factory.py and reasoning_gym/data/dataset.py.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

from .errors import InputError

PREFIX: Final = "gym:"
TRAIN_SEED: Final = 0
HELDOUT_SEED: Final = 2**30
DRAWS: Final = 4  # items made at most for each one wanted, where prompts come again
SAY_EVERY_S: Final = 20.0
UNUSABLE: Final = ("composite",)  # a mixture of others, which has to be told of which

Rows = dict[str, list[dict[str, str]]]


def gym_rows(name: str, train: int, heldout: int) -> Rows:
    """The rows of both sides, at most so many. Raises: InputError."""
    if util.find_spec("reasoning_gym") is None:
        raise InputError(f"{PREFIX}{name} needs the package reasoning-gym: pip install 'frugal-rl[gym]'")
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frugal_rl" / "gym"
    path = root / f"{name.replace('/', '_')}-{metadata.version('reasoning-gym')}-{train}-{heldout}.json"
    if not path.exists():
        _make_in_a_process(name, train, heldout, path)
    rows: Rows = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _make_in_a_process(name: str, train: int, heldout: int, path: Path) -> None:
    parent = str(Path(__file__).resolve().parents[1])
    code = (
        f"import sys; sys.path.insert(0, {parent!r}); from frugal_rl.gym import make; "
        f"make({name!r}, {train}, {heldout}, {str(path)!r})"
    )
    said = ""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        stdout=subprocess.DEVNULL,  # some generators print
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said = line.strip() or said
            if line.startswith(PREFIX):
                print(line.strip(), file=sys.stderr, flush=True)
    if process.returncode != 0:
        raise InputError(said.removeprefix("frugal_rl.errors.InputError: ") or f"{PREFIX}{name} failed")


def make(name: str, train: int, heldout: int, path: str) -> None:
    """Write the rows. Raises: InputError for a task that reasoning-gym does not have."""
    from reasoning_gym.factory import DATASETS

    from .patch import write_atomically

    known = sorted(set(DATASETS) - set(UNUSABLE))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
        raise InputError(f"reasoning-gym has no task {name!r} (it has {', '.join(known)}){hint}")
    said = [time.monotonic()]
    held = _distinct(name, HELDOUT_SEED, heldout, said)
    drawn = _distinct(name, TRAIN_SEED, train + heldout, said)
    prompts = len(held | drawn)  # where there are few, the held-out ones are a part as small as asked for
    held = dict(list(held.items())[: max(1, prompts * heldout // (train + heldout))])
    rest = [row for key, row in drawn.items() if key not in held][:train]
    if not rest:
        raise InputError(f"{PREFIX}{name} makes one prompt only: there is nothing to hold out")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps({"train": rest, "heldout": list(held.values())}).encode())


def _distinct(name: str, seed: int, wanted: int, said: list[float]) -> dict[str, dict[str, str]]:
    """Rows by their prompts with case and spacing evened out."""
    import reasoning_gym

    items = reasoning_gym.create_dataset(name, seed=seed, size=DRAWS * wanted)
    rows: dict[str, dict[str, str]] = {}
    for number in range(DRAWS * wanted):
        if len(rows) == wanted:
            break
        item = items[number]
        answer = item["answer"]
        row = {
            "prompt": str(item["question"]),
            "answer": "" if answer is None else str(answer),
            "gym": name,
            "metadata": repr(_literal(item["metadata"])),
        }
        rows.setdefault(" ".join(row["prompt"].casefold().split()), row)
        if time.monotonic() - said[0] > SAY_EVERY_S:
            said[0] = time.monotonic()
            side = "training" if seed == TRAIN_SEED else "held-out"
            print(
                f"{PREFIX}{name}: {len(rows)} of {wanted} {side} problems made", file=sys.stderr, flush=True
            )
    return rows


def _literal(value: Any) -> Any:
    """A value as Python's literals: numpy's numbers and texts are plain ones."""
    if isinstance(value, dict):
        return {_literal(key): _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return (
            type(value)(_literal(item) for item in value)
            if type(value) in (list, tuple, set)
            else list(value)
        )
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)
