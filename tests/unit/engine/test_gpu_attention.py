"""Engines whose single rows attend by Triton say what torch's say; and who attends, where it can't be had."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines import Ask, make_engine, run
from models import tiny_model
from shoal.config import StageConfig
from shoal.engine import attention, build
from shoal.engine.attention import attend
from shoal.engine.build import choose_attention, choose_kernels
from shoal.engine.engine import Engine
from shoal.engine.gpu_attention import GpuAttention, find_gpu_attention
from shoal.engine.step_graph import StepGraphs
from shoal.errors import ConfigError
from shoal.messages import Depth, Stage
from shoal.model.families import describe
from triton_kernel import DEVICE, loaded_kernel

PROMPT = [3 + index * 7 % 90 for index in range(400)]
# Of both depths; some share a step with others' prompts, and one is far longer than the rest.
ASKS = [
    Ask(PROMPT[:length], num_tokens, Depth.SHALLOW if length % 2 else Depth.FULL)
    for length, num_tokens in ((5, 3), (2, 4), (300, 3), (7, 2))
]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with loaded_kernel() as kernel:
        yield kernel


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


def logits_of(engine: Engine, asks: list[Ask]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens, and the logits of each step."""
    seen: list[torch.Tensor] = []
    run_step = engine.runner.run

    def noted(plan: Any) -> Any:
        output = run_step(plan)
        if output.logits is not None:
            seen.append(output.logits.clone())
        return output

    engine.runner.run = noted  # type: ignore[method-assign]
    return run(engine, asks), seen


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("by_graphs", [False, True])
def test_what_is_said_is_torchs(kernel: Any, family: str, by_graphs: bool) -> None:
    """In float32, with windows and softcaps, prompts in the same step, and steps that are filled up."""
    model = tiny_model(family, torch.float32, layers=3).to(DEVICE)
    asked: list[int] = []

    def spied(queries: torch.Tensor, rows: torch.Tensor, *rest: Any, **options: Any) -> None:
        asked.append(len(rows))
        kernel.attend_rows(queries, rows, *rest, **options)

    ours = GpuAttention(SimpleNamespace(attend_rows=spied, takes=kernel.takes))
    options: dict[str, Any] = {"device": DEVICE, **({"new_graph": Again} if by_graphs else {})}
    wanted_tokens, wanted = logits_of(make_engine(model, 1, device=DEVICE), ASKS)
    tokens, found = logits_of(make_engine(model, 1, attention=ours, **options), ASKS)
    assert tokens == wanted_tokens
    assert max(asked) == (len(ASKS) if by_graphs else 2)  # else only those of a like length are read together
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() < 1e-3


def test_a_long_sequence_beside_short_ones_goes_by_a_graph(kernel: Any) -> None:
    """No padding is read, so it costs the others nothing. By torch such a step isn't filled up."""
    model = tiny_model("llama", torch.float32, layers=3, context=2048).to(DEVICE)
    asks = [Ask([3 + index * 7 % 90 for index in range(length)], 3) for length in (1100, 3, 3, 3, 3)]
    options: dict[str, Any] = {"device": DEVICE, "new_graph": Again, "num_blocks": 512, "max_step_tokens": 2048}
    replays = []
    for way in (GpuAttention(kernel), attend):
        engine = make_engine(model, 1, attention=way, **options)
        run(engine, asks)
        graphs = engine.runner.decode_path
        assert isinstance(graphs, StepGraphs)
        replays.append(sum(step._graph.num_replays for step in graphs._steps.values()))  # type: ignore[attr-defined]
    assert replays == [2, 0]


def test_rows_in_float64_are_torchs(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "attend_rows", lambda *_, **__: pytest.fail("by Triton"))
    model = tiny_model("llama", torch.float64, layers=3).to(DEVICE)
    asks = ASKS[:2]
    ours = run(make_engine(model, 1, attention=GpuAttention(kernel), device=DEVICE), asks)
    assert ours == run(make_engine(model, 1, device=DEVICE), asks)


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


def test_a_kernel_is_tried_before_it_serves(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = describe(tiny_model("gemma2").config)
    given = (spec, torch.float32, torch.float32, DEVICE)
    assert isinstance(find_gpu_attention(*given), GpuAttention)

    def wrong(*positional: Any, **options: Any) -> None:
        positional[-1].zero_()

    monkeypatch.setattr(kernel, "attend_rows", wrong)
    with pytest.raises(ConfigError, match=r"tried once, was \S+ off what torch gives"):
        find_gpu_attention(*given)
    monkeypatch.setattr(kernel, "attend_rows", lambda *given, **_: given[-1].fill_(float("nan")))
    with pytest.raises(ConfigError, match="was nan off"):
        find_gpu_attention(*given)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(kernel, "attend_rows", broken)
    with pytest.raises(ConfigError, match="can't be run: Failed to find C compiler"):
        find_gpu_attention(*given)


def test_without_triton_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shoal.kernels.paged_attention", None)
    with pytest.raises(ConfigError, match="Triton can't be imported"):
        find_gpu_attention(describe(tiny_model("llama").config), torch.float32, torch.float32, DEVICE)


class TestWhoAttends:
    SERVED: Any = SimpleNamespace(spec="a spec", dtype=torch.bfloat16, kv_dtype=torch.bfloat16)
    GPU = torch.device("cuda:0")

    def test_on_a_gpu_decode_by_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def find(*given: Any) -> str:
            asked.append(given)
            return "Triton's"

        monkeypatch.setattr(build, "find_gpu_attention", find)
        for kernels in ("auto", "native"):
            limits = StageConfig(kernels=kernels)  # type: ignore[arg-type]
            assert choose_kernels(limits, self.SERVED, self.GPU) is None
            assert choose_attention(limits, self.SERVED, Stage.DECODE, self.GPU) == "Triton's"
        assert asked == [("a spec", torch.bfloat16, torch.bfloat16, self.GPU)] * 2

    def test_elsewhere_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "find_gpu_attention", lambda *_: pytest.fail("asked"))
        for kernels, stage, device in (
            ("torch", Stage.DECODE, self.GPU), ("auto", Stage.PREFILL, self.GPU),
            ("auto", Stage.DECODE, torch.device("cpu")),
        ):  # fmt: skip
            limits = StageConfig(kernels=kernels)  # type: ignore[arg-type]
            assert choose_attention(limits, self.SERVED, stage, device) is attend

    def test_where_it_cannot_be_had_torch_or_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def find(*_: Any) -> Any:
            raise ConfigError("Triton can't be imported")

        monkeypatch.setattr(build, "find_gpu_attention", find)
        assert choose_attention(StageConfig(), self.SERVED, Stage.DECODE, self.GPU) is attend
        with pytest.raises(ConfigError, match="kernels is native, but: Triton can't be imported; with auto, torch"):
            choose_attention(StageConfig(kernels="native"), self.SERVED, Stage.DECODE, self.GPU)
