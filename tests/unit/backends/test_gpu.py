"""Engines that compute by Triton say what torch's say; and who computes, where it can't be had."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import Ask, make_engine, run, run_handed_off, watched
from models import TINY_FAMILIES, tiny_model
from triton_kernels import DEVICE, loaded

from shoal.backends import attention
from shoal.backends.gpu import step_graph
from shoal.backends.gpu.gpu import GpuKernels, find_gpu_kernels
from shoal.backends.gpu.step_graph import StepGraphs
from shoal.config import StageConfig
from shoal.engine import build
from shoal.engine.build import choose_gpu_kernels, choose_kernels
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


def test_a_long_sequence_beside_short_ones_goes_by_a_graph() -> None:
    """No padding is read, so it costs the others nothing. By torch such a step isn't filled up."""
    model = tiny_model("llama", torch.float32, layers=3, context=2048).to(DEVICE)
    asks = [Ask([3 + index * 7 % 90 for index in range(length)], 3) for length in (1100, 3, 3, 3, 3)]
    options: dict[str, Any] = {"device": DEVICE, "new_graph": Again, "num_blocks": 512, "max_step_tokens": 2048}
    replays = []
    for kernels in (replace(kernels_for(model), rows=TorchRows(describe(model.config))), None):
        engine = make_engine(model, 1, kernels=kernels, **options)
        run(engine, asks)
        graphs = engine.runner.decode_path
        assert isinstance(graphs, StepGraphs)
        replays.append(sum(step._graph.num_replays for step in graphs._steps.values()))  # type: ignore[attr-defined]
    assert replays == [2, 0]


def test_a_step_that_sees_too_much_for_an_index_is_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32, layers=3).to(DEVICE)
    for most, num_replays in ((512, 2), (511, 0)):
        monkeypatch.setattr(step_graph, "MOST_INDEXED", most)
        engine = make_engine(model, 1, kernels=kernels_for(model), device=DEVICE, new_graph=Again)
        run(engine, [Ask(PROMPT[:3], 3), Ask(PROMPT[:3], 3)])
        graphs = engine.runner.decode_path
        assert isinstance(graphs, StepGraphs)
        assert sum(step._graph.num_replays for step in graphs._steps.values()) == num_replays  # type: ignore[attr-defined]


def test_float64_is_torchs(attention_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64, layers=3).to(DEVICE)
    with pytest.raises(ConfigError, match=r"take no heads of 16 numbers in torch\.float64"):
        kernels_for(model)
    kernels = kernels_for(tiny_model("llama", torch.float32, layers=3))
    monkeypatch.setattr(attention_kernel, "attend_rows", lambda *_, **__: pytest.fail("by Triton"))
    for name in ("add_norm", "rotate_store", "gate"):
        monkeypatch.setattr(kernels.rows._kernel, name, lambda *_, **__: pytest.fail("by Triton"))
    asks = ASKS[:2]
    assert run(make_engine(model, 1, kernels=kernels, device=DEVICE), asks) == run(
        make_engine(model, 1, device=DEVICE), asks
    )


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


def test_rows_that_follow_others_need_no_mask_where_there_is_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """It's torch's to say which kernel that is. On a CPU it makes the mask itself."""
    model = tiny_model("gemma3_text", torch.float64, layers=6)  # in all but two layers, of which one is skipped
    wanted = run(make_engine(model, 1, max_step_tokens=40), [Ask(PROMPT[:100], 6)])
    shapes = []

    def spied(*shape: int, last_rows: Any = attention._last_rows) -> torch.Tensor:
        shapes.append(shape)
        return last_rows(*shape)

    monkeypatch.setattr(attention, "_may_be_flash", lambda _: True)
    monkeypatch.setattr(attention, "_last_rows", spied)
    assert run(make_engine(model, 1, max_step_tokens=40), [Ask(PROMPT[:100], 6)]) == wanted
    assert shapes == [(40, 80), (20, 100)]  # the second and third chunk, in the one kept layer that sees all


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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_reason() -> None:
    """As torch's builds with and without CUDA call it."""
    with pytest.raises(ConfigError, match=r"Triton's kernels can't be run: .*(CUDA|NVIDIA driver)"):
        find_gpu_kernels(describe(tiny_model("llama").config), torch.float32, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("module", ["paged_attention", "gpu_rows"])
def test_without_triton_there_are_none(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"shoal.backends.gpu.{module}", None)
    with pytest.raises(ConfigError, match="Triton can't be imported"):
        kernels_for(tiny_model("llama", torch.float32))


class TestWhoComputes:
    SERVED: Any = SimpleNamespace(spec="a spec", dtype=torch.bfloat16, kv_dtype=torch.float16)
    GPU = torch.device("cuda:0")

    def test_on_a_gpu_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def find(*given: Any) -> str:
            asked.append(given)
            return "Triton's"

        monkeypatch.setattr(build, "find_gpu_kernels", find)
        for kernels in ("auto", "native"):
            limits = StageConfig(kernels=kernels)  # type: ignore[arg-type]
            assert choose_kernels(limits, self.SERVED, self.GPU) is None
            assert choose_gpu_kernels(limits, self.SERVED, self.GPU) == "Triton's"
        assert asked == [("a spec", torch.bfloat16, torch.float16, self.GPU)] * 2

    def test_elsewhere_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "find_gpu_kernels", lambda *_: pytest.fail("asked"))
        assert choose_gpu_kernels(StageConfig(kernels="torch"), self.SERVED, self.GPU) is None
        assert choose_gpu_kernels(StageConfig(), self.SERVED, torch.device("cpu")) is None

    def test_where_they_cannot_be_had_torch_or_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(*_: Any) -> Any:
            raise ConfigError("Triton can't be imported")

        monkeypatch.setattr(build, "find_gpu_kernels", find)
        assert choose_gpu_kernels(StageConfig(), self.SERVED, self.GPU) is None
        with pytest.raises(ConfigError, match="kernels is native, but: Triton can't be imported; with auto, torch"):
            choose_gpu_kernels(StageConfig(kernels="native"), self.SERVED, self.GPU)
