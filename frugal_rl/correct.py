"""Correction of rollouts that another policy drew than the one that learns from them.

Three policies meet in the loss: the sampler (a compressed cache, perhaps), the old policy (dense, the
weights at the time of sampling), the learner. The loss knows old and learner; what is between sampler
and old is corrected here, per token, by weights without gradient:

    xi_t     = exp(clamp(log old_t - log sampler_t, -20, 20))
    sequence = exp(clamp(sum_t log xi_t, -20, 20)),  geometric = exp(mean_t log xi_t): one for all its tokens
    weight_t = min(ratio, cap), divided by its mean over the batch's response tokens if `normalise`
    band     : tokens whose ratio is outside [low, high] are left out
    veto     : a sequence with one xi_t below it is left out whole

    name               weight     cap   band                       left out       veto
    off                -          -     -                          -              -
    sparse-rl          token      1.5   token     0.5 .. 1.5       not counted    1e-4
    tis                token      2     -                          -              -
    mis                token      -     token     0.5 .. 2         counted as 0   -
    icepop             token      -     token     0.5 .. 5         counted as 0   -
    seq-tis            sequence   2     -                          -              -
    seq-mis            sequence   2     sequence  0.5 .. 2         not counted    -
    geo-rs             -          -     geometric 0.999 .. 1.001   not counted    -
    geo-rs-token-tis   token      2     geometric 0.999 .. 1.001   not counted    -

What is "not counted" leaves the numbers of tokens that averages divide by (of its response, or of the
batch); responses are counted all the same, those without any token left included: they add 0.

Invariants: what the mask leaves out is never read. Where xi is 1 everywhere every weight is 1 and
nothing is left out. A log-probability that is not finite is never hidden: it ends as a weight of NaN.

Source:
- sparse-rl: arXiv 2601.10079 and its released configuration:
  L = 1/B sum_i [sum_t M w max(-r A, -clip(r) A) / max(sum_t M, 1)], M = mask * band * veto, its mean of
  the weights taken over all response tokens, before anything is left out.
- tis, mis, icepop: volcengine/verl docs/algo/rollout_corr.md (`rollout_is` = "token",
  `rollout_is_threshold` = 2.0, "0.5_2.0", "0.5_5.0": a band changes weights, not the mask);
  huggingface/trl's `vllm_importance_sampling_mode` token_truncate and token_mask. The names:
  fengyao.notion.site/off-policy-rl (TIS), richardli.xyz/rl-collapse (MIS), arXiv 2510.18855 (IcePop,
  whose average divides by the whole length).
- seq-tis, seq-mis, geo-rs, geo-rs-token-tis: verl's RolloutCorrectionConfig decoupled_seq_is,
  decoupled_seq_is_rs, decoupled_geo_rs, decoupled_geo_rs_token_tis: `rollout_rs` takes out of the mask.

Differs: verl's average over responses leaves out responses without a token left; here they count, as in
Sparse-RL. verl compares 1 / ratio with the band (k1); the bands above are the same either way to 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .loss import LOG_RATIO_LIMIT, kl_k3

ASTRAY = 1e-4  # a token of which the old policy makes so little of the sampler's: Sparse-RL's veto
QUANTILES = {"xi_p01": 0.01, "xi_p05": 0.05, "xi_p50": 0.5, "xi_p95": 0.95, "xi_p99": 0.99}

# Limits of the mean |log xi| (nats) between a sampler and a learner of the same weights and context.
# Measured by tools/bench_gap.py (2 CPU cores; embedded model, batches sampled before steps 1, 6, 13, 21):
#   float32, the same weights: at most 2.9e-7
#   learner 1 step on: 8.6e-3, 5.4e-3, 2.7e-3, 8.0e-4;  5 steps on: 4.2e-2, 2.5e-2, 1.1e-2, 2.4e-3
#   20 steps on: 0.19, 0.087;  one norm's weight times 1.5: 1.3e-2;  one matrix zero: 0.72
#   bf16 on both sides: 1.3e-4;  on one side: 1.3e-3
# Between engines, Qwen2.5-0.5B in bf16: a root mean square of 0.03 (ServiceNow/Fast-LLM, pull request
# 525); so the limit for bf16 sees wrong weights, and weights that are stale by many steps.
# Why the mean: the median stays below 3e-4 in all of these, as most tokens are certain under any
# weights, and one token can dominate k3.
USUAL_GAP_FLOAT32 = 5e-4
USUAL_GAP_HALF = 5e-2

Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True)
class Correction:
    """The pieces of the module's table. None: without that piece.

    `weight`, `band`: which ratio weighs a token, and which must be within [low, high]. `counted`: what
    the band leaves out is counted, with a weight of 0; what the veto leaves out never is.
    """

    weight: Level | None = None
    cap: float = math.inf
    normalise: bool = False
    band: Level | None = None
    low: float = 0.0
    high: float = math.inf
    counted: bool = False
    veto: float | None = None


PRESETS: Mapping[str, Correction] = {
    "off": Correction(),
    "sparse-rl": Correction("token", cap=1.5, normalise=True, band="token", low=0.5, high=1.5, veto=ASTRAY),
    "tis": Correction("token", cap=2.0),
    "mis": Correction("token", band="token", low=0.5, high=2.0, counted=True),
    "icepop": Correction("token", band="token", low=0.5, high=5.0, counted=True),
    "seq-tis": Correction("sequence", cap=2.0),
    "seq-mis": Correction("sequence", cap=2.0, band="sequence", low=0.5, high=2.0),
    "geo-rs": Correction(band="geometric", low=0.999, high=1.001),
    "geo-rs-token-tis": Correction("token", cap=2.0, band="geometric", low=0.999, high=1.001),
}


@dataclass(frozen=True)
class Corrected:
    """`weight_BT` multiplies a token's term, 0 if it is left out. `counted_BT`, bool: what averages count."""

    weight_BT: Tensor
    counted_BT: Tensor
    stats: dict[str, float]


