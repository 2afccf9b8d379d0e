"""A better K/V projection than the paper's, learnt from text: in closed form first, then end to end.

::

    text ──full depth──> state at layer K ─┬─> sums ──solve──> ridge: K/V of the skipped layers, token by token
                         K/V above K ──────┘                     │
                         last state ──────────────────────────> refine: what the continuation says, over all of it

The ridge solution (method: n(h) onto the full model's K/V, regularised towards the paper's matrix) makes each token's
K/V as right as a linear map can. It weighs all errors alike, but a reader doesn't: so the matrix is then moved, by
gradient, towards the full model's next-token distribution on the continuation of a shallow prompt (KL divergence).
Both keep the shapes: serving costs the same. The first skipped layer keeps the paper's matrix, which is exact there,
and so do the first few tokens in all layers, on which attention rests: their states are unlike all others, and what is
learnt with them is worse for these and for the rest.

Memory beside the model and the sums (normal_equations.py): a passage of T tokens keeps ``T d`` numbers of its state in
the model's dtype, and the refinement three float32 copies of the matrix ``S · 2 kv · d``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from shoal.errors import CalibrationError, ConfigError, InternalError, TooLittleText
from shoal.model.norm import rms_norm
from shoal.model.plan import LayerPlan
from shoal.model.projection import KvProjection
from shoal.model.rope import Rope
from shoal_lab.quality.normal_equations import NormalEquations
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.texts import Passage

# (what is done, of how many)
Progress = Callable[[str, int, int], None]

RIDGES = (0.01, 0.03, 0.1, 0.3)
RIDGES_SINKS_APART = (0.1, 0.3, 1.0)
"""Held-out text of the kinds that were learnt from would choose less, which other kinds then suffer from."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """``ridges`` are tried on held-out passages, in units of the inputs' mean square. A step sees one passage.

    The first ``num_sinks`` positions are left out of the sums. With ``sinks_apart`` they keep the paper's matrix; else
    theirs is the learnt one, too.
    """

    num_skipped: int
    ridges: tuple[float, ...] = RIDGES
    num_sinks: int = 4
    sinks_apart: bool = False
    num_steps: int = 1000
    learning_rate: float = 3e-4
    held_out_every: int = 10
    seed: int = 0

    @property
    def num_apart(self) -> int:
        """How many positions keep the paper's matrix."""
        return self.num_sinks if self.sinks_apart else 0


