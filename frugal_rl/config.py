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
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from frugal_rl.arms import check_learner
from frugal_rl.errors import InputError
from frugal_rl.rewards.kinds import read_kind
from frugal_rl.sources import is_source
from frugal_rl.values import Range, expected, fit, parse_bytes, toml_value, words
from frugal_rl.values import show as _show

Text = Annotated[str, Range(at_least=1)]
Count = Annotated[int, Range(at_least=1)]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(above=0, at_most=1)]
Texts = tuple[Text, ...]  # a list in TOML
Switches = Mapping[Text, bool | int | float | str]  # a table in TOML


@dataclass(frozen=True)
class Model:
    name: Text  # "tiny" (embedded), a local folder, or a hub name
    # bf16: as the checkpoint has them; int8: its matrices frozen in one byte an entry; host: as int8 for the
    # sampler, the checkpoint itself for the learner, streamed from host memory
    weights: Literal["bf16", "int8", "host"] = "bf16"
    reference: Text = "base"  # the policy with its patch taken off, or another model: a folder or hub name


@dataclass(frozen=True)
class Data:
    source: Text  # rows (.jsonl, .parquet, hub:owner/name/config:split), a built-in task, or gym:NAME
    prompt: Text = "prompt"  # the field of a row that holds the prompt; outer.inner of a nested one
    answer: Text = "answer"  # the field that holds the answer
    answer_after: Text | None = None  # the answer is what follows the last of these marks, or in \\boxed
    heldout: Count | Text = 500  # so many problems kept from training, or other rows
    system: str | None = None  # the chat's system message
    suffix: str | None = None  # appended to every prompt
    format: Literal["chat", "plain"] = "chat"  # through the chat template, or as it stands
    template: Switches | None = None  # of the chat template, such as {enable_thinking = false}
    max_prompt_tokens: Count = 512  # longer prompts are left out
    solve_samples: Count | None = None  # answers of the base to each training problem, to leave out those ...
    solve_above: Annotated[float, Range(at_least=0, below=1)] = 0.0  # ... not solved in more than this share
    solve_below: Share = 1.0  # ... or not in less than this: by default the never and the always solved


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
    # a response cut off at max_tokens is judged as any other; is no answer, paid 0; or is judged, not learned
    truncated: Literal["judge", "no_answer", "mask"] = "judge"
    kv_budget: Count | None = None  # entries that stay when a slot's KV cache is full; absent: nothing leaves
    kv_buffer: Count | None = None  # entries of a slot besides those; absent: 128
    eviction: Literal["rkv", "snapkv", "h2o", "streaming", "none"] | None = None  # absent: rkv
    # engine: the policy's own weights; llama.cpp: a GGUF of them, its touched blocks written after each step
    generator: Literal["engine", "llama.cpp"] = "engine"
    gguf: Literal["q8_0", "bf16", "f16"] | None = None  # the format of that copy; absent: q8_0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def gguf_format(self) -> str | None:
        """Of llama.cpp's copy of the weights; None where there is none."""
        return None if self.generator == "engine" else self.gguf or "q8_0"

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
        "auto",  # off where the sampler is the learner; sparse-rl with a kv_budget, else tis
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
    kind: Literal["sgd", "sgd-momentum", "adamw", "adamw8bit", "lora"] = "sgd"  # the others: arms.py
    clip: Positive = 1.0  # of the global gradient norm
    momentum: Annotated[float, Range(at_least=0, at_most=0.9999)] | None = None  # sgd-momentum's; absent: 0.9
    rank: Count | None = None  # of lora's adapters; absent: 16
    alpha: Positive | None = None  # lora's updates are scaled by alpha / rank; absent: 32
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
    budget: Text | None = None  # such as "22GiB"; absent: most of what the device has

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

    int8 weights: both read the same. host weights: the sampler reads an int8 copy; llama.cpp: a GGUF.
    """
    engine = recipe.rollout.generator == "engine"
    return whole_tokens(recipe) is None and recipe.model.weights != "host" and engine


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
WITHOUT_RATIO = frozenset({"rloo"})  # REINFORCE itself: right for one step of each rollout batch only
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
        wanted = "expected section.key=value, such as learner.lr=0.1"
        hint = "" if dot else _owner(section)
        raise InputError(f"{where}: {wanted}{hint}")
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
                    f"{where}: [{name}] {field.name} is missing: expected {expected(hint)}; "
                    f"write it there or say --set {name}.{field.name}=..."
                )
            continue
        value = table[field.name]
        try:
            values[field.name] = fit(value, hint)
        except ValueError as error:
            at = sources.get((name, field.name), where)
            near = _nearest(value, words(hint)) if isinstance(value, str) else ""
            raise InputError(
                f"{at}: [{name}] {field.name}: got {_show(value)}{near}; expected {expected(hint)}"
            ) from error
    return kind(**values)


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
        if rollout.generator != "engine":
            cause = f"[rollout] generator = {_show(rollout.generator)}"
        raise InputError(
            f'{where}: [loss] correction = "off" with {cause}: the sampler is another policy than the '
            "learner, and training on its rollouts as if they were the learner's own can collapse (arXiv "
            "2601.10079); leave correction out, or say uncorrected = true to train so all the same"
        )
    learner = recipe.learner
    check_learner(learner.kind, recipe.model.weights, learner.momentum, learner.rank, learner.alpha, where)
    if recipe.learner.minibatches > rollout.prompts:
        raise InputError(
            f"{where}: [learner] minibatches = {recipe.learner.minibatches} with [rollout] prompts = "
            f"{rollout.prompts}: a minibatch is whole groups; expected at most one for each prompt"
        )
    several = max(learner.minibatches, learner.epochs)
    if several > 1 and recipe.loss.algorithm in WITHOUT_RATIO:
        name = "minibatches" if learner.minibatches > 1 else "epochs"
        raise InputError(
            f"{where}: [learner] {name} = {getattr(learner, name)} with [loss] algorithm = "
            f"{_show(recipe.loss.algorithm)}, which has no ratio to the policy that sampled: after the first "
            f'step its gradient is wrong; leave {name} out, or take algorithm = "grpo"'
        )
    if rollout.truncated == "mask" and loss.kl:
        raise InputError(
            f'{where}: [rollout] truncated = "mask" with [loss] kl = {loss.kl:g}: every response has a '
            'KL; leave one of them out, or say truncated = "no_answer"'
        )
    check_compression(rollout, where)
    if rollout.generator == "engine" and rollout.gguf is not None:
        raise InputError(
            f'{where}: [rollout] gguf = {_show(rollout.gguf)} with generator = "engine", which has no copy '
            'of the weights; leave gguf out, or say generator = "llama.cpp"'
        )
    if rollout.generator == "llama.cpp" and learner.kind == "lora":
        raise InputError(
            f'{where}: [learner] kind = "lora" with generator = "llama.cpp", whose copy of the weights has '
            'no adapters; say generator = "engine"'
        )
    if rollout.generator == "llama.cpp" and rollout.compression is not None:
        raise InputError(
            f'{where}: [rollout] kv_budget = {rollout.kv_budget} with generator = "llama.cpp", whose cache '
            'evicts nothing; leave kv_budget out, or say generator = "engine"'
        )
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
    if data.format == "plain" and data.template is not None:
        raise InputError(f'{where}: [data] template with format = "plain", which has none; leave it out')
    if data.solve_samples is None and (data.solve_above, data.solve_below) != (0.0, 1.0):
        raise InputError(
            f"{where}: [data] solve_above or solve_below without solve_samples: say how many answers to each "
            "problem the share is measured on, such as solve_samples = 8"
        )
    if data.solve_above >= data.solve_below:
        raise InputError(
            f"{where}: [data] solve_above = {data.solve_above:g} is not below solve_below = "
            f"{data.solve_below:g}: no share is between them"
        )
    if isinstance(data.heldout, str) and not is_source(data.heldout):
        raise InputError(
            f"{where}: [data] heldout: got {_show(data.heldout)}; "
            "expected a number of problems such as 500, or rows: .jsonl, .parquet or hub:NAME"
        )
    if not is_source(data.source):
        fixed = {"prompt": "prompt", "answer": "answer", "answer_after": None}
        mapped = [key for key, value in fixed.items() if getattr(data, key) != value]
        mapped += ["heldout"] if isinstance(data.heldout, str) else []
        if mapped:
            raise InputError(
                f"{where}: [data] {', '.join(mapped)} with source = {_show(data.source)}: "
                "this is for rows (.jsonl, .parquet, hub:NAME), and what is none is a built-in task, which "
                "has its own fields and held-out set; leave out what was named"
            )
    try:
        read_kind(recipe.reward.kind)
    except InputError as error:
        raise InputError(f"{where}: [reward] kind: {error}") from error
    try:
        recipe.memory.budget_bytes  # noqa: B018 (parsed here so that a bad size is refused early)
    except InputError as error:
        raise InputError(f"{where}: [memory] budget: {error}") from error
