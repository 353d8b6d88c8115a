"""The learner against torch.optim.SGD on the whole batch."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from frugal_rl import learn
from frugal_rl.decoder import Decoder
from frugal_rl.learn import Learner, _accumulate_in_float32
from frugal_rl.memory import live_states
from frugal_rl.rollout import MicroBatch, Rollout, micro_batches
from frugal_rl.weights import Transaction, Weights

from .conftest import KINDS, make_decoder, make_rollouts, weights_of

TEMPERATURE = 0.7
# float32 sums in another order: relative to the weights, and relative to the update
WEIGHT_TOLERANCE, UPDATE_TOLERANCE = 1e-6, 2e-4


def slow_log_probs(model: Any, rollout: Rollout) -> Tensor:
    """One sequence at a time through transformers' own forward."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    logit_TV = model(ids).logits[0].float() / TEMPERATURE
    first = len(rollout.prompt_ids)
    logprob_TV = torch.log_softmax(logit_TV[first - 1 : -1], dim=-1)
    return logprob_TV.gather(1, ids[0, first:, None])[:, 0]


def sgd_step(model: Any, rollouts: list[Rollout], advantages: Tensor, lr: float, clip: float) -> Tensor:
    """The twin: one loss, one backward, clip_grad_norm_, SGD. Returns the norm."""
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    total = sum(-slow_log_probs(model, r).sum() * a for r, a in zip(rollouts, advantages, strict=True))
    (total / len(rollouts)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    return norm


def policy_gradient(advantages: Tensor) -> Any:
    return lambda logprob_BT: (-(logprob_BT.sum(1) * advantages).mean(), {})


def relative_errors(model: Any, decoder: Any, before: dict[str, Tensor]) -> tuple[float, float]:
    """Largest over the tensors: of the weights, and of the update."""
    weight = update = 0.0
    for name, tensor in decoder.weights.tensors.items():
        expected = model.state_dict()[name]
        error = (tensor - expected).norm()
        weight = max(weight, float(error / expected.norm()))
        update = max(update, float(error / (expected - before[name]).norm()))
    return weight, update


def test_below_float32_a_sum_over_micro_batches_rounds_no_product() -> None:
    """Against float64 products of the very slopes and states; the hidden state's gradient is autograd's."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.SiLU(), torch.nn.Linear(40, 8, bias=False))
    layer = layer.bfloat16()
    first, last = layer[0], layer[2]
    micro = [(torch.randn(3, 50, 24).bfloat16(), torch.randn(3, 50, 8).bfloat16()) for _ in range(6)]
    weight, bias = torch.zeros(40, 24).double(), torch.zeros(40).double()
    with _accumulate_in_float32([layer]) as total:
        for hidden, slope in micro:
            hidden.requires_grad_()
            middle = first(hidden)
            middle.retain_grad()
            last(layer[1](middle)).backward(slope)
            weight += middle.grad.flatten(0, 1).double().T @ hidden.detach().flatten(0, 1).double()
            bias += middle.grad.flatten(0, 1).double().sum(0)
        assert set(total) == {first.weight, first.bias, last.weight}
        assert all(sums.dtype == torch.float32 for sums in total.values())
        # 1.7e-3 where each micro-batch's product is rounded to bf16
        assert float((total[first.weight] - weight).norm() / weight.norm()) < 1e-6
        assert float((total[first.bias] - bias).norm() / bias.norm()) < 1e-6
    assert all(parameter.grad is None for parameter in layer.parameters())
    hidden, slope = micro[-1]
    twin = hidden.detach().clone().requires_grad_()
    layer(twin).backward(slope)  # the modules' own forward again
    assert "forward" not in vars(first)
    assert torch.equal(twin.grad, hidden.grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [1e9, 2.0])
def test_a_step_is_full_batch_sgd_with_clipping(kind: str, tied: bool, clip: float) -> None:
    model, decoder = make_decoder(kind, tied=tied)
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    rollouts, advantages = make_rollouts(13), torch.randn(13, generator=torch.Generator().manual_seed(1))
    learner = Learner(decoder, 0.1, clip, TEMPERATURE, micro_tokens=100)
    step = learner.step(rollouts, policy_gradient(advantages))
    norm = sgd_step(model, rollouts, advantages, 0.1, clip)
    assert step.commit.norm == pytest.approx(float(norm), rel=1e-5)
    assert (step.commit.scale < 1) == (clip == 2.0)
    weight, update = relative_errors(model, decoder, before)
    assert weight < WEIGHT_TOLERANCE
    assert update < UPDATE_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_tokens", [10_000, 70])
def test_responses_behind_one_prompt_are_learned_as_if_each_stood_alone(
    kind: str, micro_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "pair_cost", 0.0)
    model, decoder = make_decoder(kind)
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    rollouts, advantages = make_groups(3, 5), torch.randn(15, generator=torch.Generator().manual_seed(1))
    learner = Learner(decoder, 0.1, 2.0, TEMPERATURE, micro_tokens=micro_tokens)
    logprob_BT = learner.log_probs(rollouts)
    with torch.no_grad():
        for row, rollout in enumerate(rollouts):
            slow_T = slow_log_probs(model, rollout)
            torch.testing.assert_close(logprob_BT[row, : len(slow_T)], slow_T, rtol=0, atol=2e-6)
    step = learner.step(rollouts, policy_gradient(advantages))
    norm = sgd_step(model, rollouts, advantages, 0.1, 2.0)
    assert step.commit.norm == pytest.approx(float(norm), rel=1e-5)
    weight, update = relative_errors(model, decoder, before)
    assert weight < WEIGHT_TOLERANCE
    assert update < UPDATE_TOLERANCE


@pytest.mark.parametrize("micro_tokens,count", [(10_000, 1), (140, 2), (36, 7)])
def test_the_number_of_micro_batches_changes_nothing(micro_tokens: int, count: int) -> None:
    model, decoder = make_decoder("qwen2")
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    rollouts, advantages = make_rollouts(13), torch.linspace(-1, 1, 13)
    assert len(micro_batches(rollouts, micro_tokens, 0.0)) == count
    Learner(decoder, 0.1, 1.0, TEMPERATURE, micro_tokens).step(rollouts, policy_gradient(advantages))
    sgd_step(model, rollouts, advantages, 0.1, 1.0)
    weight, update = relative_errors(model, decoder, before)
    assert weight < WEIGHT_TOLERANCE
    assert update < UPDATE_TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_the_heads_blocks_changes_nothing(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 rows of the head at a time, the last 12, and 64 tokens."""
    monkeypatch.setattr("frugal_rl.decoder.HEAD_BLOCK_BYTES", 13 * 64 * 4)
    model, decoder = make_decoder("qwen2", tied=tied)
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    rollouts, advantages = make_rollouts(13), torch.linspace(-1, 1, 13)
    assert [a for a, _ in decoder.head_blocks()] == [0, 13, 26, 39, 52, 65, 78]
    # some of the text's tokens are the first rows of blocks
    assert {26, 39, 52} & {int(t) for r in rollouts for t in [*r.prompt_ids, *r.response_ids]}
    assert sum(len(r.response_ids) for r in rollouts) > 2 * 64
    learner = Learner(decoder, 0.1, 1.0, TEMPERATURE, 140)
    logprob_BT = learner.log_probs(rollouts)
    for row, rollout in enumerate(rollouts):
        slow_T = slow_log_probs(model, rollout).detach()
        torch.testing.assert_close(logprob_BT[row, : len(slow_T)], slow_T, rtol=0, atol=2e-6)
    learner.step(rollouts, policy_gradient(advantages))
    sgd_step(model, rollouts, advantages, 0.1, 1.0)
    weight, update = relative_errors(model, decoder, before)
    assert weight < WEIGHT_TOLERANCE
    assert update < UPDATE_TOLERANCE


def test_in_bf16_the_changed_entries_are_those_of_sgd_in_float32_rounded_once() -> None:
    model, decoder = make_decoder("llama", dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    twin = model.float()
    rollouts, advantages = make_rollouts(13), torch.linspace(-1, 1, 13)
    step = Learner(decoder, 0.01, 1.0, TEMPERATURE, 100).step(rollouts, policy_gradient(advantages))
    sgd_step(twin, rollouts, advantages, 0.01, 1.0)
    ties = changed = 0
    for name, tensor in decoder.weights.tensors.items():
        expected = twin.state_dict()[name].to(torch.bfloat16)
        changed += int((expected != before[name]).sum())
        ties += int((expected != tensor).sum())
    assert step.commit.entries == pytest.approx(changed, abs=ties)
    assert changed > 1000
    # a float32 difference of 1e-7 decides a tie between two bf16 neighbours for about 1 entry in 1e4
    assert ties <= changed * 1e-3


def test_in_bf16_arithmetic_no_gradient_is_summed_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over micro-batches; the last norm's is computed apart from the layers'."""
    model, _ = make_decoder("qwen3", dtype=torch.bfloat16, tied=False)
    weights = Weights(weights_of(model).tensors, compute_dtype=torch.bfloat16)
    proposed: dict[str, Tensor] = {}

    def note(transaction: Transaction, name: str, gradient: Tensor, **_: Any) -> None:
        proposed[name] = gradient
        propose(transaction, name, gradient, **_)

    propose = Transaction.propose
    monkeypatch.setattr(Transaction, "propose", note)
    learner = Learner(Decoder(model.config, weights), 0.1, 1.0, 1.0, 40)
    learner.step(make_rollouts(13), policy_gradient(torch.linspace(-1, 1, 13)))
    assert proposed.keys() == weights.held.keys()
    for name, gradient in proposed.items():
        assert gradient.dtype == torch.float32
        # a sum in bf16, or of one micro-batch alone, would be a bf16 number everywhere
        assert bool((gradient != gradient.bfloat16().float()).any()), name


def test_log_probs_are_those_of_one_sequence_at_a_time() -> None:
    model, decoder = make_decoder("qwen3", tied=False)
    rollouts = make_rollouts(9)
    logprob_BT = Learner(decoder, 0.1, 1.0, TEMPERATURE, 50).log_probs(rollouts)
    for i, rollout in enumerate(rollouts):
        count = len(rollout.response_ids)
        torch.testing.assert_close(logprob_BT[i, :count], slow_log_probs(model, rollout).detach())
        assert not logprob_BT[i, count:].any()


def test_entropy_is_the_mean_over_response_tokens() -> None:
    model, decoder = make_decoder("llama")
    rollouts = make_rollouts(3)
    step = Learner(decoder, 1e-9, 1.0, TEMPERATURE, 1000).step(rollouts, policy_gradient(torch.ones(3)))
    entropies = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
        logit_TV = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].detach() / TEMPERATURE
        entropies.append(torch.distributions.Categorical(logits=logit_TV).entropy())
    assert step.entropy == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(bad: float) -> None:
    _, decoder = make_decoder("qwen2")
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}
    step = Learner(decoder, 0.1, 1.0, 1.0, 100).step(
        make_rollouts(3), lambda logprob_BT: (logprob_BT.sum() * bad, {})
    )
    assert step.commit.dropped is not None and "loss" in step.commit.dropped
    assert all(torch.equal(before[k], v) for k, v in decoder.weights.tensors.items())


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were() -> None:
    _, decoder = make_decoder("qwen2")
    before = {k: v.clone() for k, v in decoder.weights.tensors.items()}

    def loss(logprob_BT: Tensor) -> tuple[Tensor, dict[str, float]]:
        # finite, but sqrt has an infinite slope at 0
        return (logprob_BT - logprob_BT.detach()).clamp(min=0).sqrt().sum(), {}

    step = Learner(decoder, 0.1, 1.0, 1.0, 100).step(make_rollouts(3), loss)
    assert step.commit.dropped is not None and "norm" in step.commit.dropped
    assert all(torch.equal(before[k], v) for k, v in decoder.weights.tensors.items())


def test_keeping_states_on_the_host_changes_nothing() -> None:
    results = []
    for on_host in (False, True):
        _, decoder = make_decoder("qwen2")
        learner = Learner(decoder, 0.1, 1.0, 1.0, 100, boundary_on_host=on_host)
        learner.step(make_rollouts(7), policy_gradient(torch.linspace(-1, 1, 7)))
        results.append(decoder.weights.tensors)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("every", [1, 2])
def test_keeping_states_on_the_host_of_a_gpu_changes_nothing(every: int) -> None:
    results = []
    for on_host in (False, True):
        model, _ = make_decoder("qwen2", dtype=torch.bfloat16, layers=4)
        tensors = {k: v.cuda() for k, v in weights_of(model).tensors.items()}
        decoder = Decoder(model.config, Weights(tensors))
        learner = Learner(decoder, 0.1, 1.0, 1.0, 100, boundary_every=every, boundary_on_host=on_host)
        learner.step(make_rollouts(40), policy_gradient(torch.linspace(-1, 1, 40, device="cuda")))
        results.append(decoder.weights.tensors)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_attention_gets_no_mask_so_that_it_may_be_a_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right-padded, a response each: causal attention is all they need. A mask would rule flash out."""
    functional = torch.nn.functional
    attend, seen = functional.scaled_dot_product_attention, []

    def note(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append(options)
        return attend(*tensors, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", note)
    _, decoder = make_decoder("qwen2")
    Learner(decoder, 0.1, 1.0, 1.0, 60).step(make_rollouts(9), policy_gradient(torch.ones(9)))
    assert seen and all(o["is_causal"] and o.get("attn_mask") is None for o in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_attention_is_a_flash_kernel_and_two_steps_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learn, "BACKENDS", [SDPBackend.FLASH_ATTENTION])
    results = []
    for _ in range(2):
        model, _ = make_decoder("qwen2", dtype=torch.bfloat16, layers=4)
        tensors = {k: v.cuda() for k, v in weights_of(model).tensors.items()}
        decoder = Decoder(model.config, Weights(tensors))
        step = Learner(decoder, 0.1, 1.0, 1.0, 100).step(
            make_rollouts(40), policy_gradient(torch.linspace(-1, 1, 40, device="cuda"))
        )
        assert step.commit.entries
        results.append(decoder.weights.tensors)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("every,together", [(2, 1), (3, 1), (5, 1), (9, 1), (2, 2), (3, 3), (5, 2), (9, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_every_kth_boundary_and_going_backward_together_change_no_bit(
    every: int, together: int, dtype: torch.dtype
) -> None:
    norms, results = [], []
    for k, j in ((1, 1), (every, together)):
        _, decoder = make_decoder("qwen2", dtype=dtype, layers=7)
        learner = Learner(
            decoder, 0.1, 1.0, 1.0, 60, boundary_every=k, boundary_on_host=k == 3, layers_together=j
        )
        step = learner.step(make_rollouts(9), policy_gradient(torch.linspace(-1, 1, 9)))
        assert step.commit.entries > 1000
        norms.append(step.commit.norm)
        results.append(decoder.weights.tensors)
    assert norms[0] == norms[1]
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize(
    "every,together", [(1, 1), (2, 1), (3, 1), (4, 1), (7, 1), (9, 1), (2, 2), (3, 3), (5, 2), (4, 3), (7, 7)]
)
def test_the_hidden_states_alive_are_those_that_the_plan_counts(
    every: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    counts = []
    away = Learner._away

    def note(learner: Learner, state: Tensor) -> Tensor:
        kept = away(learner, state)
        alive.append(weakref.ref(kept))
        return kept

    def counted(name: str) -> None:
        real = getattr(Learner, name)

        def count(*arguments: Any) -> Any:
            counts.append(sum(ref() is not None for ref in alive))
            return real(*arguments)

        monkeypatch.setattr(Learner, name, count)

    monkeypatch.setattr(Learner, "_away", note)
    for name in ("_through", "_norm_backward", "_backward"):
        counted(name)
    _, decoder = make_decoder("llama", layers=7)
    # one micro-batch: a hidden state of the whole batch is one tensor
    learner = Learner(decoder, 0.1, 1.0, 1.0, 10_000, boundary_every=every, layers_together=together)
    learner.step(make_rollouts(4), policy_gradient(torch.ones(4)))
    assert max(counts) == live_states(7, every, together)


def test_two_runs_of_a_step_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        _, decoder = make_decoder("mistral", dtype=torch.bfloat16)
        Learner(decoder, 0.05, 1.0, 1.0, 90).step(
            make_rollouts(11), policy_gradient(torch.linspace(-1, 1, 11))
        )
        results.append(decoder.weights.tensors)
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_a_layer_without_its_weights_cannot_be_read() -> None:
    _, decoder = make_decoder("qwen2")
    hidden = torch.zeros(1, 2, 64)
    arguments = decoder.arguments(hidden)
    with decoder.layer(0) as layer:
        layer(hidden, **arguments[0])
    # the meta device holds no numbers, so nothing stale can come out
    assert decoder.layers[0](hidden.to("meta"), **_to_meta(arguments[0])).is_meta


def _to_meta(arguments: dict[str, Any]) -> dict[str, Any]:
    pair = arguments["position_embeddings"]
    return {**arguments, "position_embeddings": tuple(t.to("meta") for t in pair)}


def make_groups(groups: int, samples: int, seed: int = 0) -> list[Rollout]:
    """Ragged responses, several to each prompt, in an order that mixes the prompts."""
    prompts = [r.prompt_ids for r in make_rollouts(groups, seed)]
    answers = make_rollouts(groups * samples, seed + 1)
    return [replace(r, prompt_ids=prompts[i % groups]) for i, r in enumerate(answers)]


def check_micro_batch(batch: MicroBatch, rollouts: list[Rollout]) -> None:
    """Every state that predicts sees its own sequence so far, at its own places, and nothing else."""
    shape = batch.token_BT.shape
    segment_BT = np.ones(shape, int) if batch.segment_BT is None else batch.segment_BT
    position_BT = (
        np.tile(np.arange(shape[1]), (shape[0], 1)) if batch.position_BT is None else batch.position_BT
    )
    shared = batch.segment_BT is not None
    n = 0
    for rollout in (rollouts[row] for row in batch.row_R):
        ids = [*rollout.prompt_ids, *rollout.response_ids.tolist()]
        for t in range(len(rollout.prompt_ids), len(ids)):
            b, place = divmod(int(batch.place_N[n]), shape[1])
            own = (0, segment_BT[b, place])
            seen = [c for c in range(place + 1) if not shared or segment_BT[b, c] in own]
            assert batch.token_BT[b, seen].tolist() == ids[:t]
            assert position_BT[b, seen].tolist() == list(range(t))
            assert batch.target_N[n] == ids[t]
            n += 1
    assert n == len(batch.place_N) == len(batch.target_N)
    assert [i for turn in batch.turns for i in range(turn.start, turn.stop)] == list(range(n))
    assert all(len(set(batch.place_N[turn])) == turn.stop - turn.start for turn in batch.turns)


@pytest.mark.parametrize("pair_cost", [0.0, 0.02, 10.0])
@pytest.mark.parametrize("budget", [60, 120, 10_000])
def test_micro_batches_hold_every_rollout_once_within_the_budget_widest_first(
    budget: int, pair_cost: float
) -> None:
    rollouts = make_groups(6, 7)
    batches = micro_batches(rollouts, budget, pair_cost)
    assert sorted(int(r) for b in batches for r in b.row_R) == list(range(42))
    widths = [b.token_BT.shape[1] for b in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(b.token_BT.size <= budget for b in batches)
    for batch in batches:
        check_micro_batch(batch, rollouts)


def test_responses_share_their_prompt_where_that_saves_work() -> None:
    rollouts = make_groups(6, 7)
    rows = {c: sum(len(b.token_BT) for b in micro_batches(rollouts, 10_000, c)) for c in (0.0, 0.02, 10.0)}
    assert rows[0.0] == 6
    assert 6 < rows[0.02] < 42
    assert rows[0.02] < rows[10.0] <= 42


def test_a_shared_row_grows_while_it_is_cheaper_than_the_sequences_by_themselves() -> None:
    """Prompt 10, responses of 1 + 6: beside w tokens another costs 6 + c (12 w + 36), alone 16 + 128 c."""
    rollouts = [replace(r, prompt_ids=tuple(range(10))) for r in make_rollouts(9, longest=1)]
    rollouts = [replace(r, response_ids=np.arange(7)) for r in rollouts]
    # six responses take 46 tokens; the seventh goes there while 6 + c (12 * 46 + 36) < 16 + 128 c
    for cost, members in ((10 / 460 - 1e-6, 7), (10 / 460 + 1e-6, 6)):
        (batch,) = micro_batches(rollouts, 10_000, cost)
        assert batch.token_BT.shape[1] == 10 + 6 * members


def test_a_sequence_longer_than_the_budget_still_goes_alone() -> None:
    batches = micro_batches(make_rollouts(4), 1, 0.0)
    assert [len(b.row_R) for b in batches] == [1, 1, 1, 1]
