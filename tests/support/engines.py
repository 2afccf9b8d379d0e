"""Engines over small models for tests, without files, threads or servers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from shoal.backends.cpu.build import TARGETS, compiled, target_of
from shoal.backends.cpu.copying import Copier
from shoal.backends.cpu.kernels import NativeKernels, load
from shoal.backends.cpu.native import hold_for, make_chooser, make_decode_path, make_decoder
from shoal.backends.gpu.gpu import GpuKernels
from shoal.backends.gpu.step_graph import Graph, StepGraphs
from shoal.engine.engine import Engine
from shoal.engine.runner import DecodePath, PrefillChunk, Runner
from shoal.engine.scheduler import Scheduler
from shoal.engine.tables import Reuse
from shoal.errors import ConfigError
from shoal.model.families import describe
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.model.parameters import ParameterLoader, Parameters
from shoal.model.plan import Anchors, LayerPlan
from shoal.process.machine import cpu_flags
from shoal.wire.messages import Depth, PromptOutline, SamplingParams, Stage

CPU = torch.device("cpu")


def exact(model: Any) -> Any:
    """Let transformers compute in the model's own dtype all through: its norms and its eager softmax would take
    float32 even in a float64 model."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_exact_norm, module)
    capped = getattr(model.config, "attn_logit_softcapping", None)
    model.set_attn_implementation("sdpa" if model._supports_sdpa and not capped else "exact")
    return model


def _exact_norm(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    gemma = hasattr(norm, "eps")  # Gemma's classes call it so
    weight = 1 + norm.weight if gemma else norm.weight
    return F.rms_norm(hidden, weight.shape, weight, norm.eps if gemma else norm.variance_epsilon)


def _exact_attention(
    module: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, **given: Any
) -> tuple[torch.Tensor, None]:
    """Attention that may have a softcap, which transformers has in eager form only. Gemma 3's configuration may have
    one too, but its attention in transformers doesn't hand it on; here it counts."""
    cap = module.config.attn_logit_softcapping
    keys, values = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (keys, values))
    scores = queries @ keys.transpose(2, 3) * given["scaling"]
    scores = cap * torch.tanh(scores / cap) if cap else scores
    return ((scores + mask).softmax(dim=-1) @ values).transpose(1, 2).contiguous(), None


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


def kernel_model(family: str, dtype: torch.dtype, *, vocab: int = 96) -> Any:
    """A tiny one whose shapes Shoal's kernels take."""
    return tiny_model(family, dtype, head_dim=64, vocab=vocab, intermediate=128)


def divergence(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """KL divergence (nats) of one row's distribution from the exact one."""
    ours, theirs = logits.double().log_softmax(-1), exact.double().log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum())


class ModelReader:
    """Reads a transformers model's tensors as a weight file would give them."""

    def __init__(self, model: Any) -> None:
        self._state = model.state_dict()
        self.names = frozenset(self._state)

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]


def parameters_of(
    model: Any,
    num_skipped: int,
    stage: Stage = Stage.DECODE,
    projector: torch.Tensor | None = None,
    plan: LayerPlan | None = None,
    num_sinks: int = 0,
    device: torch.device = CPU,
) -> Parameters:
    spec = describe(model.config)
    loader = ParameterLoader(ModelReader(model), spec, dtype=model.dtype, device=device)
    return loader.load(plan or LayerPlan(spec.num_layers, num_skipped), stage, projector, num_sinks)


