"""The loop in one process: recipes on random models of their shape, groups, refills, the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from frugal_rl import checkpoint
from frugal_rl import train as loop
from frugal_rl.config import Recipe, load_recipe
from frugal_rl.errors import FrugalError, InputError
from frugal_rl.journal import Journal
from frugal_rl.patch import Patch
from frugal_rl.reward import Judgement, Verdict
from frugal_rl.session import open_session
from frugal_rl.update import learn, learn_within_memory
from frugal_rl.weights import bits_of

from .conftest import make_config, make_model, save_folder

QUIET = loop.Reporter(lambda text: None, lambda row: None)
SMALL = ["rollout.prompts=4", "rollout.samples=4", "data.heldout=8", "train.steps=2", "rollout.max_tokens=24"]
# hidden, intermediate, heads, KV heads, tied: the models' own config.json
SHAPES = {
    "gsm8k-qwen2.5-0.5b": (896, 4864, 14, 2, True),
    "gsm8k-qwen2.5-1.5b": (1536, 8960, 12, 2, True),
    "math-qwen2.5-7b-24gib": (3584, 18944, 28, 4, False),
}


@contextmanager
def session_of(recipe: Recipe) -> Iterator[loop.Session]:
    with open_session(recipe, QUIET, device=torch.device("cpu")) as session:
        yield session


@pytest.fixture
def tiny() -> Iterator[loop.Session]:
    with session_of(load_recipe("tiny", SMALL)) as session:
        yield session


def groups_of(session: loop.Session, rewards: Callable[[int], float], start: int = 0) -> list[loop.Group]:
    """Real rollouts with made rewards: `rewards(i)` is what sample i of each group earns."""
    problems = session.problems.train[start : start + session.recipe.rollout.prompts]
    groups = loop._generate(session, problems, start, loop._Clock(session.peaks))
    out = []
    for group in groups:
        paid = [rewards(i) for i in range(len(group.rollouts))]
        verdicts = [Judgement(Verdict.CORRECT if x else Verdict.WRONG, x, 0.0) for x in paid]
        out.append(replace(group, rewards=paid, judgements=verdicts))
    return out


def snapshot(session: loop.Session) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in session.policy.weights.tensors.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(bits_of(a[k]), bits_of(b[k])) for k in a)


@pytest.mark.parametrize("name", SHAPES)
def test_a_recipes_first_step_runs_on_its_architecture_cut_to_two_layers(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    hidden, intermediate, heads, kv_heads, tied = SHAPES[name]
    vocabulary = json.loads((tiny_folder / "config.json").read_text())["vocab_size"]
    config = make_config(
        "qwen2",
        tied=tied,
        layers=2,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
    )
    config.eos_token_id = json.loads((tiny_folder / "config.json").read_text())["eos_token_id"]
    model = save_folder(make_model(config, dtype=torch.bfloat16), tmp_path / "model", tiny_folder)
    rows = {
        "gsm8k": {
            "question": "Ann has {} eggs and eats 2. How many are left?",
            "answer": "she has...\n#### {}",
        },
        "math": {"prompt": "What is {} - 2?", "label": "{}"},
    }[name.partition("-")[0]]
    for file, numbers in (("train", range(3, 40)), ("heldout", range(40, 44))):
        lines = [
            json.dumps({k: v.format(n if k in ("question", "prompt") else n - 2) for k, v in rows.items()})
            for n in numbers
        ]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    original = load_recipe(name)
    recipe = load_recipe(
        name,
        [
            f"model.name={model}",
            f"data.source={tmp_path / 'train.jsonl'}",
            f"data.heldout={tmp_path / 'heldout.jsonl'}",
            "rollout.prompts=2",
            "rollout.samples=2",
            "rollout.max_tokens=6",
            'memory.budget="16GiB"',
        ],
    )
    assert (recipe.learner, recipe.loss) == (original.learner, original.loss)
    with session_of(recipe) as session:
        before = snapshot(session)
        step = learn(session.learner, session.recipe, groups_of(session, lambda i: float(i % 2)))
        assert step is not None and step.commit.dropped is None
        assert step.commit.entries > 0
        assert not same_bits(before, session.policy.weights.tensors)
        assert step.stats["sampler_gap_max"] < 1e-3


def test_the_recipes_name_these_architectures() -> None:
    names = {name: load_recipe(name).model.name for name in SHAPES}
    assert ["Qwen/Qwen2.5-0.5B" in names["gsm8k-qwen2.5-0.5b"], "1.5B" in names["gsm8k-qwen2.5-1.5b"]] == [
        True
    ] * 2
    assert "7B" in names["math-qwen2.5-7b-24gib"]


def test_groups_without_signal_change_nothing_and_cost_no_step(tiny: loop.Session) -> None:
    before = snapshot(tiny)
    assert learn(tiny.learner, tiny.recipe, groups_of(tiny, lambda i: 1.0)) is None
    assert same_bits(before, tiny.policy.weights.tensors)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce++"])
def test_every_algorithm_raises_what_was_rewarded(algorithm: str) -> None:
    recipe = load_recipe("tiny", [*SMALL, f"loss.algorithm={algorithm}"])
    with session_of(recipe) as session:
        groups = groups_of(session, lambda i: float(i == 0))
        good = [g.rollouts[0] for g in groups]
        before = session.learner.log_probs(good).sum()
        step = learn(session.learner, session.recipe, groups)
        assert step is not None
        assert float(session.learner.log_probs(good).sum()) > float(before)


def test_leaving_out_groups_without_signal_gives_the_same_step_as_keeping_them(tiny: loop.Session) -> None:
    """Against a KL weight so small that it adds nothing but keeps every row in the batch."""
    mixed = groups_of(tiny, lambda i: float(i == 0))
    flat = [replace(g, rewards=[0.0] * 4) for g in mixed[:2]]
    left_out = learn(tiny.learner, tiny.recipe, [*flat, *mixed[2:]])
    recipe = load_recipe("tiny", [*SMALL, "loss.kl=1e-30"])
    with session_of(recipe) as session:
        kept = learn(session.learner, session.recipe, [*flat, *mixed[2:]])
        assert left_out is not None and kept is not None
        assert left_out.commit.norm == pytest.approx(kept.commit.norm, rel=1e-5)
        assert left_out.loss == pytest.approx(kept.loss, abs=1e-6)


def test_the_reference_is_the_base_at_no_memory(tmp_path: Path) -> None:
    with session_of(load_recipe("tiny", [*SMALL, "loss.kl=0.1", "loss.max_gap=1"])) as session:
        groups = groups_of(session, lambda i: float(i == 0))
        rollouts = groups[0].rollouts
        reference = session.learner.log_probs(rollouts)
        first = learn(session.learner, session.recipe, groups)
        second = learn(session.learner, session.recipe, groups)
        assert first is not None and second is not None
        assert first.stats["kl"] == 0.0  # the policy is the base
        assert second.stats["kl"] > 0.0
        moved = session.learner.log_probs(rollouts)
        assert not torch.equal(moved, reference)
        with session.policy.weights.base():
            assert torch.equal(session.learner.log_probs(rollouts), reference)
        assert torch.equal(session.learner.log_probs(rollouts), moved)


def test_kl_pulls_towards_the_base() -> None:
    gaps = {}
    for kl in ("0.0", "5.0"):
        with session_of(load_recipe("tiny", [*SMALL, f"loss.kl={kl}", "loss.max_gap=9"])) as session:
            groups = groups_of(session, lambda i: float(i == 0))
            rollouts = [r for g in groups for r in g.rollouts]
            reference = session.learner.log_probs(rollouts)
            for _ in range(4):
                learn(session.learner, session.recipe, groups)
            gaps[kl] = float((session.learner.log_probs(rollouts) - reference).square().mean())
    assert gaps["5.0"] < 0.5 * gaps["0.0"]


def test_dapo_refills_groups_without_signal_and_counts_what_it_sampled(tiny: loop.Session) -> None:
    recipe = load_recipe("tiny", [*SMALL, "loss.algorithm=dapo"])
    with session_of(recipe) as session:
        groups, drawn, sampled = loop._sample_groups(session, 0, loop._Clock(session.peaks))
        assert len(groups) == 4
        assert all(g.has_signal for g in groups)
        assert drawn == sampled >= 4
    plain, drawn, sampled = loop._sample_groups(tiny, 0, loop._Clock(tiny.peaks))
    assert (len(plain), drawn, sampled) == (4, 4, 4)


def test_dapo_takes_off_for_length_near_the_limit(tiny: loop.Session) -> None:
    recipe = load_recipe("tiny", ["loss.algorithm=dapo", "rollout.max_tokens=50"])
    rollout = groups_of(tiny, lambda i: 1.0)[0].rollouts[0]
    judged = Judgement(Verdict.CORRECT, 1.0, 0.0)
    # the buffer is a fifth: 10 tokens; 45 tokens are half-way into it
    long = replace(rollout, response_ids=rollout.response_ids.repeat(50)[:45])
    assert loop._paid(recipe, long, judged) == pytest.approx(0.5)
    assert loop._paid(recipe, replace(long, response_ids=long.response_ids[:40]), judged) == 1.0
    assert loop._paid(load_recipe("tiny"), long, judged) == 1.0


def test_each_draw_of_a_problem_has_its_own_random_numbers(tiny: loop.Session) -> None:
    problem = [tiny.problems.train[0]]
    texts = []
    for drawn in (0, 20_000, 0):
        group = loop._generate(tiny, problem, drawn, loop._Clock(tiny.peaks))[0]
        texts.append([r.response_ids.tolist() for r in group.rollouts])
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]


def test_a_truncated_response_is_marked_and_treated_as_the_recipe_says() -> None:
    short = [*SMALL, "rollout.max_tokens=3", "reward.kind=tags(x) + 0.5 * overlong(0, 1)"]
    verdicts = {}
    for truncated in ("judge", "no_answer"):
        with session_of(load_recipe("tiny", [*short, f"rollout.truncated={truncated}"])) as session:
            groups = loop._generate(session, session.problems.train[:4], 0, loop._Clock(session.peaks))
        ended = session.policy.stop_ids
        rollouts = [r for group in groups for r in group.rollouts]
        marked = [r.truncated for r in rollouts]
        assert marked == [int(r.response_ids[-1]) not in ended for r in rollouts] and any(marked)
        judged = [one for group in groups for one in group.judgements]
        verdicts[truncated] = [
            (one.verdict, one.reward) for one, cut in zip(judged, marked, strict=True) if cut
        ]
    assert {one for one, _ in verdicts["judge"]} == {Verdict.WRONG}
    assert set(verdicts["no_answer"]) == {(Verdict.NO_ANSWER, 0.0)}
    assert all(paid == -0.5 for _, paid in verdicts["judge"])


def test_a_step_that_is_dropped_is_said_and_journalled(tiny: loop.Session, tmp_path: Path) -> None:
    said: list[str] = []
    report = loop.Reporter(said.append, lambda row: None)
    groups = groups_of(tiny, lambda i: float(i == 0))
    name = tiny.policy.decoder.norm_name
    tiny.policy.weights.tensors[name][3] = float("inf")  # from here on nothing is finite
    before = snapshot(tiny)
    row = {"dropped": "the gradient's norm is nan", "gradient_norm": None}
    loop._say_still(tiny, 1, row, report)
    assert "dropped" in said[0] and "too small" not in said[0]
    step = learn(tiny.learner, tiny.recipe, groups)
    assert step is not None and step.commit.dropped is not None
    assert same_bits(before, tiny.policy.weights.tensors)


def test_steps_without_signal_say_so_once_with_the_verdicts(tmp_path: Path) -> None:
    said: list[str] = []
    changes = [*SMALL, "rollout.max_tokens=1", "reward.kind=numeric", "train.steps=3"]  # one token: all wrong
    with session_of(load_recipe("tiny", changes)) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        loop.train(session, journal, loop.Reporter(said.append, lambda row: None), lambda: False)
    told = [text for text in said if "learned nothing" in text]
    assert len(told) == 1
    assert told[0].startswith("step 1 ") and " no_answer" in told[0]


def test_a_reward_that_fails_stops_the_run_and_shows_the_answer_before_anything_is_learned(
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("def judge(problem, response):\n    return {}[len(response)]\n")
    changes = [*SMALL, f"reward.kind={mine}:judge", "train.steps=1"]
    with session_of(load_recipe("tiny", changes)) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        with pytest.raises(FrugalError, match=r"failed on (\d+) of \1 answers\. .*KeyError.*the answer was"):
            loop.train(session, journal, loop.Reporter(lambda text: None, lambda row: None), lambda: False)
        assert journal.step == 0


def test_every_part_of_a_summed_reward_is_in_the_metrics(tmp_path: Path) -> None:
    changes = [*SMALL, "reward.kind=last + 0.1*overlong(0, 100)", "train.steps=1"]
    with session_of(load_recipe("tiny", changes)) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        loop.train(session, journal, loop.Reporter(lambda text: None, lambda row: None), lambda: False)
    row = journal.metrics[0]
    assert row["reward"] == pytest.approx(row["reward/last"] + 0.1 * row["reward/overlong"])
    assert row["reward/overlong"] < 0


def test_out_of_memory_halves_the_micro_batch_and_leaves_nothing_of_the_failed_try(
    tiny: loop.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(tiny, lambda i: float(i == 0))
    before, micro_tokens = snapshot(tiny), tiny.learner.micro_tokens
    real, calls, said = type(tiny.learner)._backward, [0], []

    def backward(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] in (2, 4):  # in the middle of the first try, and of the second
            raise torch.OutOfMemoryError("made here")
        real(*arguments)

    monkeypatch.setattr(type(tiny.learner), "_backward", backward)
    step = learn_within_memory(tiny.learner, tiny.recipe, groups, said.append)
    assert step is not None and step.commit.entries > 0
    assert tiny.learner.micro_tokens == micro_tokens // 4
    assert [f"micro-batches of {micro_tokens // n} tokens" in said[i] for i, n in ((0, 2), (1, 4))] == [
        True
    ] * 2
    with session_of(tiny.recipe) as fresh:
        assert same_bits(snapshot(fresh), before)
        fresh.learner.micro_tokens = micro_tokens // 4
        learn(fresh.learner, fresh.recipe, groups)
        assert same_bits(snapshot(fresh), tiny.policy.weights.tensors)


def test_memory_that_never_suffices_ends_the_run_with_the_weights_as_they_were(
    tiny: loop.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, before = groups_of(tiny, lambda i: float(i == 0)), snapshot(tiny)

    def backward(*_: Any) -> None:
        raise torch.OutOfMemoryError("made here")

    monkeypatch.setattr(type(tiny.learner), "_backward", backward)
    with pytest.raises(FrugalError, match="out of memory with micro-batches"):
        learn_within_memory(tiny.learner, tiny.recipe, groups, QUIET.say)
    assert same_bits(before, tiny.policy.weights.tensors)


def test_a_resumed_run_keeps_its_slots_and_micro_batches(tiny: loop.Session, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    tiny.engine.slots, tiny.learner.micro_tokens = 3, 77
    loop._step(tiny, journal, 1, QUIET)
    with session_of(tiny.recipe) as fresh:
        again, _ = Journal.open(tmp_path / "run")
        loop.resume(fresh, again, QUIET)
        assert (fresh.engine.slots, fresh.learner.micro_tokens) == (3, 77)


def test_a_run_stops_early_when_no_evaluation_is_better(tmp_path: Path) -> None:
    changes = [*SMALL, "train.steps=9", "train.eval_every=1", "train.patience=2", "learner.lr=1e-4"]
    with session_of(load_recipe("tiny", changes)) as session:
        journal = Journal.create(tmp_path / "run", session.recipe, force=False)
        for step, value in ((0, 0.9), (1, 1.0), (2, 1.0), (3, 0.5)):
            journal.validate(step, {"value": value})
        summary = loop.train(session, journal, QUIET, lambda: False)
    # as if steps 2 and 3 had been evaluated before: the first own evaluation already ends it
    assert summary["steps"] == 1
    assert summary["best"] == {"step": 1, "accuracy": {"value": 1.0}}
    assert summary["accuracy_after"] == {"value": 1.0}


def test_a_step_is_in_the_journal_before_the_next_begins(tiny: loop.Session, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    row = loop._step(tiny, journal, 1, QUIET)
    assert journal.path(1).exists()
    assert row["changed_step"] > 0
    with session_of(tiny.recipe) as fresh:
        again, _ = Journal.open(tmp_path / "run")
        loop.resume(fresh, again, QUIET)
        assert same_bits(fresh.policy.weights.tensors, tiny.policy.weights.tensors)
        assert again.drawn == 4


def test_a_golds_reward_that_accepts_nothing_is_refused(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"{n}?", "answer": "no number"}) + "\n" for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = load_recipe(
        "tiny", [f"data.source={tmp_path / 'rows.jsonl'}", "data.heldout=5", "reward.kind=numeric"]
    )
    with pytest.raises(InputError, match="right reward"), session_of(recipe):
        pass


def test_metrics_hold_no_number_that_json_cannot(tiny: loop.Session, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    row: dict[str, Any] = loop._step(tiny, journal, 1, QUIET)
    assert json.loads(json.dumps(row, allow_nan=False)) == row


INT8 = [*SMALL, "model.weights=int8"]


def whole_and_halves(
    recipe: Recipe, tmp_path: Path
) -> tuple[list[bytes], list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """Patch files, summaries and last weights of a run of two steps, and of one stopped between them."""
    patches, summaries, policies = [], [], []
    for name, stops in (("whole", [False]), ("halves", [True, False])):
        folder = tmp_path / name
        for part, stop in enumerate(stops):
            with session_of(recipe) as session:
                if part:
                    journal, _ = Journal.open(folder)
                    loop.resume(session, journal, QUIET)
                else:
                    journal = Journal.create(folder, recipe, force=False)
                summary = loop.train(session, journal, QUIET, lambda stop=stop: stop)
                if stop:
                    assert summary["steps"] == 1
                    assert summary["accuracy_exported"] is None
                policy = snapshot(session)
        patches.append((folder / "patch.safetensors").read_bytes())
        summaries.append(summary)
        policies.append(policy)
    return patches, summaries, policies


def test_an_int8_run_that_is_resumed_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    patches, summaries, policies = whole_and_halves(load_recipe("tiny", INT8), tmp_path)
    assert same_bits(*policies)
    assert patches[0] == patches[1]
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "halves")]
    assert samples[0] == samples[1] != ""
    assert summaries[0]["steps"] == 2
    assert summaries[0]["accuracy_exported"]["problems"] == 8
    assert 0 < summaries[0]["export_lost"] < summaries[0]["changed_any"]


def test_an_int8_runs_patch_is_for_the_checkpoint_and_scores_there_what_the_summary_says(
    tmp_path: Path, tiny_folder: Path
) -> None:
    recipe = load_recipe("tiny", INT8)
    with session_of(recipe) as session:
        journal = Journal.create(tmp_path / "run", recipe, force=False)
        summary = loop.train(session, journal, QUIET, lambda: False)
        learned = snapshot(session)
    patch = Patch.load(tmp_path / "run" / "patch.safetensors")
    assert checkpoint.verify(tiny_folder, patch).state == "base"
    assert patch.meta["metrics"]["export_lost"] == summary["export_lost"]
    assert sum(map(len, patch.tensors.values())) == summary["changed_any"] - summary["export_lost"]
    with session_of(load_recipe("tiny", SMALL)) as session:
        session.policy.weights.write_patch_(patch)
        assert loop._heldout(session).score.value == summary["accuracy_exported"]["value"]
        gap = max(float((learned[k] - v).abs().max()) for k, v in snapshot(session).items())
        assert 0 < gap < 0.02  # half a step of the coarsest row


def test_a_bf16_runs_summary_says_nothing_of_an_export(tiny: loop.Session, tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    summary = loop.train(tiny, journal, QUIET, lambda: True)
    assert not {"export_lost", "accuracy_exported"} & set(summary)


def test_the_reference_of_an_int8_policy_is_its_base() -> None:
    with session_of(load_recipe("tiny", [*INT8, "loss.kl=0.1", "loss.max_gap=1"])) as session:
        groups = groups_of(session, lambda i: float(i == 0))
        rollouts = groups[0].rollouts
        reference = session.learner.log_probs(rollouts)
        first = learn(session.learner, session.recipe, groups)
        assert first is not None and first.stats["kl"] == 0.0
        moved = session.learner.log_probs(rollouts)
        with session.policy.weights.base():
            assert torch.equal(session.learner.log_probs(rollouts), reference)
        assert not torch.equal(moved, reference)


def test_a_whole_checkpoint_that_does_not_fit_beside_the_policy_is_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, said = load_recipe("tiny", INT8), list[str]()
    with session_of(recipe) as session:
        journal = Journal.create(tmp_path / "run", recipe, force=False)
        small = replace(recipe, memory=replace(recipe.memory, budget="1MiB"))
        report = loop.Reporter(said.append, lambda row: None)
        summary = loop.train(replace(session, recipe=small), journal, report, lambda: False)
    assert summary["accuracy_exported"] is None
    assert summary["accuracy_after"] is not None
    assert any("does not fit" in line for line in said)


@pytest.mark.parametrize("correction", ["sparse-rl", "off"])
def test_compression_that_destroys_what_the_answers_need_is_said_and_one_that_does_not_is_not(
    tmp_path: Path, correction: str
) -> None:
    """A sum's terms are evicted before they are added at 16 entries; at 64 none is."""
    told = []
    for budget in (16, 64):
        said: list[str] = []
        changes = ["rollout.prompts=8", "rollout.kv_buffer=8", f"rollout.kv_budget={budget}", "train.steps=3"]
        changes += [f"loss.correction={correction}"] + ["loss.uncorrected=true"] * (correction == "off")
        with session_of(load_recipe("tiny", changes)) as session:
            journal = Journal.create(tmp_path / f"run{budget}", session.recipe, force=False)
            loop.train(session, journal, loop.Reporter(said.append, lambda row: None), lambda: False)
        told.append([text for text in said if "astray" in text])
        assert all("astray_share" in row for row in journal.metrics)
    assert len(told[0]) == 1 and "raise rollout.kv_budget above 16" in told[0][0]
    assert told[1] == []


