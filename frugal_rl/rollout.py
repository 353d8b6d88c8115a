"""A rollout as it was sampled, and a batch as it is learned from. Data only; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """One answer asked for. The key decides its random numbers, whatever slot or order it meets."""

    prompt_ids: tuple[int, ...]
    key: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One answer as sampled.

    `response_ids` ends in the stop token, or in the token that completes a stop string, unless `truncated`.
    `logprob_T` is each response token's log-probability (nats) under the distribution it was drawn from;
    `policy_logprob_T` that under softmax(logits / temperature) of the same logits, whatever top-k, top-p or
    min-p left of it: this one is compared with the learner's. The two are equal without truncation.
    """

    prompt_ids: tuple[int, ...]
    response_ids: np.ndarray
    logprob_T: np.ndarray
    truncated: bool
    policy_logprob_T: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through a layer together, right-padded: plain causal attention needs no mask.

    `row_B`: their places in the batch. `token_BT`: prompt and response but for the last token, which
    predicts nothing. `place_N`: flat places in [B, T] of the states that predict a response token,
    `target_N`: that token, both row by row.
    """

    row_B: np.ndarray
    token_BT: np.ndarray
    place_N: np.ndarray
    target_N: np.ndarray


def micro_batches(rollouts: Sequence[Rollout], budget_tokens: int) -> list[MicroBatch]:
    """Cut into micro-batches of at most `budget_tokens` padded tokens (at least one sequence each).

    The longest come first, so that what does not fit in memory fails at once.
    """
    order = sorted(range(len(rollouts)), key=lambda i: (-rollouts[i].tokens, i))
    groups: list[list[int]] = []
    for row in order:
        longest = rollouts[groups[-1][0]].tokens - 1 if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= budget_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_pad(rollouts, group) for group in groups]


def _pad(rollouts: Sequence[Rollout], group: list[int]) -> MicroBatch:
    width = rollouts[group[0]].tokens - 1
    token_BT = np.zeros((len(group), width), dtype=np.int64)
    place, target = [], []
    for b, row in enumerate(group):
        rollout = rollouts[row]
        ids = np.concatenate([np.asarray(rollout.prompt_ids), rollout.response_ids])
        token_BT[b, : len(ids) - 1] = ids[:-1]
        first = len(rollout.prompt_ids) - 1
        place.append(b * width + np.arange(first, len(ids) - 1))
        target.append(rollout.response_ids)
    return MicroBatch(
        row_B=np.asarray(group),
        token_BT=token_BT,
        place_N=np.concatenate(place),
        target_N=np.concatenate(target).astype(np.int64),
    )
