"""Corrections against slow twins written from their formulas, one token at a time, and numbers against numpy.

Tolerances: float64 results of a few operations agree to 1e-12.
"""

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from frugal_rl import config
from frugal_rl.correct import PRESETS, QUANTILES, Correction, correct, mean_gap, usual_gap
from frugal_rl.loss import ALGORITHMS, policy_loss

NAMES = sorted(PRESETS)
COUNTS = {"sequences": 9, "tokens": 40, "max_tokens": 7}


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def batch(seed, rows=8, width=6, spread=0.5):
    """Log-probabilities of old policy and sampler, and lengths 1 to `width`: some tokens in every piece.

    Row 1 has one token that the old policy would hardly have drawn, row 2 is as the sampler drew it, row 3
    is off by so little that geometric bands keep it, though six times that is outside.
    """
    source = torch.Generator().manual_seed(seed)
    old_BT = -2 * torch.rand(rows, width, generator=source, dtype=torch.float64)
    sampler_BT = old_BT + spread * torch.randn(rows, width, generator=source, dtype=torch.float64)
    length_B = torch.randint(1, width + 1, (rows,), generator=source)
    length_B[:4] = width
    sampler_BT[1, 2] = old_BT[1, 2] + 12.0
    sampler_BT[2] = old_BT[2]
    sampler_BT[3] = old_BT[3] + 4e-4
    return old_BT, sampler_BT, torch.arange(width) < length_B[:, None]


def slow_correct(name, old, sampler, mask):
    """(weight, counted) of every token, None where there is no token. From the papers, preset by preset."""
    weights, counted = [], []
    tokens = [
        math.exp(max(-20.0, min(20.0, old[i][t] - sampler[i][t])))
        for i in range(len(old))
        for t in range(len(old[i]))
        if mask[i][t]
    ]
    mean_capped = sum(min(xi, 1.5) for xi in tokens) / len(tokens)
    for i in range(len(old)):
        places = [t for t in range(len(old[i])) if mask[i][t]]
        gaps = [old[i][t] - sampler[i][t] for t in places]
        xis = [math.exp(max(-20.0, min(20.0, gap))) for gap in gaps]
        product = math.exp(max(-20.0, min(20.0, sum(gaps))))
        geometric = math.exp(sum(gaps) / len(gaps)) if gaps else 1.0
        row_w, row_c = [None] * len(old[i]), [None] * len(old[i])
        for t, xi in zip(places, xis, strict=True):
            if name == "off":
                w, c = 1.0, True
            elif name == "sparse-rl":
                c = 0.5 <= xi <= 1.5 and all(other >= 1e-4 for other in xis)
                w = min(xi, 1.5) / mean_capped
            elif name == "tis":
                w, c = min(xi, 2.0), True
            elif name == "mis":
                w, c = (xi if 0.5 <= xi <= 2.0 else 0.0), True
            elif name == "icepop":
                w, c = (xi if 0.5 <= xi <= 5.0 else 0.0), True
            elif name == "seq-tis":
                w, c = min(product, 2.0), True
            elif name == "seq-mis":
                w, c = min(product, 2.0), 0.5 <= product <= 2.0
            elif name == "geo-rs":
                w, c = 1.0, 0.999 <= geometric <= 1.001
            elif name == "geo-rs-token-tis":
                w, c = min(xi, 2.0), 0.999 <= geometric <= 1.001
            row_w[t], row_c[t] = (w if c else 0.0), c
        weights.append(row_w)
        counted.append(row_c)
    return weights, counted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_every_preset_equals_its_slow_twin(name, seed):
    old_BT, sampler_BT, mask_BT = batch(seed)
    got = correct(PRESETS[name], old_BT, sampler_BT, mask_BT)
    weights, counted = slow_correct(name, old_BT.tolist(), sampler_BT.tolist(), mask_BT.tolist())
    for i, row in enumerate(weights):
        for t, weight in enumerate(row):
            assert got.weight_BT[i, t].item() == pytest.approx(weight or 0.0, abs=1e-12)
            assert got.counted_BT[i, t].item() is bool(counted[i][t])
    assert got.counted_BT.dtype == torch.bool
    kept = [w > 0 for row in weights for w in row if w is not None]
    if name not in ("off", "tis", "seq-tis"):
        assert 0 < sum(kept) < len(kept)  # the batch exercises both sides


