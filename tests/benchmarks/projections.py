"""Which ways of learning a K/V projection recover more of what a shallow prompt loses: same text, one run.

    python tests/benchmarks/projections.py [--kind technical] [--skip-layers 10] [--json FILE]

Every way learns from the calibration split of all kinds but ``--kind``, and is judged on that kind's: the evaluation
split stays unseen, for a way is chosen by these figures. They are the perplexity of 128 tokens after a prompt of 512,
the share of the paper's loss that is recovered, and the divergence from full depth. Everything but the closed forms is
learnt as ``shoal calibrate`` refines: Adam, one passage a step, towards the full model's next-token distribution along
the shallow trajectory.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from shoal.model.files import locate
from shoal.model.norm import rms_norm
from shoal.model.projection import KvProjection
from shoal.model.rope import Rope
from shoal.model.rows import TorchRows
from shoal_lab.quality.calibration import CalibrationOptions, Calibrator, Example
from shoal_lab.quality.normal_equations import NormalEquations
from shoal_lab.quality.subject import Subject
from shoal_lab.quality.texts import Kind, Passage, Split, load, opening, passages

PROMPT, CONTINUATION = 512, 128


@dataclass(frozen=True)
class Way:
    """A projection with more or less to learn. ``learnt`` are its parameters; the first skipped layer stays exact."""

    name: str
    learnt: tuple[torch.Tensor, ...]
    projection: Callable[..., Any]


class Corrected:
    """``h + U V n(h)`` instead of ``h``: a low-rank correction of the state before the paper's projection."""

    def __init__(self, paper: KvProjection, eps: float, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor):
        self._paper, self._eps, self._down, self._up = paper.replaced(weight), eps, down, up

    def __call__(self, hidden: torch.Tensor, rope: Rope) -> torch.Tensor:
        moved = F.linear(F.linear(rms_norm(hidden, None, self._eps), self._down), self._up)
        exact, corrected = self._paper(hidden, rope), self._paper(hidden + moved, rope)
        return torch.cat([exact[:1], corrected[1:]])


def main() -> None:
    options = _options()
    files = locate("smollm2")
    subject = Subject.load(files, dtype=torch.float32, max_tokens=PROMPT + CONTINUATION)
    calibrator = Calibrator(subject, CalibrationOptions(options.skip_layers, num_steps=options.steps), lambda *_: None)
    kinds = [kind for kind in Kind if kind != options.kind]
    seen = [one for kind in kinds for one in _cut(files, kind, Split.CALIBRATION, options.passages)]
    learnt, held_out, sums = calibrator.observe(seen)
    judged, _, _ = replace_held_out(calibrator).observe(_cut(files, options.kind, Split.CALIBRATION, options.judged))
    ridge, chosen = calibrator.solve(sums, held_out)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as bar:
        for way in ways(calibrator, ridge, sums, attended(calibrator, learnt, chosen, bar)):
            if way.learnt:
                learn(calibrator, way, learnt, options, bar)
            rows.append(
                {"way": way.name, "learnt": sum(tensor.numel() for tensor in way.learnt)}
                | judge(calibrator, way, judged)
            )
    full, paper = rows[0]["nats"], rows[1]["nats"]
    for row in rows:
        row["recovered"] = (
            None if row["way"] in {"full depth", "the paper's"} else 1 - (row["nats"] - full) / (paper - full)
        )
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result = {"settings": settings | {"ridge": chosen, "texts": kinds}, "rows": rows}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2, default=str) + "\n")
    _print(rows)


def replace_held_out(calibrator: Calibrator) -> Calibrator:
    """One that holds nothing out of what it observes."""
    other = copy.copy(calibrator)
    other.options = replace(calibrator.options, held_out_every=10**9)
    return other


