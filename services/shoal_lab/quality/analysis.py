"""``shoal analyze``: draw responses, ask the gates, then measure what skipping would really cost.

Three quantities for each number of skipped layers: what the gates predict, the divergence from full depth, and what
the model's own responses lose. Only the first comes from the samples that the gates saw.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter

from shoal.errors import ConfigError
from shoal.model.files import ModelFiles
from shoal.model.plan import LayerPlan
from shoal_lab.quality.gated import GatedModel
from shoal_lab.quality.importance import GateGradients, Importance
from shoal_lab.quality.limits import MIN_SAMPLES
from shoal_lab.quality.losses import Loss, measure_losses
from shoal_lab.quality.prompts import Prompt, digest_of, held_out, read_prompts, shipped_prompts
from shoal_lab.quality.responses import draw_response
from shoal_lab.quality.subject import Subject

_DEFAULT_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
# Held-out responses are drawn as other choices than those that the gates saw.
_FIRST_HELD_OUT_CHOICE = 1 << 32

Progress = Callable[[str, int, int], None]
Response = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """``num_samples`` responses for the gates, and a quarter as many held out, to measure with.

    ``candidates`` are numbers of skipped layers; ``max_loss`` (nats a token of divergence) is what may be lost.
    """

    data: Path | None = None
    num_samples: int = 200
    response_tokens: int = 64
    prompt_tokens: int = 512
    seed: int = 0
    candidates: tuple[int, ...] = ()
    max_loss: float = 0.02
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))


@dataclass(frozen=True, slots=True)
class AnalysisSettings:
    """All that the figures depend on, besides the machine. ``data`` is the digest of the prompts."""

    model: str
    model_digest: str
    data: str
    seed: int
    response_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A response, and what it says to the gates."""

    response: Response
    gradients: GateGradients


@dataclass(frozen=True, slots=True)
class Candidate:
    """What skipping the last ``num_skipped`` layers is predicted to cost (nats a token), and what it costs."""

    num_skipped: int
    predicted_loss: float
    measured: Loss


@dataclass(frozen=True, slots=True)
class Analysis:
    """The result, as ``analysis.json`` has it. ``response_tokens`` is the mean length of what the gates saw."""

    settings: AnalysisSettings
    num_layers: int
    num_samples: int
    num_held_out: int
    response_tokens: float
    importance: Importance
    candidates: tuple[Candidate, ...]
    max_loss: float
    recommended_skip_layers: int

    @property
    def contrast(self) -> float:
        """How many times as much the last third of the layers matters to the answer as to the prompt."""
        on_prompt = self.importance.prefill.last_third()
        return self.importance.decode.last_third() / on_prompt if on_prompt else math.inf

    def to_json(self) -> str:
        return _ANALYSIS.dump_json(self, indent=2).decode() + "\n"


_ANALYSIS = TypeAdapter(Analysis)


def analyze(files: ModelFiles, options: AnalysisOptions, on_progress: Progress) -> Analysis:
    """Raises ConfigError or ModelError."""
    run = _Run(files, options, on_progress)
    seen, checked = run.samples()
    importance = Importance.of([sample.gradients for sample in seen])
    response_tokens = sum(len(sample.response) for sample in seen) / len(seen)
    candidates = tuple(
        Candidate(num_skipped, importance.predicted_loss(num_skipped) / response_tokens, loss)
        for num_skipped, loss in zip(run.candidates, run.losses(checked), strict=True)
    )
    fitting = [found.num_skipped for found in candidates if found.measured.divergence.mean <= options.max_loss]
    return Analysis(
        settings=run.settings,
        num_layers=run.num_layers,
        num_samples=len(seen),
        num_held_out=len(checked),
        response_tokens=response_tokens,
        importance=importance,
        candidates=candidates,
        max_loss=options.max_loss,
        recommended_skip_layers=max(fitting, default=0),
    )


