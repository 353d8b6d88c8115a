"""Losses against hand-computed numbers, slow twins, finite differences and invariances.

Tolerances: float64 results of a few additions agree to 1e-12; advantages are float32 (1e-6).
"""

import math
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch

from frugal_rl import config
from frugal_rl.loss import (
    ALGORITHMS,
    advantages,
    advantages_with_kl,
    kl_k3,
    kl_loss,
    overlong_penalty,
    policy_loss,
)

NAMES = sorted(ALGORITHMS)
CLIPPING = ["grpo", "dr_grpo", "dapo", "reinforce++"]  # a token at a time
GROUPED = [name for name in NAMES if ALGORITHMS[name].advantage != "batch"]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def loss_of_ratios(name, ratio_BT, advantage_B, mask_BT, **more):
    """The loss where the old log-probabilities are 0, so that log-probabilities are log-ratios."""
    logprob_BT = tensor(ratio_BT).log().requires_grad_()
    mask_BT = torch.tensor(mask_BT, dtype=torch.bool)
    counts = {"sequences": len(mask_BT), "tokens": int(mask_BT.sum()), "max_tokens": 4}
    loss, stats = policy_loss(
        ALGORITHMS[name],
        logprob_BT,
        torch.zeros_like(logprob_BT),
        tensor(advantage_B),
        mask_BT,
        **(counts | more),
    )
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    return loss.item(), stats, gradient_BT


def random_batch(seed, rows=6, width=5):
    """Log-probabilities, old ones near enough that clips hold some and not all; lengths 0 to 5."""
    source = torch.Generator().manual_seed(seed)
    logprob_BT = -2 * torch.rand(rows, width, generator=source, dtype=torch.float64)
    old_BT = logprob_BT + 0.4 * torch.randn(rows, width, generator=source, dtype=torch.float64)
    advantage_B = torch.randn(rows, generator=source, dtype=torch.float64)
    length_B = torch.randint(0, width + 1, (rows,), generator=source)
    length_B[0] = width
    mask_BT = torch.arange(width) < length_B[:, None]
    return logprob_BT.requires_grad_(), old_BT, advantage_B, mask_BT


# Advantages

# Group 1: mean 1/4, squares of deviations 9/16 + 3/16 = 3/4, unbiased std sqrt(3/4 / 3) = 1/2.
# Group 2: mean 1/2, unbiased std sqrt(1 / 3).
REWARDS = [[1, 0, 0, 0], [1, 0, 0, 1]]
NORMALISED = [[1.5, -0.5, -0.5, -0.5], [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2]]
CENTRED = [[0.75, -0.25, -0.25, -0.25], [0.5, -0.5, -0.5, 0.5]]
LEAVE_ONE_OUT = [[1, -1 / 3, -1 / 3, -1 / 3], [2 / 3, -2 / 3, -2 / 3, 2 / 3]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", NORMALISED),
        ("dapo", NORMALISED),
        ("gspo", NORMALISED),
        ("cispo", NORMALISED),
        ("dr_grpo", CENTRED),
        ("rloo", LEAVE_ONE_OUT),
    ],
)
def test_group_advantages_are_the_ones_worked_out_by_hand(name, expected):
    got_NG = advantages(tensor(REWARDS), ALGORITHMS[name], torch.ones(2, 4))
    # 5e-6: the 1e-6 added to the std of 1/2
    torch.testing.assert_close(got_NG, torch.tensor(expected), atol=5e-6, rtol=0)
    assert got_NG.dtype == torch.float32