def slow_sparse_rl(logprob, old, sampler, advantage, mask, sequences):
    """L = 1/B sum_i [sum_t M w max(-r A, -clip(r, 0.8, 1.2) A) / max(sum_t M, 1)], as the formula stands."""
    count = total = 0.0
    for i in range(len(old)):
        for t in range(len(old[i])):
            if mask[i][t]:
                count += 1
                total += min(math.exp(min(20.0, max(-20.0, old[i][t] - sampler[i][t]))), 1.5)
    loss = 0.0
    for i in range(len(old)):
        v = 1.0
        for t in range(len(old[i])):
            if mask[i][t] and math.exp(old[i][t] - sampler[i][t]) < 1e-4:
                v = 0.0
        numerator = denominator = 0.0
        for t in range(len(old[i])):
            if not mask[i][t]:
                continue
            xi = math.exp(min(20.0, max(-20.0, old[i][t] - sampler[i][t])))
            m = v if 0.5 <= xi <= 1.5 else 0.0
            w = min(xi, 1.5) / (total / count)
            r = math.exp(logprob[i][t] - old[i][t])
            clipped = min(max(r, 0.8), 1.2)
            numerator += m * w * max(-r * advantage[i], -clipped * advantage[i])
            denominator += m
        loss += numerator / max(denominator, 1.0)
    return loss / sequences


@pytest.mark.parametrize("seed", range(5))
def test_grpo_with_sparse_rl_is_the_papers_loss(seed):
    old_BT, sampler_BT, mask_BT = batch(seed)
    source = torch.Generator().manual_seed(100 + seed)
    logprob_BT = old_BT + 0.3 * torch.randn(old_BT.shape, generator=source, dtype=torch.float64)
    advantage_B = torch.randn(len(old_BT), generator=source, dtype=torch.float64)
    logprob_BT.requires_grad_()
    got = correct(PRESETS["sparse-rl"], old_BT, sampler_BT, mask_BT)
    loss, _ = policy_loss(
        ALGORITHMS["grpo"],
        logprob_BT,
        old_BT,
        advantage_B,
        mask_BT,
        weight_BT=got.weight_BT,
        counted_BT=got.counted_BT,
        **COUNTS,
    )
    tensors = (logprob_BT, old_BT, sampler_BT, advantage_B, mask_BT)
    expected = slow_sparse_rl(*(t.tolist() for t in tensors), sequences=COUNTS["sequences"])
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert got.stats["rejected_share"] >= 1 / 8  # row 1: it counts among the sequences
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    assert not gradient_BT[1].any()
    assert not gradient_BT[~got.counted_BT].any()
    assert gradient_BT[2].any()


def test_what_is_left_out_shortens_its_response_and_not_the_batch():
    # Ratio 1, advantages 1. Response 1 keeps 1 of 2 tokens: 1 / 1. Response 2 is rejected: 0, counted.
    # Weights: xi = 1, 1/4 and e^-12, e^-12; mean of the capped (1.25 + 2 e^-12) / 4.
    old_BT, mask_BT = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
    sampler_BT = tensor([[0.0, math.log(4)], [12.0, 12.0]])
    logprob_BT = old_BT.clone().requires_grad_()
    got = correct(PRESETS["sparse-rl"], old_BT, sampler_BT, mask_BT)
    weight = 4 / (1.25 + 2 * math.exp(-12))
    torch.testing.assert_close(got.weight_BT, tensor([[weight, 0], [0, 0]]))

    def loss(name, **counts):
        return policy_loss(
            ALGORITHMS[name],
            logprob_BT,
            old_BT,
            tensor([1.0, 1.0]),
            mask_BT,
            weight_BT=got.weight_BT,
            counted_BT=got.counted_BT,
            **{"sequences": 2, "tokens": 1, "max_tokens": 5, **counts},
        )[0].item()

    assert loss("grpo") == pytest.approx(-weight / 2)
    assert loss("dapo") == pytest.approx(-weight)  # of one token left
    assert loss("dr_grpo") == pytest.approx(-weight / 10)
    assert loss("dapo", tokens=0) == pytest.approx(-weight)  # none left is no division by 0


def test_icepops_band_takes_weight_and_leaves_the_count():
    # xi = 1 and 8: the loss is -(1 + 0) / 2, and not / 1.
    zero_BT, mask_BT = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    got = correct(PRESETS["icepop"], tensor([[0.0, math.log(8)]]), zero_BT, mask_BT)
    assert got.weight_BT.tolist() == [[1, 0]]
    assert got.counted_BT.all()
    loss, _ = policy_loss(
        ALGORITHMS["grpo"],
        zero_BT,
        zero_BT,
        tensor([1.0]),
        mask_BT,
        sequences=1,
        tokens=2,
        max_tokens=2,
        weight_BT=got.weight_BT,
        counted_BT=got.counted_BT,
    )
    assert loss.item() == -0.5


# Edges


