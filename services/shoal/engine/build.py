"""From a configuration to an engine: which device and dtype, how many blocks, which weights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import structlog
import torch

from shoal.backends.attention import prepare_attention
from shoal.backends.cpu.build import fits
from shoal.backends.cpu.copying import Copier
from shoal.backends.cpu.kernels import MAX_FEW_ROWS, NativeKernels
from shoal.backends.cpu.kernels import load as load_kernels
from shoal.backends.cpu.native import (
    check_native,
    find_kernels,
    hold_for,
    make_chooser,
    make_decode_path,
    make_decoder,
    num_bytes_beside,
)
from shoal.backends.gpu.cuda_graph import CudaGraphs
from shoal.backends.gpu.gpu import GpuKernels, find_gpu_kernels
from shoal.backends.gpu.step_graph import StepGraphs
from shoal.config import PREFILL_NICENESS, Dtype, ShoalConfig, StageConfig
from shoal.engine.ahead import Ahead
from shoal.engine.engine import Engine
from shoal.engine.events import StepOutput
from shoal.engine.runner import DecodePath, Runner
from shoal.engine.scheduler import Scheduler
from shoal.engine.tables import Reuse
from shoal.errors import ConfigError
from shoal.model.families import ModelSpec
from shoal.model.files import ModelFiles, locate
from shoal.model.huge_pages import use_huge_pages
from shoal.model.int8 import Int8Matrix
from shoal.model.kv_layout import KvLayout, stage_layout
from shoal.model.kv_pool import KvPool
from shoal.model.matrix import Hold
from shoal.model.parameters import ParameterLoader, Parameters
from shoal.model.plan import Anchors, LayerPlan
from shoal.model.projector import PAPER, Projector, find_projector, require_model
from shoal.model.weights import open_weights
from shoal.process.machine import available_memory_bytes, cpu_flags, multiplies_bfloat16, step_back, usable_threads
from shoal.wire.messages import Depth, SamplingParams, Stage

_log = structlog.get_logger(__name__)
_Kernels = TypeVar("_Kernels")

_WARM_UP = "warm-up"
# More than few: with more rows other kernels compute.
_CPU_WARM_UP_TOKENS = MAX_FEW_ROWS + 32
# Of free memory. A GPU that Ray set aside is nobody else's, and should have enough left for a step's activations, which
# wasn't tried on one; a host has others, and a checkpoint's pages to keep.
_POOL_SHARE, _POOL_SHARE_OF_OWN_GPU = 0.25, 0.7
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a replica serves, before any weight is read: what both pools and the gateway agree on."""

    files: ModelFiles
    spec: ModelSpec
    plan: LayerPlan
    dtype: torch.dtype
    kv_dtype: torch.dtype
    projector: Projector | None
    plan_hash: str
    name: str
    max_context_tokens: int

    @classmethod
    def of(cls, config: ShoalConfig, device: torch.device | None = None) -> Served:
        """Raises ModelError or ConfigError that says what to change."""
        files = locate(config.model.name)
        spec = files.spec()
        if config.model.plan == "pop":
            require_model(config.model.projector, files)
        plan = plan_of(config, spec)
        device = device or torch.device("cpu")
        dtype = choose_dtype(config.model.dtype, device, widens=partial(_have_own_kernels, config, spec, device))
        kv_dtype = dtype if config.kv_dtype == "auto" else _DTYPES[config.kv_dtype]
        most = config.model.max_context_tokens or spec.max_context_tokens
        if most > spec.max_context_tokens:
            raise ConfigError(f"max_context_tokens is {most}, but the model was trained for {spec.max_context_tokens}")
        projector = find_projector(config.model.projector, files, plan)
        plan_hash = plan.digest(
            model_digest=files.content_digest,
            kv_dtype=str(kv_dtype).removeprefix("torch."),
            projector=PAPER if projector is None else projector.digest,
        )
        name = config.model.served_name or files.model_id
        return cls(files, spec, plan, dtype, kv_dtype, projector, plan_hash, name, most)


