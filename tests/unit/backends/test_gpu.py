"""Engines that compute by Triton say what torch's say; and who computes, where it can't be had."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Ask, make_engine, run, run_handed_off, watched
from models import TINY_FAMILIES, tiny_model
from triton_kernels import DEVICE, loaded

from shoal.backends.gpu.gpu import GpuKernels, find_gpu_kernels
from shoal.config import StageConfig
from shoal.engine import build
from shoal.engine.build import choose_gpu_kernels
from shoal.errors import ConfigError
from shoal.model.families import describe
from shoal.model.rows import TorchRows
from shoal.wire.messages import Depth, Stage

pytestmark = pytest.mark.triton

PROMPT = [3 + index * 7 % 90 for index in range(400)]
# Of both depths; some share a step with others' prompts, and one is far longer than the rest.
ASKS = [
    Ask(PROMPT[:length], num_tokens, Depth.SHALLOW if length % 2 else Depth.FULL)
    for length, num_tokens in ((5, 2), (2, 3), (40, 2), (7, 2))
]


@pytest.fixture(scope="module", autouse=True)
def attention_kernel() -> Any:
    return loaded("paged_attention")


def kernels_for(model: Any) -> GpuKernels:
    return find_gpu_kernels(describe(model.config), model.dtype, model.dtype, DEVICE)


class Again:
    """Stands in for a graph: runs what was captured once more."""

    def __init__(self) -> None:
        self._run: Callable[[], None] = lambda: None
        self.num_replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run

    def replay(self) -> None:
        self.num_replays += 1
        self._run()


def fails_in_torch(rows: Any, name: str, called: set[str]) -> Any:
    """That operation, which fails the test where torch's is what computes in the end."""
    ours = getattr(rows, name)

    def checked(*given: Any) -> Any:
        called.add(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchRows, name, lambda *_: pytest.fail(f"{name} by torch"))
            return ours(*given)

    return checked


@pytest.mark.parametrize(
    ("family", "kv_heads", "by_graphs"),
    [
        *((family, 2, False) for family in TINY_FAMILIES), ("llama", 2, True), ("gemma2", 2, True),
        ("qwen3", 1, False), ("gemma3_text", 1, True),
    ],
)  # fmt: skip
def test_what_is_said_is_torchs(
    attention_kernel: Any, family: str, kv_heads: int, by_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, with windows and softcaps, prompts in the same step, and steps that are filled up."""
    model = tiny_model(family, torch.float32, layers=3, kv_heads=kv_heads).to(DEVICE)
    kernels, asked, attend_rows = kernels_for(model), list[int](), attention_kernel.attend_rows

    def spied(queries: torch.Tensor, rows: torch.Tensor, *rest: Any, **options: Any) -> None:
        asked.append(len(rows))
        attend_rows(queries, rows, *rest, **options)

    monkeypatch.setattr(attention_kernel, "attend_rows", spied)
    operations, called = {"norm", "add_norm", "rotate_and_store", "gated"}, set[str]()
    for name in operations:
        monkeypatch.setattr(kernels.rows, name, fails_in_torch(kernels.rows, name, called))
    options: dict[str, Any] = {"device": DEVICE, **({"new_graph": Again} if by_graphs else {})}
    wanted, found = list[torch.Tensor](), list[torch.Tensor]()
    by_torch = watched(make_engine(model, 1, device=DEVICE), wanted)
    ours = watched(make_engine(model, 1, kernels=kernels, **options), found)
    assert run(ours, ASKS) == run(by_torch, ASKS)
    assert called == operations
    assert max(asked) == (len(ASKS) if by_graphs else 2)  # else only those of a like length are read together
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() < 1e-3


@pytest.mark.parametrize("stage", list(Stage))
def test_prefill_computes_by_them_too(stage: Stage) -> None:
    model = tiny_model("llama", torch.float32, layers=3).to(DEVICE)
    asks = [Ask(PROMPT[:length], 3) for length in (40, 3)]
    kernels = {other: kernels_for(model) if other is stage else None for other in Stage}
    prefill, decode = (
        make_engine(model, 1, stage=other, kernels=kernels[other], device=DEVICE)
        for other in (Stage.PREFILL, Stage.DECODE)
    )
    assert run_handed_off(prefill, decode, asks) == run(make_engine(model, 1, device=DEVICE), asks)


@pytest.mark.parametrize(("module", "function"), [("paged_attention", "attend_rows"), ("gpu_rows", "gate")])
def test_they_are_tried_before_they_serve(module: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = importlib.import_module(f"shoal.backends.gpu.{module}")
    right, model = getattr(kernel, function), tiny_model("gemma2", torch.float32)

    def spoil(change: Callable[[torch.Tensor], object]) -> None:
        def spoilt(*given: Any, **options: Any) -> Any:
            told = right(*given, **options)
            change(given[-1] if told is None else told)
            return told

        monkeypatch.setattr(kernel, function, spoilt)

    assert isinstance(kernels_for(model), GpuKernels)
    spoil(lambda told: told[0].add_(0.1))
    with pytest.raises(ConfigError, match=r"tried once, were 0\.[12] off what torch gives"):
        kernels_for(model)
    spoil(lambda told: told[-1].fill_(float("nan")))
    with pytest.raises(ConfigError, match="were nan off"):
        kernels_for(model)

    def broken(_: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    spoil(broken)
    with pytest.raises(ConfigError, match="kernels can't be run: Failed to find C compiler"):
        kernels_for(model)


@pytest.mark.parametrize("module", ["paged_attention", "gpu_rows"])
def test_without_triton_there_are_none(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"shoal.backends.gpu.{module}", None)
    with pytest.raises(ConfigError, match="Triton can't be imported"):
        kernels_for(tiny_model("llama", torch.float32))


class TestWhoComputes:
    SERVED: Any = SimpleNamespace(spec="a spec", dtype=torch.bfloat16, kv_dtype=torch.float16)
    GPU = torch.device("cuda:0")

    def test_where_they_cannot_be_had_torch_or_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(*_: Any) -> Any:
            raise ConfigError("Triton can't be imported")

        monkeypatch.setattr(build, "find_gpu_kernels", find)
        assert choose_gpu_kernels(StageConfig(), self.SERVED, self.GPU) is None
        with pytest.raises(ConfigError, match="kernels is native, but: Triton can't be imported; with auto, torch"):
            choose_gpu_kernels(StageConfig(kernels="native"), self.SERVED, self.GPU)