def correct(correction: Correction, old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor) -> Corrected:
    """The weights of a batch's tokens, from log-probabilities (nats) under the old policy and the sampler.

    `mask_BT`: bool, True at response tokens. Give the whole batch at once: a normaliser is its mean.

    The numbers, over the tokens of the mask (none if it is empty): quantiles of xi; `sampler_gap_max`,
    the largest |log xi|; `sampler_gap_k3`, KL(sampler, old) as k3 estimates it; `rejected_share`, of
    responses with no token left; `masked_share`, of tokens left out, those of rejected responses
    included; `astray_share`, of responses with a token whose xi is below ASTRAY, whatever the correction;
    `effective_share`, (sum w)^2 / (n sum w^2) of the weights.
    Syncs: once, for these numbers.
    """
    old_BT, sampler_BT = (t.detach().masked_fill(~mask_BT, 0.0) for t in (old_BT, sampler_BT))
    gap_BT = old_BT - sampler_BT
    weight_BT = mask_BT.to(gap_BT)
    if correction.weight is not None:
        weight_BT = _ratio(correction.weight, gap_BT, mask_BT).clamp(max=correction.cap)
        weight_BT = weight_BT.masked_fill(~mask_BT, 0.0)
    if correction.normalise:
        weight_BT = weight_BT * (mask_BT.sum() / weight_BT.sum())  # the sum is 0 for an empty mask only
    kept_BT = counted_BT = mask_BT
    # outside by comparison, not inside by its opposite: what is not a number stays, and is seen
    if correction.veto is not None:
        low_BT = _ratio("token", gap_BT, mask_BT) < correction.veto  # 1 where there is no token
        kept_BT = counted_BT = mask_BT & ~low_BT.any(1, keepdim=True)
    if correction.band is not None:
        ratio_BT = _ratio(correction.band, gap_BT, mask_BT)
        kept_BT = kept_BT & ~((ratio_BT < correction.low) | (ratio_BT > correction.high))
        counted_BT = counted_BT if correction.counted else kept_BT
    weight_BT = weight_BT.masked_fill(~kept_BT, 0.0)
    return Corrected(weight_BT, counted_BT, _statistics(gap_BT, weight_BT, kept_BT, mask_BT))


def mean_gap(old_BT: Tensor, sampler_BT: Tensor, mask_BT: Tensor) -> float | None:
    """Mean |log old - log sampler| (nats) over the mask; None where it is empty. Syncs."""
    gap_N = (old_BT.detach() - sampler_BT)[mask_BT]
    return float(gap_N.abs().mean()) if len(gap_N) else None


def usual_gap(dtype: torch.dtype, *, quantised_sampler: bool = False) -> float:
    """The limit of `mean_gap` for arithmetic in this dtype, beyond which the weights are not the same.

    `quantised_sampler`: it reads an int8 copy (host weights); the embedded model then has 3e-4 to 1e-3.
    """
    precise = dtype in (torch.float32, torch.float64) and not quantised_sampler
    return USUAL_GAP_FLOAT32 if precise else USUAL_GAP_HALF


def _ratio(level: Level, gap_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Old over sampler, the same at each token of a sequence unless the level is "token"."""
    if level != "token":
        sum_B1 = gap_BT.sum(1, keepdim=True)
        if level == "geometric":
            sum_B1 = sum_B1 / mask_BT.sum(1, keepdim=True).clamp(min=1)
        gap_BT = sum_B1.expand_as(gap_BT)
    return gap_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _statistics(gap_BT: Tensor, weight_BT: Tensor, kept_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    gap_N, weight_N = gap_BT[mask_BT].double(), weight_BT[mask_BT].double()  # k3 is a small difference
    if not len(gap_N):
        return {}
    xi_N = gap_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().sort().values
    numbers = {name: _quantile(xi_N, share) for name, share in QUANTILES.items()}
    some_B = mask_BT.any(1)
    square = weight_N.square().sum()
    numbers |= {
        "sampler_gap_max": gap_N.abs().max(),
        "sampler_gap_k3": kl_k3(gap_N.new_zeros(()), gap_N).mean(),
        "rejected_share": (~kept_BT.any(1))[some_B].double().mean(),
        "masked_share": (~kept_BT)[mask_BT].double().mean(),
        "astray_share": (mask_BT & (gap_BT < math.log(ASTRAY))).any(1)[some_B].double().mean(),
        "effective_share": (weight_N.sum().square() / (len(gap_N) * square)).masked_fill(square == 0, 0.0),
    }
    values = torch.stack([value.double() for value in numbers.values()]).tolist()
    return dict(zip(numbers, values, strict=True))


def _quantile(sorted_N: Tensor, share: float) -> Tensor:
    """As numpy's default does it; torch.quantile refuses more than 16 M values."""
    place = share * (len(sorted_N) - 1)
    below = math.floor(place)
    above = min(below + 1, len(sorted_N) - 1)
    return torch.lerp(sorted_N[below], sorted_N[above], place - below)
