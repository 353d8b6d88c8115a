"""A recipe: one TOML file and `--set section.key=value`, read once into frozen dataclasses.

The dataclasses below are the specification. A section is a dataclass, a key is a field, its type
hint is what the key accepts (`Literal`: these words; `Annotated[..., Range]`: within these limits),
its default is the value when the key is absent, and a field without default must be given. Reading,
the error messages and `to_toml` all follow from the hints, so a new key is one line.

Invariants:
- A key exists only if it does something. An unknown section or key, a wrong type, a number out of
  range and a pair of keys that contradict each other are all refused before a model is loaded; the
  error names the file or override, the key, what was got and what was expected.
- An integer is accepted where a float is expected; a boolean is never a number; infinities and NaN
  are refused.
- `read_recipe(recipe.to_toml()) == recipe`, and equal recipes are equal text.
- Paths are meant as the shell means them: relative to where the command runs, not to where the
  recipe lies.

Only `load_recipe` and `read_recipe` validate: a Recipe built by hand in Python is taken as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from frugal_rl.errors import InputError
from frugal_rl.rewards.kinds import read_kind


@dataclass(frozen=True)
class Range:
    """Limits of a number's value, or of a text's length in characters."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None

    def holds(self, size: float) -> bool:
        return (
            (self.at_least is None or size >= self.at_least)
            and (self.above is None or size > self.above)
            and (self.at_most is None or size <= self.at_most)
        )

    def __str__(self) -> str:
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)


Text = Annotated[str, Range(at_least=1)]
Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(above=0, at_most=1)]
Texts = tuple[Text, ...]  # a list in TOML


@dataclass(frozen=True)
class Model:
    name: Text  # "tiny" (embedded), a local folder, or a hub name
    # bf16: as the checkpoint has them; int8: its matrices frozen in one byte an entry; host: as int8 for the
    # sampler, the checkpoint itself for the learner, streamed from host memory
    weights: Literal["bf16", "int8", "host"] = "bf16"
    reference: Text = "base"  # the policy with its patch taken off, or another model: a folder or hub name


@dataclass(frozen=True)
class Data:
    source: Text  # a path ending in .jsonl, or the name of a built-in task
    prompt: Text = "prompt"  # the field of a row that holds the prompt
    answer: Text = "answer"  # the field that holds the answer
    answer_after: Text | None = None  # the answer is what follows the last of these marks
    heldout: Count | Text = 500  # so many problems kept from training, or another .jsonl file
    system: str | None = None  # the chat's system message
    suffix: str | None = None  # appended to every prompt
    format: Literal["chat", "plain"] = "chat"  # through the chat template, or as it stands
    max_prompt_tokens: Count = 512  # longer prompts are left out

    @property
    def is_file(self) -> bool:
        return self.source.endswith(".jsonl")


@dataclass(frozen=True)
class Reward:
    kind: Text  # a built-in reward, path.py:function, or a weighted sum: see rewards/kinds.py
    timeout_s: Positive = 5.0
    on_timeout: float = 0.0  # the reward of a response whose verification timed out
    on_error: float = 0.0  # and of one whose verification failed


@dataclass(frozen=True)
class Compression:
    """How a slot's KV cache is kept at `budget + buffer` entries."""

    method: Literal["rkv", "snapkv", "h2o", "streaming"]
    budget: int
    buffer: int

    @property
    def entries(self) -> int:
        return self.budget + self.buffer


@dataclass(frozen=True)
class Rollout:
    prompts: Count  # per step
    samples: Count  # responses to each prompt: the group
    max_tokens: Count  # of a response
    temperature: Positive = 1.0
    top_k: Count | None = None  # draw among the k likeliest tokens; absent: among all
    top_p: Share | None = None  # and among the likeliest that have this probability together
    min_p: Share | None = None  # and among those with this share of the likeliest one's probability
    stop: Text | Texts | None = None  # strings that end a response, besides the model's stop tokens
    kv_budget: Count | None = None  # entries that stay when a slot's KV cache is full; absent: nothing leaves
    kv_buffer: Count | None = None  # entries of a slot besides those; absent: 128
    eviction: Literal["rkv", "snapkv", "h2o", "streaming", "none"] | None = None  # absent: rkv
    generator: Literal["engine"] = "engine"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def compression(self) -> Compression | None:
        """None: the cache holds whole sequences."""
        if self.kv_budget is None or self.eviction == "none":
            return None
        return Compression(self.eviction or "rkv", self.kv_budget, self.kv_buffer or KV_BUFFER)