def plan_of(config: ShoalConfig, spec: ModelSpec) -> LayerPlan:
    """Raises ConfigError for a plan that the model can't run."""
    settings = config.model
    anchors = None
    if settings.plan == "speed":
        wanted = settings.anchors or "bos"
        anchors = Anchors(system=wanted == "system") if isinstance(wanted, str) else Anchors(wanted)
    plan = LayerPlan.default(
        spec.num_layers,
        settings.skip_layers,
        num_boundary=settings.boundary_tokens,
        anchors=anchors,
        name=settings.name,
    )
    windowed = [index for index in plan.skipped if spec.layers[index].window is not None]
    if anchors is not None and windowed:
        raise ConfigError(
            f"the speed plan needs deep layers that see everything, but {len(windowed)} of the {plan.num_skipped} "
            "skipped ones have a sliding window, which the anchors would leave: choose --plan pop"
        )
    return plan


def choose_device(stage: StageConfig) -> torch.device:
    """Raises ConfigError for one that isn't here: who sets a GPU aside isn't to wait for a CPU."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if stage.num_gpus > 1:
        _log.warning(
            "a replica computes on one GPU: the others that are set aside for it idle", num_gpus=stage.num_gpus
        )
    if stage.device == "auto":
        if stage.num_gpus > 0 and not num_gpus:
            raise ConfigError(
                f"num_gpus is {stage.num_gpus:g}, but torch {torch.__version__} finds no GPU here (shoal doctor says "
                "more): install a build of torch for it, or set num_gpus to 0, or device to cpu"
            )
        return torch.device("cuda" if stage.num_gpus > 0 else "cpu")
    try:
        device = torch.device(stage.device)
    except RuntimeError as error:
        raise ConfigError(
            f"device is {stage.device}, which torch doesn't know: say auto, cpu, cuda or cuda:1"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(
            f"device is {stage.device}, but of GPUs torch finds {num_gpus} here (shoal doctor says more): set it to "
            "auto, and num_gpus to 1 where there is one"
        )
    return device


def choose_dtype(wanted: Dtype, device: torch.device, *, widens: Callable[[], bool] = lambda: False) -> torch.dtype:
    """bfloat16 where the machine computes it natively, or by what ``widens`` it on the way to the multipliers; else
    float32, since torch would emulate it, which takes several times as long."""
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = multiplies_bfloat16()
    return torch.bfloat16 if native or widens() else torch.float32


def _have_own_kernels(config: ShoalConfig, spec: ModelSpec, device: torch.device) -> bool:
    """Whether the pools that run on CPUs compute bfloat16 by Shoal's own kernels, if their machines are as this one."""
    both = (config.prefill, config.decode)
    pools = [pool for pool in both if pool.device == "cpu" or (pool.device == "auto" and not pool.num_gpus)]
    if any(pool.kernels == "torch" for pool in pools):
        return False
    kv_dtype = torch.bfloat16 if config.kv_dtype == "auto" else _DTYPES[config.kv_dtype]
    are_usual = False
    try:
        check_native(spec, torch.bfloat16, kv_dtype, device)
        are_usual = fits(cpu_flags())
        load_kernels()
    except ConfigError as error:
        if any(pool.kernels == "native" or pool.weights == "int8" for pool in pools):
            return True  # whoever can't do without them says why there are none
        # Beside others like this machine, which have them, its K/V would be of another dtype than theirs.
        tell = _log.warning if are_usual else _log.info
        tell("float32, as torch computes; model.dtype says otherwise", reason=error.message)
        return False
    return True