def default_candidates(num_layers: int) -> tuple[int, ...]:
    """A handful, up to half of the layers; a third, which is what serving skips by default, is one of them."""
    counts = {num_layers // 3, *(int(num_layers * share) for share in _DEFAULT_SHARES)}
    return tuple(sorted(counts - {0}))


class _Run:
    """What the two passes over a model share. All that can be refused without its weights is refused here."""

    def __init__(self, files: ModelFiles, options: AnalysisOptions, on_progress: Progress) -> None:
        spec = files.spec()
        self.num_layers = spec.num_layers
        self.candidates = tuple(sorted(set(options.candidates))) or default_candidates(spec.num_layers)
        for num_skipped in self.candidates:
            LayerPlan(spec.num_layers, num_skipped)
            if num_skipped < 1:
                raise ConfigError("to skip no layer costs nothing: give --candidates of 1 and more")
        if options.num_samples < MIN_SAMPLES:
            raise ConfigError(f"{options.num_samples} samples tell nothing: ask for {MIN_SAMPLES} or more")
        self._files, self._options, self._on_progress = files, options, on_progress
        prompts = _prompts(
            files, options, min(options.prompt_tokens, spec.max_context_tokens - options.response_tokens)
        )
        self._to_learn, self._to_check = held_out(prompts)
        self._eos_token_ids = files.eos_token_ids()
        self.settings = AnalysisSettings(
            model=files.model_id,
            model_digest=files.digest,
            data=digest_of(prompts),
            seed=options.seed,
            response_tokens=options.response_tokens,
            dtype=str(options.dtype).removeprefix("torch."),
        )

    def samples(self) -> tuple[list[Sample], list[tuple[Prompt, Response]]]:
        """(those that the gates saw, texts that are held out), a quarter as many."""
        options = self._options
        gated = GatedModel.load(
            self._files, dtype=options.dtype, device=options.device, on_progress=partial(self._on_progress, "weights")
        )
        seen, checked = list[Sample](), list[tuple[Prompt, Response]]()
        total = options.num_samples + options.num_samples // 4
        for index in range(total):
            self._on_progress("responses", index, total)
            if index < options.num_samples:
                seen.append(self._learn(gated, index))
            else:
                number = index - options.num_samples
                checked.append(self._draw(gated, self._to_check, number, _FIRST_HELD_OUT_CHOICE + number))
        self._on_progress("responses", total, total)
        return seen, checked

    def losses(self, texts: Sequence[tuple[Prompt, Response]]) -> list[Loss]:
        """One for each of ``candidates``."""
        gc.collect()  # a gated model's hooks and modules hold one another, and there may be no room for two models
        subject = Subject.load(
            self._files,
            dtype=self._options.dtype,
            device=self._options.device,
            max_tokens=max(len(prompt) + len(response) for prompt, response in texts),
            on_progress=partial(self._on_progress, "layers"),
        )
        return measure_losses(subject, texts, self.candidates, partial(self._on_progress, "held-out responses"))

    def _learn(self, gated: GatedModel, index: int) -> Sample:
        prompt, response = self._draw(gated, self._to_learn, index, index)
        found = gated.gradients(prompt, response)
        return Sample(response, GateGradients(tuple(found.prefill.tolist()), tuple(found.decode.tolist())))

    def _draw(self, gated: GatedModel, prompts: Sequence[Prompt], index: int, choice: int) -> tuple[Prompt, Response]:
        options, prompt = self._options, prompts[index % len(prompts)]
        response = draw_response(
            gated, prompt, choice=choice, seed=options.seed, max_tokens=options.response_tokens,
            eos_token_ids=self._eos_token_ids,
        )  # fmt: skip
        return prompt, response


def _prompts(files: ModelFiles, options: AnalysisOptions, max_tokens: int) -> list[Prompt]:
    tokenizer = files.tokenizer()
    if options.data is not None:
        return read_prompts(options.data, tokenizer, max_tokens=max_tokens)
    prompts = [prompt for prompt in shipped_prompts(tokenizer) if len(prompt) <= max_tokens]
    if len(prompts) < 2:
        raise ConfigError(f"no shipped prompt fits {max_tokens} tokens: raise --prompt-tokens, or give --data")
    return prompts