@dataclass(frozen=True)
class Loss:
    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "gspo", "cispo"] = "grpo"
    kl: NotNegative = 0.0  # weight of the KL to the reference; at 0 no reference is evaluated
    clip_low: Share | None = None  # the ratio's lower limit is 1 - clip_low; absent: the paper's
    clip_high: Positive | None = None  # the ratio's upper limit is 1 + clip_high; absent: the paper's
    correction: Literal[
        "auto",  # off where the sampler is the learner; sparse-rl with a kv_budget, tis with host weights
        "off",
        "sparse-rl",
        "tis",
        "mis",
        "icepop",
        "seq-tis",
        "seq-mis",
        "geo-rs",
        "geo-rs-token-tis",
    ] = "auto"
    uncorrected: bool = False  # true allows correction = "off" where the sampler's cache is compressed
    max_gap: Positive | None = None  # nats a token between sampler and learner; absent: by the arithmetic


@dataclass(frozen=True)
class Learner:
    lr: Positive
    kind: Literal["sgd"] = "sgd"
    clip: Positive = 1.0  # of the global gradient norm
    minibatches: Count = 1  # optimizer steps that a rollout batch is dealt to, each of whole groups
    epochs: Count = 1  # times that a rollout batch is gone through


@dataclass(frozen=True)
class Train:
    steps: Count
    seed: Seed = 0
    eval_every: Count | None = None  # steps; absent: only before the first and after the last
    patience: Count | None = None  # evaluations without a better one before it stops; absent: never
    log: Literal["tensorboard", "trackio", "wandb"] | None = None  # where metrics go besides the run folder


@dataclass(frozen=True)
class Memory:
    budget: Text | None = None  # such as "24GiB"; absent: what the device has

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget is None else parse_bytes(self.budget)


@dataclass(frozen=True)
class Recipe:
    model: Model
    data: Data
    reward: Reward
    rollout: Rollout
    loss: Loss
    learner: Learner
    train: Train
    memory: Memory

    def to_toml(self) -> str:
        """Every key that has a value, defaults included, in the order of the dataclasses."""
        blocks = []
        for section in dataclasses.fields(self):
            values = dataclasses.asdict(getattr(self, section.name))
            lines = [f"{key} = {toml_value(v)}" for key, v in values.items() if v is not None]
            blocks.append("\n".join([f"[{section.name}]", *lines]) + "\n")
        return "\n".join(blocks)


def whole_tokens(recipe: Recipe) -> int | None:
    """Tokens of context up to which the sampler sees all of it, as the learner does; None: however many."""
    compression = recipe.rollout.compression
    return compression.budget if compression else None


def sampler_is_learner(recipe: Recipe) -> bool:
    """Whether rollouts are drawn from the learner's own dense policy.

    int8 weights: both read the same. host weights: the sampler reads an int8 copy.
    """
    return whole_tokens(recipe) is None and recipe.model.weights != "host"


def correction_name(recipe: Recipe) -> str:
    """The preset of correct.PRESETS that `loss.correction` stands for."""
    if recipe.loss.correction != "auto":
        return recipe.loss.correction
    if sampler_is_learner(recipe):
        return "off"
    return "sparse-rl" if whole_tokens(recipe) is not None else "tis"


KV_BUFFER = 128  # entries: Sparse-RL compresses every 128 tokens
# entries: with fewer, the window of last queries (8) or the first entries (4) leave nothing to choose
LEAST_KV_BUDGET = {"rkv": 9, "snapkv": 9, "h2o": 2, "streaming": 5}
UNGROUPED = frozenset({"reinforce++"})  # baseline over the batch: a group of one is enough
UNCLIPPED = frozenset({"rloo"})  # no ratio to clip


