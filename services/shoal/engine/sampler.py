"""The next token of every row of a step: chosen (backends/chooser.py) where it is allowed, with its log-probabilities.

::

    logits [rows, vocab] -- minus banned ids --+-- argmax -------------------------------------- token id
                                               +-- / temperature, top k, top p -- cdf at u ------ token id
    logits [rows, vocab] -- log_softmax ----------------------------------------- log-probabilities
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.backends.chooser import Chooser, SampleRow, TorchChooser
from shoal.engine.logprobs import NOT_FINITE, score
from shoal.errors import InternalError


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen, and what ``num_logprobs`` asked for: natural logarithms, of the unmodified distribution.

    ``top`` holds the likeliest ``(token_id, logprob)``, best first, equal ones by id.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SampleRow], chooser: Chooser | None = None) -> list[Sampled]:
    """Choose one token for each of ``rows`` from ``logits`` ``[R, vocab]`` (any float dtype, any device); without
    a ``chooser``, torch does it.

    Equal logits of a greedy row go to the lowest id. ``logits`` are left as they are. Raises InternalError where a
    row has no finite maximum (NaN, infinity), or none among the tokens that aren't banned.
    """
    if not rows:
        return []
    chooser = chooser or TorchChooser()
    raw = _gather(logits, rows)
    likeliest, are_finite = chooser.likeliest(raw)
    if not are_finite:  # a NaN is the likeliest, too
        raise InternalError(NOT_FINITE)
    allowed, chosen = _without_banned(raw, rows), likeliest
    if allowed is not raw:
        chosen, are_finite = chooser.likeliest(allowed)
        if not are_finite:
            raise InternalError(NOT_FINITE)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        at = torch.tensor(drawn, device=raw.device)
        of_drawn = allowed if len(drawn) == len(rows) else allowed[at]
        chosen[at] = chooser.drawn(of_drawn, [rows[i] for i in drawn])
    token_ids: list[int] = chosen.tolist()
    sampled = [Sampled(token_id) for token_id in token_ids]
    told = [i for i, row in enumerate(rows) if row.params.num_logprobs is not None]
    if told:
        scored = score(raw[told], [token_ids[i] for i in told], [rows[i].params.num_logprobs or 0 for i in told])
        for i, one in zip(told, scored, strict=True):
            sampled[i] = Sampled(one.token_id, one.logprob, one.top)
    return sampled


def _gather(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """A row for each of ``rows``; not to be written to."""
    index = [row.row_index for row in rows]
    if index == list(range(len(logits))):
        return logits
    return logits.index_select(0, torch.tensor(index, device=logits.device))  # where there is none, it's an error


def _without_banned(raw: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """``raw`` itself if nothing is banned.

    Raises InternalError if a row has nothing else."""
    num_tokens = raw.shape[-1]
    banned = [{i for i in row.banned_token_ids if 0 <= i < num_tokens} for row in rows]
    if not any(banned):
        return raw
    if any(len(ids) == num_tokens for ids in banned):
        raise InternalError("every token of the vocabulary is banned: nothing is left to choose")
    pairs = [(i, token_id) for i, ids in enumerate(banned) for token_id in ids]
    at, token_ids = torch.tensor(pairs, device=raw.device).unbind(dim=1)
    allowed = raw.clone()
    allowed[at, token_ids] = -torch.inf
    return allowed