def test_a_step_keeps_the_first_responses_of_two_problems_as_they_were_judged(
    tiny: loop.Session, tmp_path: Path
) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    groups, _, _ = loop._sample_groups(tiny, 0, loop._Clock(tiny.peaks))
    loop._step(tiny, journal, 1, QUIET)
    kept = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["problem"] for s in kept] == [g.problem.id for g in groups[:2]]
    for sample, group in zip(kept, groups, strict=False):
        assert sample["response"] == tiny.policy.text(group.rollouts[0].response_ids)
        assert (sample["verdict"], sample["reward"]) == (group.judgements[0].verdict.value, group.rewards[0])


def test_metrics_have_the_spread_of_rewards_lengths_and_each_phases_peak(
    tiny: loop.Session, tmp_path: Path
) -> None:
    journal = Journal.create(tmp_path / "run", tiny.recipe, force=False)
    groups, _, _ = loop._sample_groups(tiny, 0, loop._Clock(tiny.peaks))
    row = loop._step(tiny, journal, 1, QUIET)
    rewards = torch.tensor([x for g in groups for x in g.rewards])
    lengths = [len(r.response_ids) for g in groups for r in g.rollouts]
    ended = [len(r.response_ids) for g in groups for r in g.rollouts if not r.truncated]
    assert row["reward_std"] == pytest.approx(rewards.std().item(), rel=1e-5)
    assert (row["shortest_tokens"], row["longest_tokens"]) == (min(lengths), max(lengths))
    assert row["ended_tokens"] == pytest.approx(sum(ended) / len(ended))
    assert set(row["phase_peak_bytes"]) == {"generate", "verify", "learn"}
    known = [peak for peak in row["phase_peak_bytes"].values() if peak is not None]
    assert all(10 << 20 < peak <= row["peak_memory_bytes"] for peak in known)


def test_the_plan_and_the_environment_are_there_from_the_start(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", SMALL)
    with session_of(recipe) as session:
        journal = Journal.create(tmp_path / "run", recipe, force=False)
        with pytest.raises(KeyboardInterrupt):
            loop.train(session, journal, QUIET, _interrupt)
        assert not (tmp_path / "run" / "summary.json").exists()
        found = json.loads((tmp_path / "run" / "session.json").read_text())
        assert found["plan"] == session.plan.as_json()
        assert found["planned_memory_bytes"] - found["held_memory_bytes"] == session.plan.peak_bytes
        assert found["environment"]["packages"]["torch"] == torch.__version__


def _interrupt() -> bool:
    raise KeyboardInterrupt
