"""How far a sampler's log-probabilities are from the learner's: the same weights, stale ones, wrong ones.

    python tools/bench_gap.py

Trains the embedded model for 26 steps of the tiny recipe on whatever device there is, keeps each step's
rollouts and weights, then reads the rollouts again with later and with damaged weights. The limits of
frugal_rl/correct.py were chosen by these figures. Takes 3 minutes on one CPU core.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from frugal_rl import train as loop
from frugal_rl.config import load_recipe
from frugal_rl.correct import PRESETS, correct, mean_gap
from frugal_rl.rollout import Rollout
from frugal_rl.sampled import _padded
from frugal_rl.session import open_session
from frugal_rl.update import learn

STEPS = 26
SAMPLED_AT = (0, 5, 12, 20)  # steps done when the rollouts were drawn
LATER = (0, 1, 2, 5, 20)  # steps that the learner is ahead


def show(session: loop.Session, rollouts: Sequence[Rollout], what: str) -> None:
    mask_BT, sampler_BT, _ = (t.to(session.policy.decoder.device) for t in _padded(rollouts, None))
    old_BT = session.learner.log_probs(rollouts)
    gap_N = (old_BT - sampler_BT)[mask_BT].abs()
    stats = correct(PRESETS["off"], old_BT, sampler_BT, mask_BT).stats
    print(
        f"{what:<32} mean {mean_gap(old_BT, sampler_BT, mask_BT):.1e}  "
        f"median {gap_N.median():.1e}  largest {gap_N.max():.1e}  k3 {stats['sampler_gap_k3']:.1e}  "
        f"xi {stats['xi_p01']:.3f} .. {stats['xi_p99']:.3f}",
        flush=True,
    )


def main() -> None:
    recipe = load_recipe("tiny", ["data.heldout=8"])
    quiet = loop.Reporter(lambda text: None, lambda row: None)
    with open_session(recipe, quiet) as session:
        weights, decoder = session.policy.weights, session.policy.decoder
        batches, policies, drawn = [], [], 0
        for _ in range(STEPS):
            policies.append({name: tensor.clone() for name, tensor in weights.tensors.items()})
            groups, drawn, _ = loop._sample_groups(session, drawn, loop._Clock(session.peaks))
            batches.append([r for group in groups for r in group.rollouts])
            learn(session.learner, recipe, groups)

        def put(step: int) -> None:
            for name, tensor in policies[step].items():
                weights.tensors[name].copy_(tensor)

        for step in SAMPLED_AT:
            for later in LATER:
                if step + later < STEPS:
                    put(step + later)
                    show(session, batches[step], f"sampled at {step}, learner {later} later")
        put(12)
        weights.tensors["model.layers.2.input_layernorm.weight"].mul_(1.5)
        show(session, batches[12], "one norm's weight times 1.5")
        put(12)
        weights.tensors["model.layers.1.mlp.down_proj.weight"].zero_()
        show(session, batches[12], "one matrix zero")
        put(0)
        weights.compute_dtype = decoder.dtype = torch.bfloat16
        show(session, batches[0], "bf16 on the learner's side")
        groups, _, _ = loop._sample_groups(session, 0, loop._Clock(session.peaks))
        show(session, [r for group in groups for r in group.rollouts], "bf16 on both sides")


if __name__ == "__main__":
    main()