@torch.no_grad()
def attended(calibrator: Calibrator, learnt: Sequence[Example], ridge: float, bar: Progress) -> torch.Tensor:
    """The ridge solution where, in each layer, a token weighs as much as the continuation attends to it there."""
    subject, plan, num_sinks = calibrator.subject, calibrator.plan, calibrator.options.num_sinks
    rows = calibrator.paper.weight.shape[0] // plan.num_skipped
    priors = torch.split(calibrator.paper.weight, rows)
    sums = [NormalEquations(calibrator.paper.weight.shape[1], rows) for _ in priors]
    for example in bar.track(learnt, description="ridge, by attention"):
        inputs = torch.empty(0)
        for layer, hidden in enumerate(calibrator._states(example.ids)):
            if not plan.num_kept <= layer < plan.num_layers:
                continue
            normed = rms_norm(hidden, None, subject.spec.norm_eps)
            inputs = normed if layer == plan.num_kept else inputs
            mass = attention_mass(subject, layer, hidden, len(example.passage.prompt))[num_sinks:]
            scale = (mass / mass.mean()).sqrt()[:, None]
            mine, prior = sums[layer - plan.num_kept], priors[layer - plan.num_kept]
            mine.add_inputs(inputs[num_sinks:] * scale)
            mine.add_outputs(inputs[num_sinks:] * scale, 0, F.linear(normed[num_sinks:], prior) * scale)
    return calibrator._exact_first(
        torch.cat([one.solve(prior, ridge) for one, prior in zip(sums, priors, strict=True)]).float()
    )


def attention_mass(subject: Subject, layer: int, hidden: torch.Tensor, num_prompt: int) -> torch.Tensor:
    """``[tokens]``: what the tokens from the boundary on attend to each, summed over them and the heads."""
    spec, own = subject.spec, subject.parameters.layers[layer]
    heads = TorchRows(spec).linear(rms_norm(hidden, own.input_norm, spec.norm_eps), own.qkv, own.qkv_bias)
    heads = heads.view(len(hidden), -1, spec.head_dim)[:, : spec.num_heads + spec.num_kv_heads]
    positions = torch.arange(len(hidden))
    Rope.at(spec, positions, hidden.dtype).rotate_(heads, spec.layers[layer].rope)
    queries, keys = heads[num_prompt - 1 :, : spec.num_heads], heads[:, spec.num_heads :]
    keys = keys.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * spec.attention_scale
    hidden_from = positions[None] > positions[num_prompt - 1 :, None]
    return scores.masked_fill(hidden_from, -torch.inf).softmax(-1).sum((0, 1))


def ways(calibrator: Calibrator, ridge: torch.Tensor, sums: NormalEquations, by_attention: torch.Tensor) -> list[Way]:
    paper, eps = calibrator.paper, calibrator.subject.spec.norm_eps
    own = paper.weight.clone()
    unprior = calibrator._exact_first(sums.solve(torch.zeros_like(own), 0.03).float())
    hidden = own.shape[1]
    generator = torch.Generator().manual_seed(0)
    down, up = 0.02 * torch.randn(64, hidden, generator=generator), torch.zeros(hidden, 64)

    def biased(weight: torch.Tensor, bias: torch.Tensor) -> KvProjection:
        other = paper.replaced(weight)
        other.bias = bias
        return other

    def apart(weight: torch.Tensor) -> KvProjection:
        return paper.replaced(weight, calibrator.options.num_sinks)

    weight, again, third, fourth = ridge.clone(), own.clone(), ridge.clone(), ridge.clone()
    bias = torch.zeros(own.shape[0])
    return [
        Way("full depth", (), lambda: None),
        Way("the paper's", (), lambda: paper),
        Way("ridge towards the paper's", (), lambda: paper.replaced(ridge)),
        Way("ridge towards nothing", (), lambda: paper.replaced(unprior)),
        Way("ridge, tokens weighed by attention", (), lambda: paper.replaced(by_attention)),
        Way("ridge, the paper's for sinks", (), lambda: apart(ridge)),
        Way("refined, from ridge", (weight,), lambda: paper.replaced(weight)),
        Way("refined, the paper's for sinks", (fourth,), lambda: apart(fourth)),
        Way("refined, from the paper's", (again,), lambda: paper.replaced(again)),
        Way("refined, with a bias", (third, bias), lambda: biased(third, bias)),
        Way("the paper's, state corrected (rank 64)", (down, up), lambda: Corrected(paper, eps, own, down, up)),
    ]  # fmt: skip