@dataclass(frozen=True, slots=True)
class Example:
    """A passage as the full model sees it: ``state`` ``[tokens, hidden]`` that left the last kept layer, and ``final``
    ``[continuation + 1, hidden]`` that left the last one, from the boundary token on."""

    passage: Passage
    state: torch.Tensor
    final: torch.Tensor

    @property
    def ids(self) -> tuple[int, ...]:
        return self.passage.prompt + self.passage.continuation

    @property
    def shallow(self) -> range:
        return range(len(self.passage.prompt) - 1)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was learnt: ``weight`` ``[S * 2 * kv_size, hidden]``, and divergences on held-out passages by its stages."""

    weight: torch.Tensor
    ridge: float
    scores: dict[str, float]


class Calibrator:
    """Learns for one number of skipped layers of ``subject``."""

    def __init__(self, subject: Subject, options: CalibrationOptions, on_progress: Progress) -> None:
        self.subject = subject
        self.options = options
        self.plan = LayerPlan(subject.spec.num_layers, options.num_skipped)
        if options.num_skipped < 2:
            raise ConfigError("with fewer than two skipped layers a shallow prompt loses nothing: skip more")
        self.paper: KvProjection = subject.projection(options.num_skipped)
        self._on_progress = on_progress

    def run(self, passages: Sequence[Passage]) -> Calibrated:
        """Everything, on ``passages``. Raises CalibrationError."""
        learnt, held_out, sums = self.observe(passages)
        if not (learnt and held_out):
            every = self.options.held_out_every
            raise TooLittleText(f"of {len(passages)} passages none is held out, one in {every} should: give more text")
        weight, ridge = self.solve(sums, held_out)
        refined = self.refine(weight, learnt)
        stages = {"paper": self.paper.weight, "ridge": weight, "refined": refined}
        scores = {name: self.mean_divergence(stage, held_out) for name, stage in stages.items()}
        best = min(scores, key=scores.__getitem__)
        if best == "paper":
            told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            raise CalibrationError(
                f"nothing that was learnt beats the paper's projection on held-out passages ({told} nats a token): "
                "give more text, or text that is more alike"
            )
        return Calibrated(stages[best], ridge, scores)

    def observe(self, passages: Sequence[Passage]) -> tuple[list[Example], list[Example], NormalEquations]:
        """One full-depth pass over ``passages``: those to learn from, those held out, and the sums of the former."""
        num_outputs, num_inputs = self.paper.weight.shape
        sums = NormalEquations(num_inputs, num_outputs, self.paper.weight.device)
        learnt: list[Example] = []
        held_out: list[Example] = []
        for index, passage in enumerate(passages):
            is_held_out = index % self.options.held_out_every == self.options.held_out_every - 1
            (held_out if is_held_out else learnt).append(self._observe(passage, None if is_held_out else sums))
            self._on_progress("observing", index + 1, len(passages))
        return learnt, held_out, sums

    @torch.inference_mode()
    def _observe(self, passage: Passage, sums: NormalEquations | None) -> Example:
        ids = passage.prompt + passage.continuation
        num_kept, rows = self.plan.num_kept, slice(self.options.num_sinks, None)
        per_layer = self.paper.weight.shape[0] // self.options.num_skipped
        state = inputs = torch.empty(0)
        for layer, hidden in enumerate(self._states(ids)):
            if layer == num_kept:
                state, inputs = hidden, self._normed(hidden)[rows]
                if sums is not None:
                    sums.add_inputs(inputs)
            if layer >= num_kept and layer < self.plan.num_layers and sums is not None:
                first = (layer - num_kept) * per_layer
                own = F.linear(self._normed(hidden)[rows], self.paper.weight[first : first + per_layer])
                sums.add_outputs(inputs, first, own)
        if not bool(torch.isfinite(hidden).all()):
            raise CalibrationError("the model's states on this text aren't finite: are its weights damaged?")
        return Example(passage, state.clone(), hidden[len(passage.prompt) - 1 :].clone())

    def _states(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        full = LayerPlan(self.plan.num_layers, 0)
        decoder, batch = self.subject.step(full, self.subject.parameters, ids, len(ids), range(0))
        rope = Rope.at(self.subject.spec, batch.positions, decoder.dtype)
        return decoder.states(batch, rope, self.subject.pool)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, None, self.subject.spec.norm_eps)

    # --- judging ----------------------------------------------------------------------------------------

    def divergence(self, weight: torch.Tensor, example: Example) -> torch.Tensor:
        """KL divergence (nats a token, mean) of the shallow prompt's continuation from the full model's."""
        projection = self.paper.replaced(weight.to(self.paper.weight.dtype), self.options.num_apart)
        parameters = replace(self.subject.parameters, projection=projection)
        num_prompt = len(example.passage.prompt)
        decoder, batch = self.subject.step(self.plan, parameters, example.ids, num_prompt, example.shallow)
        rope = Rope.at(self.subject.spec, batch.positions, decoder.dtype)
        shallow = decoder.deepen(batch, example.state, rope, self.subject.new_pool()).logits
        with torch.no_grad():
            full = decoder.logits(example.final, torch.arange(len(example.final), device=example.final.device))
        if shallow is None or full is None:
            raise InternalError("a whole model gave no logits")
        ours, theirs = (_wide(logits).log_softmax(-1) for logits in (shallow, full))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()

    @torch.no_grad()
    def mean_divergence(self, weight: torch.Tensor, examples: Sequence[Example]) -> float:
        return sum(self.divergence(weight, example).item() for example in examples) / len(examples)

    # --- learning ---------------------------------------------------------------------------------------

    def solve(self, sums: NormalEquations, held_out: Sequence[Example]) -> tuple[torch.Tensor, float]:
        """The ridge solution that diverges least on ``held_out``, and its ridge."""
        found: tuple[float, torch.Tensor, float] | None = None
        for index, ridge in enumerate(self.options.ridges):
            weight = self._exact_first(sums.solve(self.paper.weight, ridge).to(_wide(self.paper.weight).dtype))
            divergence = self.mean_divergence(weight, held_out)
            if not math.isfinite(divergence):
                raise CalibrationError("what the model says of this text isn't finite: are its weights damaged?")
            if found is None or divergence < found[0]:
                found = divergence, weight, ridge
            self._on_progress("solving", index + 1, len(self.options.ridges))
        if found is None:
            raise CalibrationError("no ridge to try: name one at least")
        return found[1], found[2]

    def refine(
        self, weight: torch.Tensor, learnt: Sequence[Example], on_step: Callable[[int, float], None] | None = None
    ) -> torch.Tensor:
        """``weight`` moved towards the full model's continuations, one passage a step (Adam, cosine schedule)."""
        options = self.options
        moved = weight.clone().requires_grad_()
        optimizer = torch.optim.Adam([moved], lr=options.learning_rate, betas=(0.9, 0.99))
        generator = torch.Generator().manual_seed(options.seed)
        order: list[int] = []
        for step in range(options.num_steps):
            order = order or torch.randperm(len(learnt), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(step, options.num_steps)
            loss = self.divergence(moved, learnt[order.pop()])
            if not math.isfinite(loss.item()):
                raise CalibrationError("the refinement diverged: lower --learning-rate")
            (gradient,) = torch.autograd.grad(loss, moved)
            moved.grad = self._exact_first(gradient, 0.0)
            optimizer.step()
            if on_step is not None:
                on_step(step, loss.item())
            self._on_progress("refining", step + 1, options.num_steps)
        return moved.detach()

    def _exact_first(self, weight: torch.Tensor, value: float | None = None) -> torch.Tensor:
        """The first skipped layer's rows as the paper has them, or ``value``: its K/V come from the true state."""
        rows = slice(0, self.paper.weight.shape[0] // self.options.num_skipped)
        weight[rows] = self.paper.weight[rows].to(weight.dtype) if value is None else value
        return weight


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _schedule(step: int, num_steps: int) -> float:
    """A short warm-up, then half a cosine down to nothing."""
    return min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