def make_engine(
    model: Any,
    num_skipped: int,
    *,
    stage: Stage = Stage.DECODE,
    num_blocks: int = 256,
    block_tokens: int = 4,
    max_step_tokens: int = 512,
    max_sequences: int = 64,
    max_queued: int = 256,
    eos_token_ids: tuple[int, ...] = (),
    parameters: Parameters | None = None,
    num_boundary: int = 1,
    anchors: Anchors | None = None,
    num_deep_blocks: int = 256,
    kernels: NativeKernels | GpuKernels | None = None,
    reuse: Reuse = Reuse.NONE,
    device: torch.device = CPU,
    new_graph: Callable[[], Graph] | None = None,
) -> Engine:
    spec = describe(model.config)
    plan = LayerPlan(spec.num_layers, num_skipped, num_boundary, anchors)
    layout = stage_layout(
        num_layers=plan.num_layers,
        num_kept=plan.num_kept,
        num_held=len(plan.layers_held(stage)),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype_bytes=model.dtype.itemsize,
        block_tokens=block_tokens,
        is_apart=anchors is not None,
        state_dim=spec.hidden_size if stage is Stage.PREFILL and plan.projects else 0,
    )
    scheduler = Scheduler(
        layout, num_blocks, max_step_tokens=max_step_tokens, max_sequences=max_sequences, max_queued=max_queued,
        num_deep_blocks=num_deep_blocks, reuse=reuse,
    )  # fmt: skip
    pool = KvPool(
        layout, num_blocks, dtype=model.dtype, device=device, num_deep_blocks=num_deep_blocks,
        has_spare_slot=new_graph is not None,
    )  # fmt: skip
    parameters = parameters or parameters_of(model, num_skipped, stage, plan=plan, device=device)
    native = None if isinstance(kernels, GpuKernels) else kernels
    if hold := hold_for(native):
        parameters = parameters.held(hold)
    if isinstance(kernels, GpuKernels):
        decoder = kernels.decoder(spec, plan, stage, parameters)
    else:
        decoder = make_decoder(spec, plan, stage, parameters, kernels)
    path: DecodePath | None = None
    if new_graph is not None:
        path = StepGraphs(decoder, pool, new_graph, max_sequences, reads_padding=not isinstance(kernels, GpuKernels))
    elif stage is Stage.DECODE:
        path = make_decode_path(decoder, pool, native)
    runner = Runner(decoder, pool, path)
    return Engine(scheduler, runner, eos_token_ids=eos_token_ids, chooser=make_chooser(native))


@dataclass(frozen=True)
class Ask:
    """A prompt and how to continue it: greedy unless ``sampling`` says otherwise."""

    prompt: list[int]
    num_tokens: int = 8
    depth: Depth = Depth.SHALLOW
    sampling: SamplingParams | None = None
    outline: PromptOutline | None = None
    tenant: str = ""

    @property
    def params(self) -> SamplingParams:
        return self.sampling or SamplingParams(max_tokens=self.num_tokens, temperature=0.0)


def native_kernels() -> NativeKernels:
    """Skips the test where there are none."""
    try:
        return load()
    except ConfigError as error:
        pytest.skip(f"no kernels here: {error.message}")


def emulated_kernels(folder: Path) -> NativeKernels:
    """By a matrix unit that plain code stands in for. Whoever comes first to ``folder`` compiles them."""
    native_kernels()
    path = compiled(folder, target_of(cpu_flags()), "-DSHOAL_EMULATE_TILES", "-O1")  # in half of the time
    return NativeKernels(ctypes.CDLL(str(path)))


def widening_kernels(folder: Path) -> NativeKernels:
    """Of processors that multiply neither bfloat16 nor bytes. What there is between them and the best is made of parts
    of both. Skips the test where this machine widens bfloat16 itself."""
    native_kernels()
    if target_of(cpu_flags()) is not TARGETS[0]:
        pytest.skip("as they are, they widen bfloat16")
    kernels = NativeKernels(ctypes.CDLL(str(compiled(folder, TARGETS[-1], "-O1"))))
    kernels.use_tiles(False)
    return kernels


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """As many are what kernels take, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(engine: Engine, asks: list[Ask]) -> list[list[int]]:
    """Run all at once; the first choice's tokens in the order asked. Nothing may be held afterwards."""
    return [choices[0] for choices in run_choices(engine, asks)]


def run_choices(engine: Engine, asks: list[Ask]) -> list[list[list[int]]]:
    """The same with every choice of every request."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for index, ask in enumerate(asks):
        engine.submit_generate(
            str(index), tuple(ask.prompt), ask.depth, ask.params, outline=ask.outline, tenant=ask.tenant
        )
    while not (output := engine.step()).is_idle:
        for failure in output.failures:
            raise failure.error
        for event in output.tokens:
            tokens.setdefault((event.request_id, event.choice), []).append(event.token_id)
    assert_nothing_held(engine)
    return [[tokens[str(index), choice] for choice in range(ask.params.num_choices)] for index, ask in enumerate(asks)]


def watched(engine: Engine, seen: list[torch.Tensor]) -> Engine:
    """Put the logits of each step into ``seen``."""
    run_step = engine.runner.run

    def noted(plan: Any) -> Any:
        output = run_step(plan)
        if output.logits is not None:
            seen.append(output.logits.clone())
        return output

    engine.runner.run = noted  # type: ignore[method-assign]
    return engine


def one_by_one(engine: Engine, asks: list[Ask]) -> list[list[int]]:
    return [run(engine, [ask])[0] for ask in asks]


def logits_after(engine: Engine, prompt: list[int], depth: Depth, outline: PromptOutline | None = None) -> torch.Tensor:
    """Logits ``[vocab]`` of the token after ``prompt``, in as many steps as the engine's chunks take."""
    engine.submit_generate(
        "logits", tuple(prompt), depth, SamplingParams(max_tokens=1, temperature=0.0), outline=outline
    )
    engine.scheduler.admit()
    while True:
        plan = engine.scheduler.schedule()
        logits = engine.runner.run(plan).logits
        for item in plan.rows:
            item.sequence.advance(item.end)
        if logits is not None:
            break
    engine.finish("logits")
    assert_nothing_held(engine)
    return logits[0]