def test_reinforce_plus_plus_advantages_count_each_response_by_its_tokens():
    # Tokens: one of reward 1, three of reward 0. Mean 1/4, variance (9/16 + 3/16) / 4 = 3/16.
    # (1 - 1/4) / sqrt(3/16) = sqrt(3), (0 - 1/4) / sqrt(3/16) = -1 / sqrt(3).
    got_NG = advantages(tensor([[1, 0]]), ALGORITHMS["reinforce++"], torch.tensor([[1, 3]]))
    torch.testing.assert_close(got_NG, torch.tensor([[3**0.5, -(3**-0.5)]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(name, reward):
    # Three: (0.1 + 0.1 + 0.1) / 3 is not 0.1 in float64.
    rewards_NG = tensor([[reward] * 3, [1, 0, 0]])
    got_NG = advantages(rewards_NG, ALGORITHMS[name], torch.ones(2, 3))
    assert got_NG[0].tolist() == [0.0] * 3
    assert got_NG[1, 0] > 0.5


@pytest.mark.parametrize("reward", [1.0, 0.1])
def test_a_reinforce_plus_plus_batch_of_equal_rewards_has_advantages_of_exactly_zero(reward):
    rewards_NG = torch.full((1, 3), reward, dtype=torch.float64)
    got_NG = advantages(rewards_NG, ALGORITHMS["reinforce++"], torch.ones(1, 3))
    assert not got_NG.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_response_has_an_advantage_of_zero(name):
    assert advantages(torch.tensor([[1.0]]), ALGORITHMS[name], torch.tensor([[3]])).item() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_advantages_equal_a_slow_twin(name):
    source = torch.Generator().manual_seed(0)
    reward_NG = torch.rand(5, 4, generator=source, dtype=torch.float64)
    length_NG = torch.randint(1, 9, (5, 4), generator=source)
    expected = []
    tokens = [
        reward
        for rewards, lengths in zip(reward_NG.tolist(), length_NG.tolist(), strict=True)
        for reward, length in zip(rewards, lengths, strict=True)
        for _ in range(length)
    ]
    batch_mean = sum(tokens) / len(tokens)
    batch_std = (sum((t - batch_mean) ** 2 for t in tokens) / len(tokens)) ** 0.5
    for group in reward_NG.tolist():
        mean = sum(group) / 4
        std = (sum((r - mean) ** 2 for r in group) / 3) ** 0.5
        expected.append([])
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            expected[-1].append(
                {
                    "group_std": (reward - mean) / (std + 1e-6),
                    "group_mean": reward - mean,
                    "leave_one_out": reward - sum(others) / 3,
                    "batch": (reward - batch_mean) / batch_std,
                }[ALGORITHMS[name].advantage]
            )
    got_NG = advantages(reward_NG, ALGORITHMS[name], length_NG)
    torch.testing.assert_close(got_NG.double(), tensor(expected), atol=1e-6, rtol=0)


# KL in the reward


def test_reinforce_plus_plus_charges_a_token_with_the_kl_from_itself_to_the_end():
    # kl 1/2. Response 1, reward 1, gaps 1 and 2: 1 - 3/2 = -1/2 and 1 - 2/2 = 0.
    # Response 2, reward 0, one token of gap -1: 1/2. Mean 0, variance (1/4 + 0 + 1/4) / 3 = 1/6.
    reference_BT = tensor([[-2.0, -3], [-1, math.nan]])
    logprob_BT = reference_BT + tensor([[1.0, 2], [-1, 5]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    got_BT = advantages_with_kl(
        tensor([[1, 0]]), ALGORITHMS["reinforce++"], logprob_BT, reference_BT, mask_BT, 0.5
    )
    expected = torch.tensor([[-(6**0.5) / 2, 0], [6**0.5 / 2, 0]])
    torch.testing.assert_close(got_BT, expected, atol=1e-6, rtol=0)


def test_rloo_charges_a_response_with_its_whole_kl_before_the_baseline():
    # kl 1/2. Rewards 1 and 0, gaps 1 + 2 and -1: 1 - 3/2 = -1/2 and 0 + 1/2 = 1/2, so -1 and 1.
    reference_BT = tensor([[-2.0, -3], [-1, math.nan]])
    logprob_BT = reference_BT + tensor([[1.0, 2], [-1, 5]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    got_BT = advantages_with_kl(tensor([[1, 0]]), ALGORITHMS["rloo"], logprob_BT, reference_BT, mask_BT, 0.5)
    assert got_BT.tolist() == [[-1, -1], [1, 0]]


@pytest.mark.parametrize("name", ["rloo", "reinforce++"])
def test_without_kl_the_advantages_with_kl_are_the_advantages(name):
    logprob_BT, reference_BT, reward_B, mask_BT = random_batch(3)
    mask_BT[:, 0] = True  # a response has a token at least
    reward_NG = reward_B.view(2, 3)
    with_BT = advantages_with_kl(reward_NG, ALGORITHMS[name], logprob_BT, reference_BT, mask_BT, 0.0)
    plain_NG = advantages(reward_NG, ALGORITHMS[name], mask_BT.sum(1).view(2, 3))
    torch.testing.assert_close(with_BT, plain_NG.view(-1, 1) * mask_BT, atol=1e-6, rtol=0)
    assert not with_BT.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_kl_is_taken_either_in_the_loss_or_in_the_reward_and_never_in_both(name):
    logprob_BT, reference_BT, reward_B, mask_BT = random_batch(4)
    algorithm = ALGORITHMS[name]
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    if algorithm.kl == "reward":
        with pytest.raises(AssertionError, match="advantages_with_kl"):
            kl_loss(algorithm, logprob_BT, reference_BT, mask_BT, **counts)
    else:
        with pytest.raises(AssertionError, match="kl_loss"):
            advantages_with_kl(reward_B.view(2, 3), algorithm, logprob_BT, reference_BT, mask_BT, 0.1)


# Overlong shaping


def test_the_overlong_penalty_falls_in_a_line_from_the_buffer_to_the_limit():
    # DAPO's own numbers: at most 20480 tokens, of which the last 4096 are the buffer.
    lengths = [0, 16384, 16384 + 1024, 16384 + 2048, 20480, 30000]
    assert [overlong_penalty(n, 20480, 4096) for n in lengths] == [0, 0, -0.25, -0.5, -1, -1]


# The losses, worked out by hand.
#
# RATIOS: response 1 has ratios 3/2, 1/2 and advantage 1; response 2 has 3/2, 1/2, 1 and -1.
# clip 0.2, 0.2:  response 1: min(3/2, 6/5) = 1.2, min(1/2, 4/5) = 0.5, sum  1.7
#                 response 2: min(-3/2, -6/5) = -1.5, min(-1/2, -4/5) = -0.8, -1, sum -3.3
# The clip changed one term of each: 2 tokens of 5.
RATIOS = [[1.5, 0.5, 9.0], [1.5, 0.5, 1.0]]
MASK = [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", -(1.7 / 2 - 3.3 / 3) / 2),  # = 0.125
        ("dr_grpo", -(1.7 - 3.3) / (2 * 4)),  # = 0.2, for max_tokens = 4
        ("dapo", -(1.28 + 0.5 - 3.3) / 5),  # = 0.304: 1 + 0.28 is the upper limit
        ("reinforce++", -(1.7 - 3.3) / 5),  # = 0.32
    ],
)
def test_clipped_losses_are_the_ones_worked_out_by_hand(name, expected):
    loss, stats, gradient_BT = loss_of_ratios(name, RATIOS, [1, -1], MASK)
    assert loss == pytest.approx(expected, abs=1e-12)
    assert stats == pytest.approx({"ratio_mean": 1.0, "ratio_max": 1.5, "clip_share": 0.4})
    # Clipped terms have no gradient; the masked token has none.
    assert (gradient_BT != 0).tolist() == [[False, True, False], [True, False, True]]


def test_the_rloo_loss_is_the_one_worked_out_by_hand():
    # Sums of log-probabilities: both ln 3/2 + ln 1/2 = ln 3/4. -(2 ln 3/4 - ln 3/4) / 2
    loss, stats, gradient_BT = loss_of_ratios("rloo", RATIOS, [2, -1], MASK)
    assert loss == pytest.approx(-math.log(0.75) / 2, abs=1e-12)
    assert gradient_BT.tolist() == [[-1, -1, 0], [0.5, 0.5, 0.5]]
    assert stats == pytest.approx({"ratio_mean": 1.0, "ratio_max": 1.5})  # it clips nothing


def test_the_gspo_loss_is_the_one_worked_out_by_hand():
    # Geometric means: sqrt(4) = 2, held at 1.0004; cbrt(1/8) = 1/2, held at 0.9997.
    # Advantage 1: min(2, 1.0004); -1: min(-1/2, -0.9997).
    ratios = [[4, 1, 9], [1 / 8, 1, 1]]
    loss, stats, _ = loss_of_ratios("gspo", ratios, [1, -1], MASK)
    assert loss == pytest.approx(-(1.0004 - 0.9997) / 2, abs=1e-12)
    assert stats["clip_share"] == 1.0
    # The other way round nothing is held: -(-2 + 1/2) / 2. The gradient of a geometric mean s
    # with respect to one of its T logarithms is s / T.
    loss, stats, gradient_BT = loss_of_ratios("gspo", ratios, [-1, 1], MASK)
    assert loss == pytest.approx(0.75, abs=1e-12)
    assert stats["clip_share"] == 0.0
    torch.testing.assert_close(gradient_BT, tensor([[0.5, 0.5, 0], [-1 / 12] * 3]))


def test_the_cispo_loss_is_the_one_worked_out_by_hand():
    # Weights: 8 is held at 5, 1/2 stays (no lower limit). 5 ln 8 + ln(1/2) / 2 = 14.5 ln 2; the
    # second response has log-probabilities of 0. Five tokens.
    loss, stats, gradient_BT = loss_of_ratios("cispo", [[8, 0.5, 9], [1, 1, 1]], [1, -1], MASK)
    assert loss == pytest.approx(-14.5 * math.log(2) / 5, abs=1e-12)
    # Even the held token learns, with its weight held: that is the point of CISPO.
    torch.testing.assert_close(gradient_BT, tensor([[-1, -0.1, 0], [0.2, 0.2, 0.2]]))
    assert stats["clip_share"] == pytest.approx(0.2)


def test_given_clips_stand_in_place_of_the_algorithms_own():
    # Upper limit 3/2, lower 1/2: nothing is held. 2 / 2 and -3 / 3.
    loss, stats, _ = loss_of_ratios("grpo", RATIOS, [1, -1], MASK, clip_low=0.5, clip_high=0.5)
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert stats["clip_share"] == 0.0
    # One of the two: response 1 is held at 1.4, response 2 at 0.8 as before.
    loss, _, _ = loss_of_ratios("grpo", RATIOS, [1, -1], MASK, clip_high=0.4)
    assert loss == pytest.approx(-((1.4 + 0.5) / 2 - 3.3 / 3) / 2, abs=1e-12)


# Slow twins


def slow_policy_loss(name, logprob, old, advantage, mask, weight, sequences, tokens, max_tokens) -> float:
    """The module's table, a token at a time, in Python floats."""
    algorithm, total = ALGORITHMS[name], 0.0
    low = -math.inf if algorithm.clip_low is None else 1 - algorithm.clip_low
    high = math.inf if algorithm.clip_high is None else 1 + algorithm.clip_high
    for i in range(len(logprob)):
        places = [t for t in range(len(mask[i])) if mask[i][t]]
        response = 0.0
        for t in places:
            if algorithm.ratio == "token":
                ratio = math.exp(logprob[i][t] - old[i][t])
            else:
                ratio = math.exp(sum(logprob[i][s] - old[i][s] for s in places) / len(places))
            held = min(max(ratio, low), high)
            if algorithm.term == "clip":
                term = min(ratio * advantage[i], held * advantage[i])
            elif algorithm.term == "weighted":
                term = held * advantage[i] * logprob[i][t]
            else:
                term = advantage[i] * logprob[i][t]
            response += weight[i][t] * term
        if places and algorithm.average == "response_tokens":
            response /= len(places)
        total += response
    divisor = {
        "response_tokens": sequences,
        "response_sums": sequences,
        "tokens": tokens,
        "constant_length": sequences * max_tokens,
    }
    return -total / divisor[algorithm.average]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_every_loss_equals_its_slow_twin(name, seed):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(seed, rows=12)
    weight_BT = torch.rand(mask_BT.shape, dtype=torch.float64)
    counts = {"sequences": 9, "tokens": 40, "max_tokens": 7}
    loss, stats = policy_loss(
        ALGORITHMS[name], logprob_BT, old_BT, advantage_B, mask_BT, weight_BT=weight_BT, **counts
    )
    tensors = (logprob_BT, old_BT, advantage_B, mask_BT, weight_BT)
    expected = slow_policy_loss(name, *(t.tolist() for t in tensors), **counts)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    if name in CLIPPING:
        assert 0 < stats["clip_share"] < 1  # the batch exercises both sides


@pytest.mark.parametrize("name", [name for name in NAMES if ALGORITHMS[name].kl == "loss"])
def test_the_kl_loss_equals_its_slow_twin(name):
    logprob_BT, reference_BT, _, mask_BT = random_batch(5)
    total = 0.0
    for i in range(6):
        places = [t for t in range(5) if mask_BT[i, t]]
        gaps = [reference_BT[i, t].item() - logprob_BT[i, t].item() for t in places]
        response = sum(math.exp(gap) - gap - 1 for gap in gaps)
        if places and ALGORITHMS[name].average == "response_tokens":
            response /= len(places)
        total += response
    divisor = {"response_tokens": 9, "tokens": 40, "constant_length": 9 * 7}
    got = kl_loss(ALGORITHMS[name], logprob_BT, reference_BT, mask_BT, sequences=9, tokens=40, max_tokens=7)
    assert got.item() == pytest.approx(total / divisor[ALGORITHMS[name].average], abs=1e-12)


def test_k3_is_worked_out_by_hand_and_is_never_negative():
    # reference / pi = 2, 1, 1/2: 2 - ln 2 - 1, 0, 1/2 + ln 2 - 1; slope 1 - reference / pi
    logprob_BT = tensor([[0.0, 0.0, 0.0]]).requires_grad_()
    value_BT = kl_k3(logprob_BT, tensor([[2, 1, 0.5]]).log())
    expected = tensor([[1 - math.log(2), 0, math.log(2) - 0.5]])
    torch.testing.assert_close(value_BT, expected, atol=1e-12, rtol=0)
    (slope_BT,) = torch.autograd.grad(value_BT.sum(), logprob_BT)
    torch.testing.assert_close(slope_BT, tensor([[-1, 0, 0.5]]), atol=1e-12, rtol=0)
    assert (kl_k3(torch.randn(100), torch.randn(100)) >= 0).all()


# Gradients


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cispo"])
def test_gradients_equal_finite_differences(name):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(6)

    def loss(logprob_BT):
        return policy_loss(
            ALGORITHMS[name],
            logprob_BT,
            old_BT,
            advantage_B,
            mask_BT,
            sequences=6,
            tokens=int(mask_BT.sum()),
            max_tokens=5,
        )[0]

    assert torch.autograd.gradcheck(loss, logprob_BT)


@pytest.mark.parametrize("name", NAMES)
def test_where_learner_and_old_policy_are_one_the_gradient_is_reinforces(name):
    """d loss / d log pi = -A times what the average divides by: the policy gradient theorem."""
    logprob_BT, _, advantage_B, mask_BT = random_batch(7)
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    loss, stats = policy_loss(
        ALGORITHMS[name], logprob_BT, logprob_BT.detach(), advantage_B, mask_BT, **counts
    )
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    share_B1 = {
        "response_tokens": 1 / (6 * mask_BT.sum(1, keepdim=True).clamp(min=1)),
        "response_sums": torch.full((6, 1), 1 / 6),
        "tokens": torch.full((6, 1), 1 / counts["tokens"]),
        "constant_length": torch.full((6, 1), 1 / 30),
    }[ALGORITHMS[name].average]
    expected_BT = -advantage_B[:, None] * share_B1 * mask_BT
    torch.testing.assert_close(gradient_BT, expected_BT, atol=1e-7, rtol=0)
    assert stats["ratio_mean"] == stats["ratio_max"] == 1.0
    assert stats.get("clip_share", 0.0) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_an_enormous_ratio_is_no_infinity(name, advantage):
    logprob_BT = torch.zeros(1, 2, requires_grad=True)
    old_BT = torch.full((1, 2), -1000.0)  # a ratio of exp(1000)
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    counts = {"sequences": 1, "tokens": 2, "max_tokens": 2}
    loss, stats = policy_loss(
        ALGORITHMS[name], logprob_BT, old_BT, torch.tensor([advantage]), mask_BT, **counts
    )
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    assert math.isfinite(loss.item())
    assert gradient_BT.isfinite().all()
    assert math.isfinite(stats["ratio_max"])
    assert kl_k3(torch.full((1, 1), -1000.0), torch.zeros(1, 1)).isfinite()


# Invariances


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_leaves_out_is_never_read(name, garbage):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(8)
    weight_BT = torch.rand(mask_BT.shape, dtype=torch.float64)
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    results = []
    for fill in (0.0, garbage):
        spoilt = [
            t.detach().masked_fill(~mask_BT, fill)
            for t in (logprob_BT, old_BT, advantage_B[:, None].expand_as(mask_BT), weight_BT)
        ]
        leaf_BT = spoilt[0].requires_grad_()
        loss, stats = policy_loss(
            ALGORITHMS[name], leaf_BT, spoilt[1], spoilt[2], mask_BT, weight_BT=spoilt[3], **counts
        )
        if ALGORITHMS[name].kl == "loss":
            loss = loss + kl_loss(ALGORITHMS[name], leaf_BT, spoilt[1], mask_BT, **counts)
        (gradient_BT,) = torch.autograd.grad(loss, leaf_BT)
        results.append((loss.item(), stats, gradient_BT))
    assert not mask_BT.all()
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])
    assert results[1][2][~mask_BT].eq(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_responses_without_advantage_may_be_left_out(name):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(9)
    advantage_B[[1, 4]] = 0.0
    keep = [0, 2, 3, 5]
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    algorithm = ALGORITHMS[name]
    full, _ = policy_loss(algorithm, logprob_BT, old_BT, advantage_B, mask_BT, **counts)
    (full_BT,) = torch.autograd.grad(full, logprob_BT)
    part_BT = logprob_BT.detach()[keep].requires_grad_()
    part, _ = policy_loss(algorithm, part_BT, old_BT[keep], advantage_B[keep], mask_BT[keep], **counts)
    (gradient_BT,) = torch.autograd.grad(part, part_BT)
    assert part.item() == pytest.approx(full.item(), abs=1e-15)
    assert torch.equal(gradient_BT, full_BT[keep])
    assert not full_BT[[1, 4]].any()


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_and_another_order_change_nothing(name):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(10)
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    algorithm = ALGORITHMS[name]
    first, _ = policy_loss(algorithm, logprob_BT, old_BT, advantage_B, mask_BT, **counts)
    order = [3, 1, 5, 0, 2, 4]
    wide = [torch.nn.functional.pad(t[order], (0, 3)) for t in (logprob_BT, old_BT, mask_BT)]
    second, _ = policy_loss(algorithm, wide[0], wide[1], advantage_B[order], wide[2], **counts)
    assert second.item() == pytest.approx(first.item(), abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_an_advantage_for_each_token_may_stand_in_place_of_one_for_each_response(name):
    logprob_BT, old_BT, advantage_B, mask_BT = random_batch(11)
    counts = {"sequences": 6, "tokens": int(mask_BT.sum()), "max_tokens": 5}
    one, _ = policy_loss(ALGORITHMS[name], logprob_BT, old_BT, advantage_B, mask_BT, **counts)
    each_BT = advantage_B[:, None].repeat(1, 5)
    other, _ = policy_loss(ALGORITHMS[name], logprob_BT, old_BT, each_BT, mask_BT, **counts)
    assert one.item() == other.item()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_no_token_left_has_a_loss_of_zero_and_no_numbers(name):
    logprob_BT = torch.zeros(2, 3, requires_grad=True)
    none_BT = torch.zeros(2, 3, dtype=torch.bool)
    loss, stats = policy_loss(
        ALGORITHMS[name],
        logprob_BT,
        torch.zeros(2, 3),
        torch.ones(2),
        none_BT,
        sequences=2,
        tokens=6,
        max_tokens=3,
    )
    assert loss.item() == 0.0
    assert stats == {}


# The table


def test_the_clips_are_the_papers():
    clips = {name: (a.clip_low, a.clip_high) for name, a in ALGORITHMS.items()}
    assert clips == {
        "grpo": (0.2, 0.2),
        "dr_grpo": (0.2, 0.2),
        "dapo": (0.2, 0.28),
        "rloo": (None, None),
        "reinforce++": (0.2, 0.2),
        "gspo": (3e-4, 4e-4),
        "cispo": (None, 4.0),
    }


def test_only_dapo_samples_anew_and_shapes_overlong_responses():
    extras = {name: (a.dynamic_sampling, a.overlong_share) for name, a in ALGORITHMS.items()}
    assert extras.pop("dapo") == (True, 0.2)
    assert set(extras.values()) == {(False, None)}


def test_config_and_loss_know_the_same_algorithms():
    words = get_args(get_type_hints(config.Loss)["algorithm"])
    assert sorted(words) == NAMES
    assert {n for n, a in ALGORITHMS.items() if a.advantage == "batch"} == config.UNGROUPED
    assert {n for n, a in ALGORITHMS.items() if a.term == "plain"} == config.WITHOUT_RATIO
    assert {n for n, a in ALGORITHMS.items() if a.term == "plain"} == config.UNCLIPPED


def test_the_penalty_never_rises_with_length():
    penalties = [overlong_penalty(length, 64, 13) for length in range(80)]
    assert all(later <= earlier for earlier, later in pairwise(penalties))
    assert (penalties[51], penalties[64]) == (0, -1)