@pytest.mark.parametrize("name", NAMES)
def test_where_sampler_and_old_policy_are_one_nothing_is_corrected(name):
    old_BT, _, mask_BT = batch(0)
    got = correct(PRESETS[name], old_BT, old_BT.clone(), mask_BT)
    torch.testing.assert_close(got.weight_BT, mask_BT.double(), atol=1e-15, rtol=0)
    assert torch.equal(got.counted_BT, mask_BT)
    assert got.stats == pytest.approx(
        dict.fromkeys(QUANTILES, 1.0)
        | {
            "sampler_gap_max": 0,
            "sampler_gap_k3": 0,
            "rejected_share": 0,
            "masked_share": 0,
            "astray_share": 0,
        }
        | {"effective_share": 1.0}
    )


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_a_batch_rejected_whole_has_a_loss_and_a_gradient_of_zero(algorithm):
    old_BT, sampler_BT, mask_BT = batch(1)
    sampler_BT = sampler_BT.clone()
    sampler_BT[:, 0] = old_BT[:, 0] + 15  # every sequence has a first token
    got = correct(PRESETS["sparse-rl"], old_BT, sampler_BT, mask_BT)
    assert got.stats["rejected_share"] == got.stats["masked_share"] == 1.0
    assert got.stats["effective_share"] == 0.0
    logprob_BT = old_BT.clone().requires_grad_()
    loss, _ = policy_loss(
        ALGORITHMS[algorithm],
        logprob_BT,
        old_BT,
        torch.ones(len(old_BT), dtype=torch.float64),
        mask_BT,
        sequences=8,
        tokens=0,
        max_tokens=6,
        weight_BT=got.weight_BT,
        counted_BT=got.counted_BT,
    )
    (gradient_BT,) = torch.autograd.grad(loss, logprob_BT)
    assert loss.item() == 0.0
    assert torch.equal(gradient_BT, torch.zeros_like(gradient_BT))


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_of_one_token_is_corrected_by_it(name):
    xi = 1.0005  # within every band
    got = correct(PRESETS[name], tensor([[math.log(xi)]]), tensor([[0.0]]), torch.ones(1, 1).bool())
    alone = {"off": 1.0, "geo-rs": 1.0, "sparse-rl": 1.0}  # sparse-rl: it is its own mean
    assert got.weight_BT.item() == pytest.approx(alone.get(name, xi), abs=1e-12)
    assert got.counted_BT.item()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_mask_leaves_out_is_never_read(name, garbage):
    old_BT, sampler_BT, mask_BT = batch(2)
    clean = correct(PRESETS[name], old_BT, sampler_BT, mask_BT)
    spoilt = [t.masked_fill(~mask_BT, garbage) for t in (old_BT, sampler_BT)]
    got = correct(PRESETS[name], *spoilt, mask_BT)
    assert not mask_BT.all()
    assert torch.equal(got.weight_BT, clean.weight_BT)
    assert torch.equal(got.counted_BT, clean.counted_BT)
    assert got.stats == clean.stats
    assert not got.weight_BT[~mask_BT].any()
    assert mean_gap(*spoilt, mask_BT) == mean_gap(old_BT, sampler_BT, mask_BT)


