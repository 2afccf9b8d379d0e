"""One text, read at full depth once, from which every arm goes on.

The kept layers compute the same for all arms: below layer K a shallow token is a full one. So the states that enter
layer K in the full-depth pass are every arm's, and what an arm costs is its projection, and the deep layers for the
boundary token and what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from shoal.errors import InternalError, ModelError
from shoal.model.plan import LayerPlan
from shoal.model.rope import Rope
from shoal.wire.messages import Depth
from shoal_lab.quality.arms import Arm
from shoal_lab.quality.subject import Subject, Treatment


class Reading:
    """``ids`` with a prompt of ``num_prompt_tokens``, for ``arms`` that skip one of ``counts`` layers, or none.

    Holds ``[tokens, hidden]`` a count. The next reading of the same subject takes its place in the pool. Raises
    InvalidRequest if the text is longer than the subject's ``max_tokens``, or has no prompt.
    """

    @torch.inference_mode()
    def __init__(self, subject: Subject, ids: Sequence[int], num_prompt_tokens: int, counts: Iterable[int]) -> None:
        self._subject, self._ids, self._num_prompt = subject, tuple(ids), num_prompt_tokens
        self._num_layers = num_layers = subject.spec.num_layers
        entering = {num_layers - count: count for count in counts}
        decoder, batch = subject.step(LayerPlan(num_layers, 0), subject.parameters, ids, num_prompt_tokens, range(0))
        self._decoder, self._rows = decoder, batch.logit_rows
        self._rope = Rope.at(subject.spec, batch.positions, decoder.dtype)
        self._states: dict[int, torch.Tensor] = {}
        hidden = torch.empty(0)
        for layer, hidden in enumerate(decoder.states(batch, self._rope, subject.pool)):
            if layer in entering:
                self._states[entering[layer]] = hidden
        self.full = self._head(hidden)
        if not bool(torch.isfinite(self.full).all()):
            raise ModelError("what the model says of this text isn't finite: are its weights damaged?")

    @torch.inference_mode()
    def logits(self, arm: Arm) -> torch.Tensor:
        """``[len(ids) - N + 1, vocab]`` after each of the tokens ``N-1..``, with ``ids`` given, not generated."""
        if arm.int8_prompt:
            return self._all_in_int8(arm)
        if arm.int8:
            return self._in_int8(arm)
        if arm.treatment is Treatment.FULL:
            return self.full
        state = self._states[arm.num_skipped]
        if arm.treatment is Treatment.REMOVED:
            return self._head(state)
        if arm.treatment is Treatment.NO_BOUNDARY:
            first = self._head(state, self._rows[:1])
            shallow = range(self._num_prompt)
            return first if len(self._rows) == 1 else torch.cat([first, self._deepen(arm, state, shallow)])
        return self._deepen(arm, state, arm.plan(self._num_layers).shallow_tokens(self._num_prompt, Depth.SHALLOW))

    def _in_int8(self, arm: Arm) -> torch.Tensor:
        """Decode's weights are in int8. A shallow prompt's K/V are prefill's, whose weights aren't; a prompt at full
        depth is decode's own work."""
        own, num_shallow = self._subject.in_int8, 0
        if arm.treatment is not Treatment.FULL:
            self.logits(replace(arm, int8=False))
            for held, arrived in zip(own.pool.layers, self._subject.pool.layers, strict=True):
                held.copy_(arrived)
            num_shallow = len(arm.plan(self._num_layers).shallow_tokens(self._num_prompt, Depth.SHALLOW))
        return _given(own.go_on(self._ids, self._num_prompt, num_shallow))

    def _all_in_int8(self, arm: Arm) -> torch.Tensor:
        """All but the projection: as prefill computes a shallow prompt, or decode by itself."""
        own, plan = self._subject.in_int8, arm.plan(self._num_layers)
        shallow = plan.shallow_tokens(self._num_prompt, Depth.SHALLOW)
        projection = arm.projection or self._subject.projection(arm.num_skipped)
        decoder, batch = own.step(
            plan, replace(own.parameters, projection=projection), self._ids, self._num_prompt, shallow
        )
        return _given(decoder.forward(batch, own.pool).logits)

    def _deepen(self, arm: Arm, state: torch.Tensor, shallow: range) -> torch.Tensor:
        subject = self._subject
        plan = LayerPlan(subject.spec.num_layers, arm.num_skipped)
        parameters = replace(subject.parameters, projection=arm.projection or subject.projection(arm.num_skipped))
        decoder, batch = subject.step(
            plan, parameters, self._ids, max(self._num_prompt, shallow.stop + 1), shallow,
            hides_shallow=arm.treatment in {Treatment.NO_PROJECTION, Treatment.SPEED},
        )  # fmt: skip
        return _given(decoder.deepen(batch, state, self._rope, subject.pool).logits)

    def _head(self, state: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        return _given(self._decoder.logits(state, self._rows if rows is None else rows))


def _given(logits: torch.Tensor | None) -> torch.Tensor:
    if logits is None:
        raise InternalError("a whole model gave no logits")
    return logits