def check_compression(rollout: Rollout, where: str) -> None:
    """Raises InputError where the keys of the KV cache contradict each other; `where` names their source."""
    if rollout.kv_budget is None:
        given = [k for k in ("kv_buffer", "eviction") if getattr(rollout, k) not in (None, "none")]
        if given:
            raise InputError(
                f"{where}: [rollout] {' and '.join(given)} without kv_budget: nothing is evicted where every "
                "entry stays; set rollout.kv_budget"
            )
    compression = rollout.compression
    if compression is not None and compression.budget < LEAST_KV_BUDGET[compression.method]:
        raise InputError(
            f"{where}: [rollout] kv_budget = {compression.budget} with eviction = "
            f"{_show(compression.method)}, which always keeps its window of last entries or its first ones; "
            f"expected a kv_budget of at least {LEAST_KV_BUDGET[compression.method]}"
        )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that .toml file, with `section.key=value` overrides in order.

    Raises: InputError.
    """
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
    else:
        names = _recipe_names()
        if name_or_path not in names:
            raise InputError(
                f"recipe {json.dumps(name_or_path)} is not known{_nearest(name_or_path, names)}; "
                f"expected one of {', '.join(names)}, or a path that ends in .toml"
            )
        path = _recipe_folder() / f"{name_or_path}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    return read_recipe(text, overrides, where=str(path))


def read_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """A Recipe from TOML text; `where` names the text in errors. Raises: InputError."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error
    sources: dict[tuple[str, str], str] = {}  # which override set a key: it is named in errors
    for name, table in tree.items():
        _check_section(name, where)
        if not isinstance(table, dict):
            raise InputError(f"{where}: {name} = {_show(table)}: {name} is a section, write [{name}]")
    for override in overrides:
        section, key, value = _parse_override(override)
        tree.setdefault(section, {})[key] = value
        sources[section, key] = f"--set {override}"
    sections = {
        name: _read_section(name, kind, tree.get(name, {}), sources, where)
        for name, kind in _hints(Recipe).items()
    }
    recipe = Recipe(**sections)
    _check_pairs(recipe, " ".join([where, *(f"--set {override}" for override in overrides)]))
    return recipe


def list_recipes() -> dict[str, str]:
    """The packaged recipes: name to header, the comment lines that open the file, without `#`."""
    headers = {}
    for name in _recipe_names():
        header = []
        for line in (_recipe_folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            header.append(line.removeprefix("#").removeprefix(" "))
        headers[name] = "\n".join(header)
    return headers


def parse_bytes(text: str) -> int:
    """ "24GiB", "1.5 GiB" or "512MiB" as bytes. Raises: InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text, re.ASCII)
    unit = match[2] if match else ""
    if match is None or unit not in ("GiB", "MiB"):
        hint = (
            f"; write {unit[0]}iB, which is 2**{30 if unit == 'GB' else 20} bytes"
            if unit in ("GB", "MB")
            else ""
        )
        raise InputError(f"{_show(text)} is not a size: expected such as 24GiB or 512MiB{hint}")
    size_bytes = int(float(match[1]) * (2**30 if unit == "GiB" else 2**20))
    if size_bytes == 0:
        raise InputError(f"{_show(text)} is no memory at all: expected such as 24GiB or 512MiB")
    return size_bytes


def toml_value(value: str | float | tuple[str, ...]) -> str:
    """A text, number, boolean or list as TOML: so `f"model.name={toml_value(name)}"` is a safe override."""
    if isinstance(value, tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's, but that TOML wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _recipe_folder() -> Path:
    """Beside the modules in an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in _recipe_folder().glob("*.toml"))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _parse_override(override: str) -> tuple[str, str, Any]:
    """`section.key=value`: the value as TOML if it is, else as a bare text."""
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not key:
        expected = "expected section.key=value, such as learner.lr=0.1"
        hint = "" if dot else _owner(section)
        raise InputError(f"{where}: {expected}{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where!r}: the value is not valid UTF-8: {error}") from error
    _check_section(section, where)
    _check_key(section, key, where)
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # not TOML: a bare text such as gsm8k/train.jsonl
        return section, key, text
    return section, key, parsed["value"] if parsed.keys() == {"value"} else text