@pytest.mark.parametrize("name", [n for n in NAMES if PRESETS[n].weight])
def test_a_log_probability_that_is_no_number_ends_as_a_weight_that_is_none(name):
    old_BT, sampler_BT, mask_BT = batch(3)
    old_BT[2, 1] = math.nan
    got = correct(PRESETS[name], old_BT, sampler_BT, mask_BT)
    assert got.weight_BT[2, 1].isnan()
    assert got.counted_BT[2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_an_enormous_gap_is_no_infinity(name):
    old_BT = tensor([[0.0, -1000.0], [1000.0, 0.0]])
    got = correct(PRESETS[name], old_BT, torch.zeros_like(old_BT), torch.ones(2, 2).bool())
    assert got.weight_BT.isfinite().all()
    assert all(math.isfinite(v) for v in got.stats.values())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratios_end_at_exp_20_both_ways(level):
    old_BT = tensor([[-1000.0], [1000.0]])
    got = correct(Correction(level), old_BT, torch.zeros_like(old_BT), torch.ones(2, 1).bool())
    assert got.weight_BT.log().view(-1).tolist() == pytest.approx([-20.0, 20.0])


def test_an_empty_batch_has_no_numbers():
    none_BT = torch.zeros(2, 3, dtype=torch.bool)
    for name in NAMES:
        got = correct(PRESETS[name], torch.zeros(2, 3), torch.zeros(2, 3), none_BT)
        assert got.stats == {}
        assert not got.weight_BT.any()
    assert mean_gap(torch.zeros(2, 3), torch.zeros(2, 3), none_BT) is None


def test_weights_carry_no_gradient():
    old_BT, sampler_BT, mask_BT = batch(4)
    for name in NAMES:
        got = correct(PRESETS[name], old_BT.clone().requires_grad_(), sampler_BT, mask_BT)
        assert not got.weight_BT.requires_grad


def test_a_normaliser_is_the_mean_of_all_response_tokens_given():
    """So a batch is to be given whole: half of it has another mean."""
    old_BT, sampler_BT, mask_BT = batch(5)
    correction = replace(PRESETS["tis"], normalise=True)
    whole = correct(correction, old_BT, sampler_BT, mask_BT).weight_BT
    half = correct(correction, old_BT[:4], sampler_BT[:4], mask_BT[:4]).weight_BT
    assert whole.sum().item() == pytest.approx(mask_BT.sum().item())
    assert half.sum().item() == pytest.approx(mask_BT[:4].sum().item())
    assert (whole[:4] / half)[mask_BT[:4]].std() < 1e-12 < (whole[:4] - half).abs().max()


# Numbers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 8, 100])
def test_the_numbers_are_numpys(name, rows):
    old_BT, sampler_BT, mask_BT = (t[:rows] for t in batch(rows, rows=max(rows, 4)))
    got = correct(PRESETS[name], old_BT, sampler_BT, mask_BT)
    mask = mask_BT.numpy()
    gap = (old_BT - sampler_BT).numpy()[mask]
    weight, xi = got.weight_BT.numpy()[mask], np.exp(np.clip(gap, -20, 20))
    kept = got.weight_BT.numpy() > 0
    expected = {key: np.quantile(xi, share) for key, share in QUANTILES.items()}
    expected |= {
        "sampler_gap_max": np.abs(gap).max(),
        "sampler_gap_k3": (xi - 1 - np.log(xi)).mean(),
        "rejected_share": np.mean([not row.any() for row in kept]),
        "masked_share": 1 - kept[mask].mean(),
        "astray_share": ((np.exp((old_BT - sampler_BT).numpy()) < 1e-4) & mask).any(1).mean(),
        "effective_share": weight.sum() ** 2 / (weight.size * (weight**2).sum()) if weight.any() else 0.0,
    }
    assert got.stats == pytest.approx(expected, abs=1e-12)
    assert mean_gap(old_BT, sampler_BT, mask_BT) == pytest.approx(np.abs(gap).mean())


def test_the_limits_of_a_band_are_within_it():
    one_BT, zero_BT = torch.ones(2, 3, dtype=torch.bool), tensor([[0.0] * 3] * 2)
    for low, high in ((1.0, 1.0), (1.0, 2.0), (0.5, 1.0)):
        got = correct(Correction("token", band="token", low=low, high=high), zero_BT, zero_BT, one_BT)
        assert got.weight_BT.eq(1).all() and got.counted_BT.all()


def test_k3_is_of_the_sampler_to_the_old_policy():
    # Tokens drawn by the sampler, xi = old / sampler = 2: 2 - 1 - ln 2, and not 1/2 - 1 + ln 2.
    one_BT = torch.ones(1, 1, dtype=torch.bool)
    stats = correct(Correction(), tensor([[math.log(2)]]), tensor([[0.0]]), one_BT).stats
    assert stats["sampler_gap_k3"] == pytest.approx(1 - math.log(2))


def test_k3_of_float32_noise_is_not_negative():
    source = torch.Generator().manual_seed(0)
    noise_BT = 3e-7 * torch.randn(4, 1000, generator=source)
    stats = correct(Correction(), noise_BT, torch.zeros(4, 1000), torch.ones(4, 1000).bool()).stats
    assert (
        0 < stats["sampler_gap_k3"] == pytest.approx(noise_BT.double().square().mean().item() / 2, rel=1e-3)
    )


def test_the_limit_of_the_gap_is_tighter_for_float32():
    assert usual_gap(torch.float32) < usual_gap(torch.bfloat16) == usual_gap(torch.float16)


# The table


def test_config_and_correct_know_the_same_presets():
    words = get_args(get_type_hints(config.Loss)["correction"])
    assert sorted(words) == sorted([*NAMES, "auto"])


def test_the_limits_are_the_sources():
    got = {name: (c.cap, c.low, c.high, c.veto) for name, c in PRESETS.items()}
    free = (0.0, math.inf, None)
    assert got == {
        "off": (math.inf, *free),
        "sparse-rl": (1.5, 0.5, 1.5, 1e-4),
        "tis": (2.0, *free),
        "mis": (math.inf, 0.5, 2.0, None),
        "icepop": (math.inf, 0.5, 5.0, None),
        "seq-tis": (2.0, *free),
        "seq-mis": (2.0, 0.5, 2.0, None),
        "geo-rs": (math.inf, 0.999, 1.001, None),
        "geo-rs-token-tis": (2.0, 0.999, 1.001, None),
    }
