"""A rollout as it was sampled, and a batch as it is learned from. Data only; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARED_TOKENS = 2048  # of a row with several responses: the mask of a micro-batch grows with its width


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
    """Rows that go through a layer together, right-padded. A row is a prompt and responses to it.

    `token_BT`: a prompt and, of each response, all but the last token, which predicts nothing.
    `row_R`: the places in the batch of the rollouts, those that stand first in their rows before those that
    stand second, and so on. `place_N`: flat places in [B, T] of the states that predict a response token,
    `target_N`: that token, both rollout by rollout; the state after a prompt predicts for all its responses,
    so `turns` says which parts of N hold no place twice.
    `segment_BT`: 0 in a prompt, i in the i-th response; a token sees its prompt and its own response up to
    itself, and stands where it stood in its own sequence (`position_BT`). Both None where every row has one
    response: then plain causal attention sees to it.
    """

    row_R: np.ndarray
    token_BT: np.ndarray
    place_N: np.ndarray
    target_N: np.ndarray
    turns: list[slice]
    segment_BT: np.ndarray | None = None
    position_BT: np.ndarray | None = None


@dataclass
class _Row:
    """Rollouts with one prompt, and how many tokens they take together."""

    members: list[int]
    width: int


def micro_batches(rollouts: Sequence[Rollout], budget_tokens: int, pair_cost: float) -> list[MicroBatch]:
    """Cut into micro-batches of at most `budget_tokens` padded tokens (at least one rollout each).

    Responses to one prompt stand in one row, behind it, where that saves work: a row of w tokens costs
    w + pair_cost w^2 (attention looks at all pairs, and masks those that do not see each other), a sequence
    by itself w + pair_cost w^2 / 2. The longest rows come first, so that what does not fit in memory fails
    at once. Source: shared prefixes of a group, arXiv 2506.05433; Differs: one masked attention.
    """
    most = min(budget_tokens, SHARED_TOKENS)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(rollouts)), key=lambda i: (-rollouts[i].tokens, i)):
        by_prompt.setdefault(rollouts[index].prompt_ids, []).append(index)
    rows: list[_Row] = []
    for prompt, members in by_prompt.items():
        open_rows: list[_Row] = []
        for index in members:
            own = len(rollouts[index].response_ids) - 1
            alone = len(prompt) + own

            def saves(row: _Row, own: int = own, alone: int = alone) -> bool:
                more = own + pair_cost * (2 * row.width * own + own**2)
                return row.width + own <= most and more < alone + pair_cost * alone**2 / 2

            row = next(filter(saves, open_rows), None)
            if row is None:
                open_rows.append(_Row([index], alone))
            else:
                row.members.append(index)
                row.width += own
        rows += open_rows
    rows.sort(key=lambda row: (-row.width, row.members[0]))
    groups: list[list[_Row]] = []
    for row in rows:
        if groups and groups[-1][0].width * (len(groups[-1]) + 1) <= budget_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_pad(rollouts, group) for group in groups]


def _pad(rollouts: Sequence[Rollout], rows: list[_Row]) -> MicroBatch:
    shape = (len(rows), rows[0].width)
    token_BT, segment_BT, position_BT = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    end_B = []
    for b, row in enumerate(rows):
        prompt = rollouts[row.members[0]].prompt_ids
        token_BT[b, : len(prompt)] = prompt
        position_BT[b, : len(prompt)] = np.arange(len(prompt))
        end_B.append(len(prompt))
    index, place, target, turns, done = [], [], [], [], 0
    for turn in range(max(len(row.members) for row in rows)):
        began = done
        for b, row in enumerate(rows):
            if turn >= len(row.members):
                continue
            rollout, start = rollouts[row.members[turn]], end_B[b]
            own = len(rollout.response_ids) - 1
            end_B[b] = start + own
            token_BT[b, start : start + own] = rollout.response_ids[:-1]
            segment_BT[b, start:] = turn + 1  # padding sees as the last response does; nothing sees it
            prompt_tokens = len(rollout.prompt_ids)
            position_BT[b, start : start + own] = prompt_tokens + np.arange(own)
            index.append(row.members[turn])
            place.append(b * shape[1] + np.concatenate([[prompt_tokens - 1], np.arange(start, start + own)]))
            target.append(rollout.response_ids)
            done += own + 1
        turns.append(slice(began, done))
    shared = len(turns) > 1
    return MicroBatch(
        row_R=np.asarray(index),
        token_BT=token_BT,
        place_N=np.concatenate(place),
        target_N=np.concatenate(target).astype(np.int64),
        turns=turns,
        segment_BT=segment_BT if shared else None,
        position_BT=position_BT if shared else None,
    )