def _read_section(
    name: str,
    kind: type,
    table: Mapping[str, Any],
    sources: Mapping[tuple[str, str], str],
    where: str,
) -> Any:
    for key in table:
        _check_key(name, key, where)
    values = {}
    for field in dataclasses.fields(kind):
        hint = _hints(kind)[field.name]
        if field.name not in table:
            if field.default is dataclasses.MISSING:
                raise InputError(
                    f"{where}: [{name}] {field.name} is missing: expected {_expected(hint)}; "
                    f"write it there or say --set {name}.{field.name}=..."
                )
            continue
        value = table[field.name]
        try:
            values[field.name] = _fit(value, hint)
        except ValueError as error:
            at = sources.get((name, field.name), where)
            near = _nearest(value, _words(hint)) if isinstance(value, str) else ""
            raise InputError(
                f"{at}: [{name}] {field.name}: got {_show(value)}{near}; expected {_expected(hint)}"
            ) from error
    return kind(**values)


def _fit(value: Any, hint: Any) -> Any:
    """`value` as a field of this hint holds it. Raises: ValueError where it does not fit."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _fit(value, option)
            except ValueError:  # perhaps the next option fits
                continue
    elif origin is Annotated:
        fitted = _fit(value, arguments[0])
        if arguments[1].holds(len(fitted) if isinstance(fitted, str) else fitted):
            return fitted
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is tuple:
        if isinstance(value, list) and value:
            return tuple(_fit(item, arguments[0]) for item in value)
    elif hint is float and type(value) in (int, float) and abs(value) < math.inf:
        try:
            return float(value)
        except OverflowError as error:  # an integer beyond any float
            raise ValueError(value) from error
    elif type(value) is hint and hint is not float:  # by identity: True is no int
        return value
    raise ValueError(value)


def _expected(hint: Any) -> str:
    """What a key accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(option) for option in arguments if option is not types.NoneType)
    if origin is Annotated:
        base, limits = arguments
        return "a text that is not empty" if base is str else f"{_expected(base)} {limits}"
    if origin is tuple:
        return f"a list of such, each {_expected(arguments[0])}"
    if origin is Literal:
        words = ", ".join(json.dumps(word) for word in arguments)
        return f"one of {words}" if len(arguments) > 1 else f"{words}, the only one supported"
    plain = {str: "a text", int: "an integer", float: "a finite number", bool: "true or false"}
    return plain[hint]


def _words(hint: Any) -> Sequence[str]:
    if get_origin(hint) in (Union, types.UnionType):
        return [word for option in get_args(hint) for word in _words(option)]
    return get_args(hint) if get_origin(hint) is Literal else ()


def _check_section(name: str, where: str) -> None:
    sections = list(_hints(Recipe))
    if name not in sections:
        raise InputError(
            f"{where}: there is no section {_show(name)}{_owner(name) or _nearest(name, sections)}"
            f"; expected one of {', '.join(sections)}"
        )


