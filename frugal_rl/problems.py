"""From a task's name or rows (sources.py) to problems: token ids to continue and an answer to verify.

Invariants
- A problem is in train or in held-out, never in both, by its normalised prompt (`same_prompt`). A
  number of held-out problems is taken by the smallest hashes of their prompts: the choice depends on
  what the file holds, not on its order. With a separate held-out file an overlap is an error.
- `prompt_ids` are what the model sees: the chat template's text is encoded without special tokens of
  the tokenizer's own (no double BOS), plain text gets a BOS unless it starts with one, never an EOS.
- A row that cannot be used is an error with file and line. Only a prompt that is too long is left
  out, counted and said in `notes`.
- A draw is a function of (number of problems, seed, position): no generator's state is kept, so a run
  resumes from one integer. Each epoch is one permutation.

Differs: the permutation sorts raw Philox output instead of calling `Generator.permutation`, which
numpy does not promise to keep from version to version.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from frugal_rl import tasks
from frugal_rl.errors import InputError
from frugal_rl.rewards.answers import last_boxed
from frugal_rl.sources import is_source, read_rows

Message = dict[str, str]
BOX = ("\\boxed", "\\boxed{")  # as data.answer_after: the answer stands in the last box


class Source(Protocol):
    """What is read of the recipe's [data] section."""

    @property
    def source(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def answer_after(self) -> str | None: ...
    @property
    def heldout(self) -> int | str: ...
    @property
    def system(self) -> str | None: ...
    @property
    def suffix(self) -> str | None: ...
    @property
    def format(self) -> str: ...
    @property
    def template(self) -> Mapping[str, bool | int | float | str] | None: ...


@dataclass(frozen=True)
class Problem:
    """`prompt` is the text behind `prompt_ids`, template and all; `row` is the row as it was read."""

    id: str  # where it was read: file name and line, the same on every machine
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class LeftOut:
    """A problem that is not used, by where it was read."""

    id: str
    side: str  # "training" or "held-out"
    reason: str
    answer: str


@dataclass(frozen=True)
class ProblemSet:
    """`solved`: correct and judged answers of the base, by problem, if they were counted (curation.py)."""

    train: list[Problem]
    heldout: list[Problem]
    notes: list[str]  # what a person should be told, once
    left_out: list[LeftOut] = field(default_factory=list)
    solved: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    where: str  # path:line, for messages
    id: str
    question: str | tuple[Message, ...]
    answer: str
    fields: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal for prompts that are the same to a reader."""
        if isinstance(self.question, str):
            return same_prompt(self.question)
        return same_prompt("\n".join(m["role"] + ": " + m["content"] for m in self.question))


def load_problems(data: Source, tokenizer: Any, max_prompt_tokens: int) -> ProblemSet:
    """Raises InputError, which names the file and line."""
    notes: list[str] = []
    train, heldout = _split(data, notes)
    encode = _Encoder(data, tokenizer, notes)
    sets: list[list[Problem]] = []
    left_out: list[LeftOut] = []
    for name, rows in (("training", train), ("held-out", heldout)):
        problems = encode(rows)
        kept = [p for p in problems if len(p.prompt_ids) <= max_prompt_tokens]
        left_out += [
            LeftOut(p.id, name, f"prompt of {len(p.prompt_ids)} tokens, over {max_prompt_tokens}", p.answer)
            for p in problems
            if len(p.prompt_ids) > max_prompt_tokens
        ]
        if len(kept) < len(problems):
            notes.append(
                f"{len(problems) - len(kept)} of {len(problems)} {name} problems left out: "
                f"their prompts have more than {max_prompt_tokens} tokens"
            )
        if problems and not kept:
            shortest = min(len(p.prompt_ids) for p in problems)
            raise InputError(
                f"{data.source}: every {name} prompt has more than {max_prompt_tokens} tokens "
                f"(the shortest {shortest}); raise data.max_prompt_tokens"
            )
        sets.append(kept)
    encode.say_unknown()
    return ProblemSet(sets[0], sets[1], notes, left_out)


# ---- rows ----


def _split(data: Source, notes: list[str]) -> tuple[list[_Row], list[_Row]]:
    if isinstance(data.heldout, int) and data.heldout < 0:
        raise InputError(f"data.heldout is {data.heldout}, expected a number of problems or a file")
    if tasks.find_task(data.source) is None and (is_source(data.source) or Path(data.source).is_file()):
        rows = _read_rows(data.source, data)
        if isinstance(data.heldout, str):
            heldout = _read_rows(data.heldout, data)
            _refuse_overlap(rows, heldout, data)
            return rows, heldout
        return _split_by_hash(rows, data.heldout, data.source)
    rows, heldout = _task_rows(data.source, "train"), _task_rows(data.source, "heldout")
    if isinstance(data.heldout, str):
        heldout = _read_rows(data.heldout, data)
    elif data.heldout > len(heldout):
        notes.append(f"{data.source} has {len(heldout)} held-out problems, not {data.heldout}: all are used")
    else:
        heldout = heldout[: data.heldout]
    _refuse_overlap(rows, heldout, data)
    return rows, heldout


def same_prompt(prompt: str) -> str:
    """The prompt with case and spacing evened out: what a reader takes for one is equal."""
    return " ".join(prompt.casefold().split())


def _split_by_hash(rows: list[_Row], count: int, source: str) -> tuple[list[_Row], list[_Row]]:
    """Held-out rows come in the order of their hashes; of equal prompts one row stands for all."""
    by_key: dict[str, _Row] = {}
    for row in rows:
        kept = by_key.get(row.key)
        if kept is None or row.answer < kept.answer:
            by_key[row.key] = row
    if count >= len(by_key):
        raise InputError(
            f"{source}: data.heldout = {count} leaves nothing to train on, "
            f"the file has {len(by_key)} different prompts"
        )
    chosen = sorted(by_key, key=lambda key: hashlib.sha256(key.encode("utf-8", "replace")).digest())
    heldout_keys = set(chosen[:count])
    train = [row for row in rows if row.key not in heldout_keys]
    return train, [by_key[key] for key in chosen[:count]]


def _refuse_overlap(train: list[_Row], heldout: list[_Row], data: Source) -> None:
    by_key = {row.key: row for row in train}
    shared = [row for row in heldout if row.key in by_key]
    if shared:
        first, twin = shared[0], by_key[shared[0].key]
        raise InputError(
            f"{len(shared)} of {len(heldout)} held-out prompts are among the {len(train)} training prompts "
            f"of {data.source}: {first.where} is {twin.where}: {first.key[:120]!r}; "
            "remove them from one file, or give data.heldout as a number"
        )


def _task_rows(name: str, split: str) -> list[_Row]:
    task = tasks.find_task(name)
    if task is None:
        near = difflib.get_close_matches(name, tasks.task_names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if name.count("/") == 1 and not name.startswith("."):
            hint = f"; a dataset of the hub is written hub:{name}"
        raise InputError(
            f"data.source {name!r} is neither a file nor a built-in task "
            f"(built in: {', '.join(tasks.task_names())}){hint}"
        )
    return [
        _Row(
            f"{name}:{split}:{number}",
            f"{name}:{split}:{number}",
            row["prompt"],
            row["answer"],
            row,
        )
        for number, row in enumerate(task.rows(split), 1)
    ]


def _read_rows(source: str, data: Source) -> list[_Row]:
    rows = [
        _Row(
            read.where,
            read.id,
            _question(read.fields, data, read.where),
            _answer(read.fields, data, read.where),
            read.fields,
        )
        for read in read_rows(source)
    ]
    if not rows:
        raise InputError(f"{source}: no rows")
    return rows


def _field(row: Mapping[str, Any], name: str, setting: str, where: str) -> Any:
    """The field of that name, or `outer.inner` of one that holds fields."""
    outer, dot, inner = name.partition(".")
    if dot and name not in row and isinstance(row.get(outer), Mapping):
        return _field(row[outer], inner, setting, f"{where}, in {outer!r}")
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"{where}: no field {name!r} (it has {', '.join(map(repr, row)) or 'none'}); "
            f"{hint}set {setting} to the right one"
        )
    return row[name]


def _question(row: Mapping[str, Any], data: Source, where: str) -> str | tuple[Message, ...]:
    value = _field(row, data.prompt, "data.prompt", where)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        if value[-1]["role"] == "assistant":
            raise InputError(
                f"{where}: {data.prompt!r} ends with the assistant's message, which is the response"
            )
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise InputError(
        f"{where}: {data.prompt!r} must be a text that is not empty, "
        f"or a list of messages with a role and a content, got {_short(value)}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("role", "content"))


def _answer(row: Mapping[str, Any], data: Source, where: str) -> str:
    value = _field(row, data.answer, "data.answer", where)
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where}: {data.answer!r} must be a text or a number, got {_short(value)}")
    text = str(value)
    if data.answer_after in BOX:
        boxed = last_boxed(text)
        if boxed is None:
            raise InputError(
                f"{where}: {data.answer!r} has no balanced \\boxed{{}} (data.answer_after): {_short(value)}"
            )
        text = boxed
    elif data.answer_after is not None:
        _, mark, text = text.rpartition(data.answer_after)
        if not mark:
            raise InputError(
                f"{where}: {data.answer!r} has no {data.answer_after!r} (data.answer_after): {_short(value)}"
            )
    return text.strip()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- token ids ----


_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}


class _Encoder:
    """Rows to problems by one tokenizer; counts what it could not spell."""

    def __init__(self, data: Source, tokenizer: Any, notes: list[str]) -> None:
        self.data, self.tokenizer, self.notes = data, tokenizer, notes
        self.unknown_in = 0
        if data.format not in ("chat", "plain"):
            raise InputError(f"data.format is {data.format!r}, expected 'chat' or 'plain'")
        if data.format == "plain" and data.system is not None:
            raise InputError("data.system is a message of a chat: set data.format to 'chat'")
        self.chat = data.format == "chat" and bool(getattr(tokenizer, "chat_template", None))
        if data.format == "chat" and not self.chat:
            notes.append("the tokenizer has no chat template: prompts are given as plain text")
        self.switches = dict(data.template or {})
        unknown = [name for name in self.switches if name not in self._known_switches()]
        if unknown:
            known = ", ".join(map(repr, self._known_switches())) or "none"
            raise InputError(
                f"data.template sets {unknown[0]!r}, which the model's chat template does not use "
                f"(its switches: {known}); leave it out"
            )

    def _known_switches(self) -> list[str]:
        """What a chat template asks for besides the messages and special tokens."""
        if not self.chat:
            return []
        from jinja2 import Environment, meta

        text = self.tokenizer.get_chat_template()
        text = re.sub(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}", "", text)  # a tag of transformers' own
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        asked = meta.find_undeclared_variables(environment.parse(text)) - set(environment.globals)
        return sorted(name for name in asked - _GIVEN if not name.endswith("_token"))

    def __call__(self, rows: Sequence[_Row]) -> list[Problem]:
        """In one batch: one by one takes five times as long."""
        texts = self._render(rows) if self.chat else [self._plain(row) for row in rows]
        ids = self._encode(texts)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None:
            self.unknown_in += sum(unknown in one for one in ids)
        return [
            Problem(row.id, text, tuple(one), row.answer, row.fields)
            for row, text, one in zip(rows, texts, ids, strict=True)
        ]

    def say_unknown(self) -> None:
        if self.unknown_in:
            self.notes.append(
                f"{self.unknown_in} prompts have characters that the tokenizer does not know "
                f"and gives as {self.tokenizer.unk_token!r}"
            )

    def _messages(self, row: _Row) -> list[Message]:
        question = row.question
        messages = (
            [{"role": "user", "content": question}]
            if isinstance(question, str)
            else [dict(message) for message in question]
        )
        if self.data.suffix:
            messages[-1]["content"] += self.data.suffix
        if self.data.system is not None:
            if messages[0]["role"] == "system":
                raise InputError(f"{row.where}: the prompt has a system message, and data.system is set too")
            messages.insert(0, {"role": "system", "content": self.data.system})
        return messages

    def _render(self, rows: Sequence[_Row]) -> list[str]:
        from jinja2.exceptions import TemplateError

        def template(some: Sequence[_Row]) -> list[str]:
            chats = [self._messages(row) for row in some]
            return list(
                self.tokenizer.apply_chat_template(
                    chats, tokenize=False, add_generation_prompt=True, **self.switches
                )
            )

        try:
            return template(rows) if rows else []
        except TemplateError:  # some templates refuse a system message, or an order of roles
            for row in rows:
                try:
                    template([row])
                except TemplateError as error:
                    raise InputError(
                        f"{row.where}: the chat template refuses this prompt: {error}"
                    ) from error
            raise

    def _plain(self, row: _Row) -> str:
        if self.data.format == "plain" and not isinstance(row.question, str):
            raise InputError(f"{row.where}: a prompt of messages needs data.format = 'chat'")
        return "\n\n".join(message["content"] for message in self._messages(row))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """A template wrote its own special tokens; plain text gets a BOS if it has none."""
        tokenizer = self.tokenizer
        bos, eos, eos_id = tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id
        complete = [self.chat or bool(bos and text.startswith(bos)) for text in texts]
        ids: list[list[int]] = [[] for _ in texts]
        for whole in (True, False):
            at = [index for index, is_whole in enumerate(complete) if is_whole is whole]
            if at:
                batch = tokenizer([texts[index] for index in at], add_special_tokens=not whole)
                for index, one in zip(at, batch["input_ids"], strict=True):
                    ids[index] = list(one)
        for text, one in zip(texts, ids, strict=True):
            if not self.chat and eos and one[-1:] == [eos_id] and not text.rstrip().endswith(eos):
                one.pop()  # some tokenizers close every text; a prompt is to be continued
        return ids


# ---- the order of problems ----


@lru_cache(maxsize=4)
def order(n: int, *key: int) -> tuple[int, ...]:
    """The permutation of n things with this key: stable across machines and numpy versions."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return tuple(np.argsort(raw, kind="stable").tolist())


def draw(n: int, seed: int, start: int, count: int) -> list[int]:
    """The indices at positions `start` to `start + count` of the endless row of epochs.

    A run that has drawn k problems goes on with start = k.
    """
    if n < 1:
        raise ValueError("there are no problems to draw from")
    return [order(n, seed, at // n)[at % n] for at in range(start, start + count)]
