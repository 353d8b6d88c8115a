"""Which problems a run learns from: those whose gold verifies and that the base solves sometimes.

    share = correct / judged,  of `data.solve_samples` answers of the base at the run's own sampling settings
    kept if  data.solve_above < share < data.solve_below

Answers to one prompt that are all right, or all wrong, have no advantage (loss.py): a problem that the
base never or always solves costs a group's rollouts and teaches nothing, at least at first.

Invariants
- An unknown is not a 0: an answer whose verification timed out or failed is not among the judged ones,
  and a problem without any judged answer is kept.
- Every problem is measured once. Its counts are a line of a file in the cache folder, $XDG_CACHE_HOME or
  ~/.cache, that is named by a hash of all they depend on (the weights' bits and form, sampling settings,
  KV cache, reward and the source of what judges); a line is named by a hash of the prompt's tokens,
  the answer and the row. So a changed row is measured anew, and only that.
- Lines are appended, synced, a chunk of problems at a time: what was measured before an interruption
  stays; a torn last line is none.
- An answer's random numbers are a function of the problem's hash: order and other problems change nothing.
- What a run measured, it keeps in its folder (`problems.json`) and reads from there when it goes on, so
  the kept set is the same with another cache or none. The file also holds a hash of all problems of the
  run: one that goes on with other rows is refused.

Source: filtering by the pass rate of the starting policy, as in PrimeIntellect-ai/prime-rl and LLM360's
Reasoning360 (model_filtering/, which keeps per-batch files for resuming). DAPO's dynamic sampling (arXiv
2503.14476) does the same per step, at the price of sampling the useless groups each time.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .checkpoint import base_info
from .config import Recipe
from .errors import InputError
from .generate.sample import Sampler, Truncation
from .patch import sync_folder
from .policy import Policy
from .problems import LeftOut, Problem, ProblemSet
from .reward import Verdict, Verifier, refuse_errors
from .rewards.kinds import read_kind
from .rollout import Request

DIFFICULTY = 4  # first word of the random keys; training, evaluation and minibatches have their own
SHOWN = 5  # problems left out that are named on the screen
CHUNK_ROUNDS = 8  # fillings of the engine's slots between two lines of progress

Solved = dict[str, tuple[int, int]]  # correct and judged answers, by the problem's hash
Say = Callable[[str], None]


# ---- golds


def drop_bad_golds(problems: ProblemSet, verifier: Verifier, say: Say) -> ProblemSet:
    """Leave out problems whose gold answer the verifier does not accept for itself, and say which."""
    kept, left_out = [], list(problems.left_out)
    for name, rows in (("training", problems.train), ("held-out", problems.heldout)):
        bad = verifier.check_golds(rows)
        left_out += [LeftOut(p.id, name, f"gold not verifiable: {why}", p.answer) for p, why in bad]
        if bad:
            lines = [f"  {p.id}  {p.answer[:60]!r} ({why})" for p, why in bad[:SHOWN]]
            more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
            head = f"{len(bad)} of {len(rows)} {name} problems left out, gold not verifiable:"
            say("\n".join([head, *lines, *more]))
        ids = {problem.id for problem, _ in bad}
        kept.append([p for p in rows if p.id not in ids])
        if rows and not kept[-1]:
            raise InputError(
                f"reward {verifier.kind!r} accepts none of the {name} golds for itself: "
                "is it the right reward for this data?"
            )
    return replace(problems, train=kept[0], heldout=kept[1], left_out=left_out)


# ---- difficulty


@dataclass(frozen=True)
class Base:
    """What is measured: the policy as it starts, and how it is sampled and judged."""

    recipe: Recipe
    policy: Policy
    engine: Sampler
    verifier: Verifier
    truncation: Truncation

    @property
    def samples(self) -> int:
        """Answers to each problem."""
        return self.recipe.data.solve_samples or 0


def drop_never_and_always_solved(
    problems: ProblemSet, base: Base, say: Say, known: Mapping[str, tuple[int, int]]
) -> ProblemSet:
    """The training problems whose share of solved answers is in the recipe's limits.

    `known`: counts that a run measured before. Raises InputError if no problem is left, FrugalError if the
    reward fails.
    """
    solved: Solved = {}
    if any(key_of(problem) not in known for problem in problems.train):
        cache = cache_file(base)
        solved = _read(cache)
        missing = [p for p in problems.train if key_of(p) not in known and key_of(p) not in solved]
        if missing:
            _measure(missing, base, cache, solved, say)
    solved.update(known)
    low, high = base.recipe.data.solve_above, base.recipe.data.solve_below
    kept, left_out, counts = [], list(problems.left_out), Counter[str]()
    mine = {key: solved[key] for key in map(key_of, problems.train)}
    for problem in problems.train:
        correct, judged = mine[key_of(problem)]
        if not judged or low < correct / judged < high:
            kept.append(problem)
            continue
        counts["rarely" if correct / judged <= low else "mostly"] += 1
        left_out.append(
            LeftOut(problem.id, "training", f"the base solved {correct} of {judged} samples", problem.answer)
        )
    rarely, mostly = (
        "never" if low == 0 else f"in at most {low:.0%}",
        "always" if high == 1 else f"in at least {high:.0%}",
    )
    say(
        f"difficulty, {base.samples} answers of the base to each of {len(mine)} training problems: "
        f"{counts['rarely']} solved {rarely} and {counts['mostly']} {mostly} left out, {len(kept)} kept"
    )
    if not kept:
        raise InputError(
            f"no training problem is left: {counts['rarely']} are solved {rarely} and {counts['mostly']} "
            f"{mostly} in {base.samples} samples; take other problems, more data.solve_samples or wider "
            "limits (data.solve_above, data.solve_below)"
        )
    return replace(problems, train=kept, left_out=left_out, solved=mine)


def _measure(problems: Sequence[Problem], base: Base, cache: Path, solved: Solved, say: Say) -> None:
    """Count, a chunk at a time, into `solved` and the cache."""
    say(
        f"difficulty: {base.samples} answers of the base to each of {len(problems)} training problems, once; "
        f"an interrupted measurement goes on from {cache}"
    )
    size, began = max(1, CHUNK_ROUNDS * base.engine.slots // base.samples), time.perf_counter()
    for start in range(0, len(problems), size):
        chunk = problems[start : start + size]
        counts = _count(chunk, base)
        _append(cache, counts)
        solved.update(counts)
        done = start + len(chunk)
        if done < len(problems):
            left_s = (time.perf_counter() - began) / done * (len(problems) - done)
            left = f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min"
            say(f"difficulty: {done} of {len(problems)} problems measured, {left} left")


def _count(problems: Sequence[Problem], base: Base) -> Solved:
    keys, rollout = [key_of(problem) for problem in problems], base.recipe.rollout
    requests = [
        Request(problem.prompt_ids, (DIFFICULTY, int(key[:8], 16), int(key[8:16], 16), sample))
        for problem, key in zip(problems, keys, strict=True)
        for sample in range(base.samples)
    ]
    stream = base.engine.generate(
        requests,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        truncation=base.truncation,
    )
    asked = []
    for index, answer in stream:
        at = index // base.samples
        text = base.policy.text(answer.response_ids)
        asked.append((at, text, base.verifier.submit(problems[at], text)))
    judged = [(at, text, future.result()) for at, text, future in asked]
    refuse_errors([(problems[at], text, judgement) for at, text, judgement in judged])
    correct = Counter(at for at, _, one in judged if one.verdict is Verdict.CORRECT)
    known = Counter(at for at, _, one in judged if one.verdict not in (Verdict.ERROR, Verdict.TIMEOUT))
    return {key: (correct[at], known[at]) for at, key in enumerate(keys)}


# ---- the cache


def key_of(problem: Problem) -> str:
    """A hash of what is asked and of what is right."""
    text = json.dumps([problem.prompt_ids, problem.answer, problem.row], sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=12).hexdigest()


def cache_file(base: Base) -> Path:
    """Where the counts of this policy, sampling and reward are."""
    recipe, policy = base.recipe, base.policy
    info = policy.weights.base_info
    depends = {
        "weights": (info.fingerprint if info else None) or base_info(policy.files.folder).fingerprint,
        "form": recipe.model.weights,
        "stop": sorted(policy.stop_ids),
        "rollout": {k: v for k, v in asdict(recipe.rollout).items() if k not in ("prompts", "samples")},
        "samples": base.samples,
        "reward": recipe.reward.kind,
        "verifier": _verifier_text(recipe.reward.kind),
    }
    digest = blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=12).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "frugal_rl" / "difficulty" / f"{digest}.jsonl"


def _verifier_text(kind: str) -> list[str]:
    """The source of what judges: the built-in rewards', and files of a user's own."""
    own = [(part.function or "").rpartition(":")[0] for part in read_kind(kind)]
    built_in = sorted((Path(__file__).parent / "rewards").glob("*.py"))
    files = [*built_in, *(Path(name) for name in own if name.endswith(".py"))]
    return [blake2b(path.read_bytes(), digest_size=12).hexdigest() for path in files]


def _read(path: Path) -> Solved:
    solved: Solved = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            key, correct, judged = json.loads(line)
        except (ValueError, TypeError):  # the line that was being written when a run was cut off
            continue
        solved[key] = (correct, judged)
    return solved


def _append(path: Path, counts: Solved) -> None:
    """Durable when it returns. A torn line before is closed, so that it spoils no line of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps([key, *count]) + "\n" for key, count in counts.items())
    with open(path, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write((("\n" if torn else "") + lines).encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


# ---- what the run folder keeps


def run_files(problems: ProblemSet) -> dict[str, bytes]:
    """`problems.json`, and `left_out.jsonl` with a line for each problem that was left out."""
    about = {
        "train": len(problems.train),
        "heldout": len(problems.heldout),
        "fingerprint": fingerprint(problems),
        "solved": problems.solved,
    }
    files = {"problems.json": (json.dumps(about) + "\n").encode()}
    if problems.left_out:
        lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in problems.left_out]
        files["left_out.jsonl"] = "".join(lines).encode()
    return files


def fingerprint(problems: ProblemSet) -> str:
    """A hash of all problems in their order."""
    sides = [[[p.id, key_of(p)] for p in side] for side in (problems.train, problems.heldout)]
    return blake2b(json.dumps(sides).encode(), digest_size=16).hexdigest()


def read_run_file(folder: Path) -> dict[str, Any]:
    """`problems.json` of a run; {} for a run of a version that had none. Raises: InputError."""
    path = folder / "problems.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def check_unchanged(problems: ProblemSet, about: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where a run would go on with other problems than it began with."""
    if about and about["fingerprint"] != fingerprint(problems):
        raise InputError(
            f"{folder}: its problems were {about['train']} for training and {about['heldout']} held out, now "
            f"there are {len(problems.train)} and {len(problems.heldout)}, or others: rows, tokenizer or "
            "reward have changed, and the run would not go on as it was; put them back or begin anew"
        )