def learn(calibrator: Calibrator, way: Way, learnt: Sequence[Example], options: Any, bar: Progress) -> None:
    """As ``Calibrator.refine`` does, for any projection."""
    first = calibrator.paper.weight.shape[0] // calibrator.options.num_skipped
    for tensor in way.learnt:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(way.learnt, lr=calibrator.options.learning_rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in bar.track(range(options.steps), description=way.name):
        order = order or torch.randperm(len(learnt), generator=generator).tolist()
        rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = calibrator.options.learning_rate * rate
        optimizer.zero_grad()
        ours, theirs = _logprobs(calibrator, way, learnt[order.pop()])
        F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().backward()  # type: ignore[no-untyped-call]
        for tensor in way.learnt:
            if tensor.grad is not None and tensor.shape[0] == calibrator.paper.weight.shape[0]:
                tensor.grad[:first] = 0.0
        optimizer.step()
    for tensor in way.learnt:
        tensor.requires_grad_(False)


@torch.no_grad()
def judge(calibrator: Calibrator, way: Way, judged: Sequence[Example]) -> dict[str, float]:
    nats = divergence = 0.0
    for example in judged:
        ours, theirs = _logprobs(calibrator, way, example)
        targets = torch.tensor(example.passage.continuation)[:, None]
        nats -= float(ours[: len(targets)].gather(1, targets).mean()) / len(judged)
        divergence += float(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()) / len(judged)
    return {"nats": nats, "perplexity": math.exp(nats), "divergence": divergence}


def _logprobs(calibrator: Calibrator, way: Way, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """After the boundary token and each of the continuation: this way's, and the full model's."""
    subject = calibrator.subject
    projection = way.projection()
    parameters = replace(subject.parameters, projection=projection or calibrator.paper)
    prompt = len(example.passage.prompt)
    decoder, batch = subject.step(calibrator.plan, parameters, example.ids, prompt, example.shallow)
    with torch.no_grad():
        full = decoder.logits(example.final, torch.arange(len(example.final)))
        assert full is not None
        theirs = full.log_softmax(-1)
    if projection is None:
        return theirs, theirs
    rope = Rope.at(subject.spec, batch.positions, decoder.dtype)
    ours = decoder.deepen(batch, example.state, rope, subject.new_pool()).logits
    assert ours is not None
    return ours.log_softmax(-1), theirs


def _cut(files: Any, kind: str, split: Split, limit: int) -> list[Passage]:
    tokenizer = files.tokenizer()
    text = load(Kind(kind), split)
    return passages(
        text.kind, text.token_ids(tokenizer), num_prompt=PROMPT, num_continuation=CONTINUATION, limit=limit,
        opening=opening(tokenizer),
    )  # fmt: skip


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("way", "parameters learnt", "perplexity", "recovered", "divergence")
    for row in rows:
        share = "" if row["recovered"] is None else f"{100 * row['recovered']:.1f} %"
        table.add_row(row["way"], f"{row['learnt']:,}", f"{row['perplexity']:.2f}", share, f"{row['divergence']:.4f}")
    Console().print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(Kind), default=Kind.TECHNICAL, help="left out, and judged on")
    parser.add_argument("--skip-layers", type=int, default=10)
    parser.add_argument("--passages", type=int, default=60, help="to learn from, of each other kind")
    parser.add_argument("--judged", type=int, default=60, help="passages to judge on")
    parser.add_argument("--steps", type=int, default=400, help="of each way that is learnt")
    parser.add_argument("--json", help="write raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