def _check_key(section: str, key: str, where: str) -> None:
    keys = list(_hints(_hints(Recipe)[section]))
    if key not in keys:
        raise InputError(
            f"{where}: [{section}] has no key {_show(key)}{_owner(key) or _nearest(key, keys)}; "
            f"expected one of {', '.join(keys)}"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {_show(close[0])}" if close else ""


def _owner(key: str) -> str:
    """Where a key stands that was looked for in the wrong place."""
    owners = [f"{name}.{key}" for name, kind in _hints(Recipe).items() if key in _hints(kind)]
    return f"; did you mean {' or '.join(owners)}?" if owners else ""


def _show(value: Any) -> str:
    """A value as it stands in TOML, as far as that is short."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = toml_value(value) if isinstance(value, str | int | float) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _check_pairs(recipe: Recipe, where: str) -> None:
    """Refuses what each key allows and their combination does not."""
    data, rollout, loss = recipe.data, recipe.rollout, recipe.loss
    algorithm = f"[loss] algorithm = {_show(loss.algorithm)}"
    if loss.algorithm not in UNGROUPED and rollout.samples < 2:
        raise InputError(
            f"{where}: [rollout] samples = {rollout.samples} with {algorithm}: it compares the "
            "responses to one prompt with each other, so expected samples of at least 2 "
            '(or algorithm = "reinforce++")'
        )
    if rollout.prompts * rollout.samples < 2:
        raise InputError(
            f"{where}: [rollout] prompts = 1 and samples = 1 with {algorithm}: one response has "
            "nothing to be compared with; expected prompts or samples of at least 2"
        )
    for key in ("clip_low", "clip_high"):
        if loss.algorithm in UNCLIPPED and getattr(loss, key) is not None:
            raise InputError(f"{where}: [loss] {key} with {algorithm}, which clips nothing; leave {key} out")
    if recipe.model.reference != "base" and not loss.kl:
        raise InputError(
            f"{where}: [model] reference = {_show(recipe.model.reference)} with [loss] kl = 0, which asks no "
            "reference; leave reference out or set loss.kl"
        )
    if loss.uncorrected and loss.correction != "off":
        raise InputError(
            f"{where}: [loss] uncorrected = true with correction = {_show(loss.correction)}: it allows "
            '"off" and nothing else; leave uncorrected out, or say correction = "off"'
        )
    if loss.correction == "off" and not loss.uncorrected and not sampler_is_learner(recipe):
        budget = whole_tokens(recipe)
        cause = f"[rollout] kv_budget = {budget}" if budget is not None else '[model] weights = "host"'
        raise InputError(
            f'{where}: [loss] correction = "off" with {cause}: the sampler is another policy than the '
            "learner, and training on its rollouts as if they were the learner's own can collapse (arXiv "
            "2601.10079); leave correction out, or say uncorrected = true to train so all the same"
        )
    if recipe.learner.minibatches > rollout.prompts:
        raise InputError(
            f"{where}: [learner] minibatches = {recipe.learner.minibatches} with [rollout] prompts = "
            f"{rollout.prompts}: a minibatch is whole groups; expected at most one for each prompt"
        )
    check_compression(rollout, where)
    if recipe.train.patience is not None and recipe.train.eval_every is None:
        raise InputError(
            f"{where}: [train] patience without eval_every: there is no evaluation to be patient with; "
            "set train.eval_every"
        )
    if data.format == "plain" and data.system is not None:
        raise InputError(
            f'{where}: [data] system with format = "plain", which has no system message; '
            'leave system out or say format = "chat"'
        )
    if isinstance(data.heldout, str) and not data.heldout.endswith(".jsonl"):
        raise InputError(
            f"{where}: [data] heldout: got {_show(data.heldout)}; "
            "expected a number of problems such as 500, or a path that ends in .jsonl"
        )
    if not data.is_file:
        fixed = {"prompt": "prompt", "answer": "answer", "answer_after": None}
        mapped = [key for key, value in fixed.items() if getattr(data, key) != value]
        mapped += ["heldout"] if isinstance(data.heldout, str) else []
        if mapped:
            raise InputError(
                f"{where}: [data] {', '.join(mapped)} with source = {_show(data.source)}: "
                "this is for a file, and what does not end in .jsonl is a built-in task, which has "
                "its own fields and held-out set; leave out what was named"
            )
    try:
        read_kind(recipe.reward.kind)
    except InputError as error:
        raise InputError(f"{where}: [reward] kind: {error}") from error
    try:
        recipe.memory.budget_bytes  # noqa: B018 (parsed here so that a bad size is refused early)
    except InputError as error:
        raise InputError(f"{where}: [memory] budget: {error}") from error