@dataclass(frozen=True)
class ShippedTokens:
    """``kv`` is ``[layers, tokens, 2, kv_heads, head_dim]``, of the first layers on."""

    start: int
    end: int
    kv: torch.Tensor


def prefill_chunks(engine: Engine, prompt: list[int], *, num_present: int = 0, tenant: str = "") -> list[ShippedTokens]:
    """What a prefill engine ships for ``prompt``, of which decode has ``num_present`` tokens."""
    engine.submit_prefill("prompt", len(prompt), tenant=tenant)
    chunks: list[ShippedTokens] = []
    parts: list[PrefillChunk] = []
    engine.step()
    engine.start_shipping("prompt", tuple(prompt), num_present=num_present)
    while not chunks or chunks[-1].end < len(prompt) - 1:
        output = engine.step()
        for failure in output.failures:
            raise failure.error
        for part in output.chunks:
            parts.append(part)
            if part.is_whole:
                chunks.append(_put_together(parts, engine.runner.pool))
                parts = []
                engine.chunk_sent(part.request_id)
    assert not parts
    engine.finish("prompt")
    assert_nothing_held(engine)
    return chunks


def run_handed_off(prefill: Engine, decode: Engine, asks: list[Ask]) -> list[list[int]]:
    """Every prompt through both engines, its K/V copied over as the hand-off would."""
    tokens: dict[str, list[int]] = {}
    for index, ask in enumerate(asks):
        hold = len(ask.prompt) > 1
        decode.submit_generate(str(index), tuple(ask.prompt), ask.depth, ask.params, hold=hold, outline=ask.outline)
    while True:
        output = decode.step()
        for failure in output.failures:
            raise failure.error
        for reservation in output.reserved:
            request_id, blocks = reservation.request_id, reservation.blocks
            prompt = asks[int(request_id)].prompt
            for chunk in prefill_chunks(prefill, prompt, num_present=reservation.num_present):
                slots = decode.runner.pool.layout.slots(blocks, chunk.start, chunk.end)
                decode.runner.pool.write_layers(0, torch.as_tensor(slots), chunk.kv)
            decode.start(request_id, num_arrived=len(prompt) - 1)
        for event in output.tokens:
            tokens.setdefault(event.request_id, []).append(event.token_id)
        if output.is_idle:
            break
    assert_nothing_held(decode)
    return [tokens[str(index)] for index in range(len(asks))]


def payload_of(part: PrefillChunk, pool: KvPool) -> torch.Tensor:
    """``[layers, tokens, 2, kv_heads, head_dim]``, wherever it lies."""
    if isinstance(part.payload, torch.Tensor):
        return part.payload
    copied = np.empty(len(part.payload), np.uint8)
    Copier().gather(part.payload.layers, part.payload.at, copied)
    held = pool.layers[0]
    return torch.from_numpy(copied).view(held.dtype).view(len(part.layers), part.end - part.start, *held.shape[1:])


def _put_together(parts: list[PrefillChunk], pool: KvPool) -> ShippedTokens:
    first = parts[0]
    assert {(part.request_id, part.start, part.end) for part in parts} == {(first.request_id, first.start, first.end)}
    layers = [layer for part in parts for layer in part.layers]
    assert layers == list(range(len(layers))) and not any(part.is_whole for part in parts[:-1])
    return ShippedTokens(first.start, first.end, torch.cat([payload_of(part, pool) for part in parts]))


def assert_nothing_held(engine: Engine) -> None:
    counts = engine.counts()
    held = replace(counts, num_preemptions=0)
    assert (held.num_waiting, held.num_reserved, held.num_running) == (0, 0, 0), counts
    assert held.num_free_blocks == held.num_blocks and held.num_reserved_blocks == 0, counts
    assert held.num_free_deep_blocks == held.num_deep_blocks
    assert not any(table.copies for table in engine.scheduler.tables)
