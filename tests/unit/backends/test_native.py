"""The decoder over Shoal's own kernels: bfloat16 differs from float32 no more than torch's bfloat16 does."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from engines import (
    Ask,
    divergence,
    emulated_kernels,
    kernel_model,
    logits_after,
    make_engine,
    native_kernels,
    run,
    run_handed_off,
)
from models import save_tiny, tiny_model

from shoal.backends.cpu import native
from shoal.backends.cpu.kernels import NativeKernels
from shoal.backends.cpu.native import check_native
from shoal.config import ModelConfig, ShoalConfig, StageConfig, load_config
from shoal.engine import build
from shoal.engine.build import Served, choose_kernels, require_int8
from shoal.errors import ConfigError
from shoal.model.families import describe
from shoal.wire.messages import Depth, Stage

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
PROMPT = [3 + index * 7 % 90 for index in range(150)]


@pytest.fixture(scope="module")
def kernels() -> NativeKernels:
    return native_kernels()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", list(Depth))
@pytest.mark.parametrize("max_step_tokens", [512, 37])
def test_as_near_to_float32_as_torch(kernels: NativeKernels, family: str, depth: Depth, max_step_tokens: int) -> None:
    rounded = kernel_model(family, torch.bfloat16)
    wide = copy.deepcopy(rounded).float()
    engine = {"num_skipped": 2, "max_step_tokens": max_step_tokens}
    exact, torchs, ours = (
        logits_after(make_engine(model, kernels=own, **engine), PROMPT, depth)  # type: ignore[arg-type]
        for model, own in ((wide, None), (rounded, None), (rounded, kernels))
    )
    assert not torch.equal(ours, torchs), "the kernels weren't asked"
    assert divergence(ours, exact) < 2 * divergence(torchs, exact) + 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_by_tiles_as_near_to_float32(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prompts and rows that decode, few and many: decode's products and attention are tiles'."""
    tiles = emulated_kernels(tmp_path_factory.getbasetemp().parent / "kernels")
    assert tiles.has_tiles
    rounded = kernel_model(family, torch.bfloat16)
    exact = make_engine(copy.deepcopy(rounded).float(), 2, num_blocks=1024)
    ours = make_engine(rounded, 2, kernels=tiles, num_blocks=1024)
    for num_tokens, depth in ((150, Depth.FULL), (90, Depth.SHALLOW), (7, Depth.SHALLOW)):
        found, wanted = (logits_after(engine, PROMPT[:num_tokens], depth) for engine in (ours, exact))
        assert divergence(found, wanted) < 1e-2
    assert len(run(ours, [Ask(PROMPT[: 5 + 9 * index], num_tokens=4) for index in range(20)])) == 20


def test_many_at_once_and_handed_off(kernels: NativeKernels) -> None:
    """Steps that hold prompts and single rows of different lengths, more of them than the kernels' few rows."""
    model = kernel_model("llama", torch.bfloat16)
    asks = [Ask(PROMPT[: 5 + 7 * index], num_tokens=6) for index in range(20)]
    decode = make_engine(model, 2, kernels=kernels, num_blocks=1024)
    alone = [run(decode, [ask])[0] for ask in asks]
    together = run(decode, asks)
    prefill = make_engine(model, 2, stage=Stage.PREFILL, kernels=kernels, num_blocks=1024)
    handed_off = run_handed_off(prefill, decode, asks)
    # Attention of single rows adds up in another order than that of many: near ties may fall the other way.
    for others in (together, handed_off):
        same = sum(ours == theirs for ours, theirs in zip(alone, others, strict=True))
        assert same >= len(asks) - 4


@pytest.mark.parametrize(
    ("changes", "dtype", "device", "why"),
    [
        ({}, torch.bfloat16, "cuda", "for CPUs"),
        ({}, torch.float32, "cpu", "bfloat16 only"),
        ({"head_dim": 24}, torch.bfloat16, "cpu", "heads of 24"),
        ({"hidden": 72, "head_dim": 64}, torch.bfloat16, "cpu", "multiples of 32"),
    ],
)
def test_what_they_cannot_do_is_said(changes: dict[str, Any], dtype: torch.dtype, device: str, why: str) -> None:
    spec = describe(tiny_model("llama", **{"head_dim": 64, **changes}).config)
    with pytest.raises(ConfigError, match=why):
        check_native(spec, dtype, dtype, torch.device(device))


@pytest.mark.parametrize(("dtype", "is_native"), [("bfloat16", True), ("float32", False)])
def test_what_is_chosen(kernels: NativeKernels, dtype: Any, is_native: bool) -> None:
    served = Served.of(ShoalConfig(model=ModelConfig(dtype=dtype)))
    assert (choose_kernels(StageConfig(), served, CPU) is kernels) == is_native
    assert choose_kernels(StageConfig(kernels="torch"), served, CPU) is None
    if not is_native:
        with pytest.raises(ConfigError, match="kernels is native, but: they compute in bfloat16 only"):
            choose_kernels(StageConfig(kernels="native"), served, CPU)


def no_kernels(*_: object) -> NoReturn:
    raise ConfigError("no C++ compiler is at hand")


class TestWithoutNativeBfloat16:
    """What `auto` is on a CPU whose bfloat16 torch would emulate."""

    @pytest.fixture(autouse=True)
    def emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "multiplies_bfloat16", lambda: False)

    def test_it_is_bfloat16_where_kernels_widen_it(self, kernels: NativeKernels) -> None:
        assert Served.of(load_config()).dtype is torch.bfloat16

    @pytest.mark.parametrize("stage", ["prefill", "decode"])
    def test_it_is_float32_where_torch_is_to_compute_in_a_pool(self, kernels: NativeKernels, stage: str) -> None:
        assert Served.of(load_config(**{stage: {"kernels": "torch"}})).dtype is torch.float32

    @pytest.mark.parametrize("demanded", [{"kernels": "native"}, {"weights": "int8"}])
    def test_who_cannot_do_without_them_is_told_why_there_are_none(
        self, monkeypatch: pytest.MonkeyPatch, demanded: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(build, "load_kernels", no_kernels)
        monkeypatch.setattr(native, "load", no_kernels)
        config = load_config(decode=demanded)
        choose = partial(require_int8, stage=Stage.DECODE) if "weights" in demanded else choose_kernels
        with pytest.raises(ConfigError, match="no C\\+\\+ compiler is at hand"):
            choose(config.decode, Served.of(config), CPU)

    def test_it_is_float32_for_a_model_that_they_cannot_run(self, kernels: NativeKernels, tmp_path: Path) -> None:
        save_tiny(tmp_path)  # whose heads are smaller than any that they take
        assert Served.of(load_config(model={"name": str(tmp_path)})).dtype is torch.float32