def load_parameters(
    served: Served,
    stage: Stage,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    hold: Hold | None = None,
    rounds: bool = False,
) -> Parameters:
    """Raises ModelError."""
    with open_weights(served.files) as reader:
        loader = ParameterLoader(
            reader,
            served.spec,
            dtype=served.dtype,
            device=device,
            hold=hold,
            rounds=rounds,
            on_progress=on_progress,
        )
        if served.projector is None:
            return loader.load(served.plan, stage)
        return loader.load(served.plan, stage, served.projector.weight, served.projector.header.num_sinks)


def build_engine(
    config: ShoalConfig,
    stage: Stage,
    served: Served,
    parameters: Parameters,
    *,
    device: torch.device,
) -> Engine:
    """An engine of ``stage`` with an empty pool, warm. What is multiplied, and lies as it was read, is copied to lie as
    the kernels want it."""
    limits = config.prefill if stage is Stage.PREFILL else config.decode
    layout = layout_of(served, stage, limits.block_tokens)
    deep_ratio = config.model.deep_blocks_ratio
    num_blocks = num_blocks_for(limits, layout, served, device, deep_ratio)
    num_deep_blocks = 0 if layout.apart is None else max(1, int(num_blocks * deep_ratio))
    if layout.apart is not None and served.plan.anchors is not None:
        least = served.plan.anchors.num_tokens + served.plan.num_boundary
        if num_deep_blocks * layout.block_tokens < least:
            raise ConfigError(
                f"anchors and boundary are {least} tokens at least, but the deep layers hold "
                f"{num_deep_blocks * layout.block_tokens}: raise model.deep_blocks_ratio or decode.kv_pool_bytes"
            )
    has_graphs = stage is Stage.DECODE and device.type == "cuda"
    prepare_attention(device)
    try:
        pool = KvPool(
            layout,
            num_blocks,
            dtype=served.kv_dtype,
            device=device,
            num_deep_blocks=num_deep_blocks,
            has_spare_slot=has_graphs,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(f"{error}: lower {stage}.num_blocks, or {stage}.kv_pool_bytes where that is set") from error
    scheduler = Scheduler(
        layout,
        num_blocks,
        max_step_tokens=limits.max_step_tokens,
        max_sequences=limits.max_sequences,
        max_queued=limits.max_queued,
        max_queued_tokens=limits.max_queued_tokens,
        max_reserved_ratio=config.handoff.max_reserved_ratio if stage is Stage.DECODE else 1.0,
        num_deep_blocks=num_deep_blocks,
        reuse=Reuse(limits.reuse),
        target_step_s=limits.target_step_s,
    )
    kernels = choose_kernels(limits, served, device)
    if hold := hold_for(kernels):
        parameters = parameters.held(hold)
    use_huge_pages(tensor for _, tensor in parameters.tensors())
    gpu = choose_gpu_kernels(limits, served, device)
    if gpu is None:
        decoder = make_decoder(served.spec, served.plan, stage, parameters, kernels)
    else:
        decoder = gpu.decoder(served.spec, served.plan, stage, parameters)
    path: DecodePath | None = None
    if has_graphs:
        path = StepGraphs(decoder, pool, CudaGraphs(device), limits.max_sequences, reads_padding=gpu is None)
    elif stage is Stage.DECODE:
        path = make_decode_path(decoder, pool, kernels)
    runner = Runner(decoder, pool, path)
    engine = Engine(
        scheduler,
        runner,
        eos_token_ids=served.files.eos_token_ids(),
        chooser=make_chooser(kernels),
        # Where nothing is remembered, prompts come into the memory of those before.
        ahead=None if scheduler.allocator.prefixes is None else Ahead(pool, scheduler.allocator),
    )
    warm_up(engine, stage, device)
    while not engine.is_prepared:
        engine.prepare()
    return engine


def choose_kernels(
    limits: StageConfig, served: Served, device: torch.device, *, quietly: bool = False
) -> NativeKernels | None:
    """Those for CPUs; ``None`` is torch's. Raises ConfigError where Shoal's own are demanded and can't be had."""
    if device.type == "cuda":
        return None
    find = partial(find_kernels, served.spec, served.dtype, served.kv_dtype, device)
    return _own_or_torchs(limits, find, quietly=quietly)


def choose_gpu_kernels(limits: StageConfig, served: Served, device: torch.device) -> GpuKernels | None:
    """Those for GPUs; ``None`` is torch's. Raises ConfigError where Shoal's own are demanded and can't be had."""
    if device.type != "cuda":
        return None
    return _own_or_torchs(limits, partial(find_gpu_kernels, served.spec, served.dtype, served.kv_dtype, device))


def _own_or_torchs(limits: StageConfig, find: Callable[[], _Kernels], *, quietly: bool = False) -> _Kernels | None:
    if limits.kernels == "torch":
        return None
    try:
        return find()
    except ConfigError as error:
        if limits.kernels == "native":
            raise ConfigError(f"kernels is native, but: {error.message}; with auto, torch computes") from error
        if not quietly:
            _log.info("torch computes", reason=error.message)
        return None


def choose_copier(limits: StageConfig) -> Copier:
    """By Shoal's kernels wherever they can be loaded, for whatever dtype and device."""
    if limits.kernels == "torch":
        return Copier()
    try:
        return Copier(load_kernels())
    except ConfigError as error:
        _log.info("numpy copies K/V on their way", reason=error.message)
        return Copier()


def require_int8(limits: StageConfig, served: Served, device: torch.device, stage: Stage) -> None:
    """Raises ConfigError where a step with weights in int8 would be torch's, and slower than without them. Where
    prompts would be slower by Shoal's kernels, too, it's said."""
    if limits.kernels == "torch":
        raise ConfigError(
            f"{stage}.weights is int8, which only Shoal's own kernels make fast: set {stage}.kernels to auto"
        )
    try:
        kernels = find_kernels(served.spec, served.dtype, served.kv_dtype, device)
    except ConfigError as error:
        raise ConfigError(
            f"{stage}.weights is int8, which only Shoal's own kernels make fast, but: {error.message}; set it to auto"
        ) from error
    if stage is Stage.PREFILL and kernels.has_tiles:
        _log.warning(
            "prefill.weights is int8, and this processor's matrix unit multiplies bfloat16 faster: set it to auto"
        )


def warm_up(engine: Engine, stage: Stage, device: torch.device) -> None:
    """Run each kind of step once: kernels are chosen, threads started and memory touched before a client waits."""
    scheduler = engine.scheduler
    num_tokens = min(scheduler.max_step_tokens, scheduler.num_tokens_held - 2)
    if num_tokens < 2:
        return
    if device.type == "cpu":
        # Elsewhere a full step also shows that its activations fit. Here that is given up: it took 1.3 s of the six
        # that a prefill replica starts in, in float32 3.7 of nine.
        num_tokens = min(num_tokens, _CPU_WARM_UP_TOKENS)
    if stage is Stage.PREFILL:
        engine.submit_prefill(_WARM_UP, num_tokens)
        engine.step()
        engine.start_shipping(_WARM_UP, (0,) * num_tokens)
        while not _checked(engine.step()).is_idle:
            pass
    else:
        for depth in (Depth.SHALLOW, Depth.FULL):
            engine.submit_generate(_WARM_UP, (0,) * num_tokens, depth, SamplingParams(max_tokens=2, temperature=0.0))
            while not _checked(engine.step()).is_idle:
                pass
    engine.finish(_WARM_UP)
    scheduler.pace.forget()


def _checked(output: StepOutput) -> StepOutput:
    """A replica whose first step fails must not become ready."""
    for failure in output.failures:
        raise failure.error
    return output


def layout_of(served: Served, stage: Stage, block_tokens: int) -> KvLayout:
    return stage_layout(
        num_layers=served.plan.num_layers,
        num_kept=served.plan.num_kept,
        num_held=len(served.plan.layers_held(stage)),
        num_kv_heads=served.spec.num_kv_heads,
        head_dim=served.spec.head_dim,
        dtype_bytes=served.kv_dtype.itemsize,
        block_tokens=block_tokens,
        is_apart=served.plan.anchors is not None,
        state_dim=served.spec.hidden_size if stage is Stage.PREFILL and served.plan.projects else 0,
    )


def num_blocks_for(
    limits: StageConfig, layout: KvLayout, served: Served, device: torch.device, deep_ratio: float
) -> int:
    """As configured, else a share of the free memory, but no more than all sequences at full length can use."""
    if limits.num_blocks is not None:
        return limits.num_blocks
    own_gpu = min(1.0, limits.num_gpus) if device.type == "cuda" else 0.0
    share = _POOL_SHARE_OF_OWN_GPU * own_gpu or _POOL_SHARE
    budget = limits.kv_pool_bytes or int(free_memory_bytes(device) * share)
    block_bytes = layout.block_bytes + int(layout.deep_block_bytes * deep_ratio)
    num_blocks = min(budget // block_bytes, limits.max_sequences * layout.num_blocks_for(served.max_context_tokens))
    if num_blocks < 1:
        raise ConfigError(f"a KV pool of {budget} bytes holds no block of {block_bytes}: raise kv_pool_bytes")
    return num_blocks


def free_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A stage's model in memory, ``num_bytes`` of weights in whatever form, an engine that is warm, what copies K/V on
    their way, and how far the engine's thread is to step back for others."""

    served: Served
    parameters: Parameters
    num_bytes: int
    engine: Engine
    copier: Copier
    niceness: int


async def load_stage(
    config: ShoalConfig, stage: Stage, on_progress: Callable[[int, int], None] | None = None
) -> Loaded:
    """Everything from the configuration to an engine, in a thread that ends.

    A thread that has computed once keeps a team of OpenMP's threads for as long as it lives. With more of those in a
    process than cores, OpenMP never spins: each parallel region waits to be woken, and a decode step of a small model
    takes twice as long. So nothing but the engine's own thread may compute in a process that serves. Raises ModelError
    or ConfigError.
    """

    def load() -> Loaded:
        limits = config.prefill if stage is Stage.PREFILL else config.decode
        set_num_threads(limits)
        device = choose_device(limits)
        served = Served.of(config, device)
        is_int8 = limits.weights == "int8"
        if is_int8:
            require_int8(limits, served, device, stage)
            hold: Hold | None = Int8Matrix.of
        else:
            hold = hold_for(choose_kernels(limits, served, device, quietly=True))
        parameters = load_parameters(served, stage, device, on_progress, hold=hold, rounds=is_int8)
        niceness = choose_niceness(limits, stage, device)
        step_back(niceness)  # as it warms up, this thread starts those that help the engine's
        engine = build_engine(config, stage, served, parameters, device=device)
        # As it holds them: what was read beside isn't kept.
        held = engine.runner.decoder.parameters
        num_bytes = held.num_bytes + num_bytes_beside(engine.runner.decode_path)
        _log.info(
            "the model is loaded",
            device=str(device),
            dtype=str(served.dtype),
            weights=limits.weights,
            num_bytes=num_bytes,
        )
        return Loaded(served, held, num_bytes, engine, choose_copier(limits), niceness)

    with ThreadPoolExecutor(1, thread_name_prefix="shoal-load") as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, copy_context().run, load)


def choose_niceness(limits: StageConfig, stage: Stage, device: torch.device) -> int:
    """Where both pools compute on the same cores, a long prompt can wait a little, a token or a short prompt can't."""
    if limits.niceness is not None:
        return limits.niceness
    return PREFILL_NICENESS if stage is Stage.PREFILL and device.type == "cpu" else 0


def set_num_threads(limits: StageConfig) -> int:
    """Before the first operation: Ray would leave a replica with one compute thread."""
    num_threads = limits.num_threads or usable_threads()
    torch.set_num_threads(num_threads)
    return num_threads
