"""What is computed on a GPU is what a CPU computes, as far as that can be seen without one (pretended_gpu.py):
each operation gets tensors of one device alone, and what goes to the host is waited for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from engines import CPU, Ask, make_engine, payload_of, run_choices
from models import TINY_FAMILIES, save_tiny, tiny_model
from pretended_gpu import OnGpu, pretended_gpu

from shoal.backends.gpu.step_graph import StepGraphs
from shoal.config import load_config
from shoal.decode.sink import PoolSink
from shoal.engine import build
from shoal.engine.build import Served, build_engine, choose_device, load_parameters
from shoal.engine.engine import Engine
from shoal.engine.tables import Reuse
from shoal.errors import ConfigError
from shoal.handoff.base import crc32c
from shoal.wire.handoff_messages import Chunk, WireMode
from shoal.wire.messages import Depth, SamplingParams, Stage

SKIPPED, ROWS = 2, 32
PROMPT = [3 + index * 7 % 90 for index in range(70)]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, seed=5, min_tokens=2, num_logprobs=3)
# Of both depths, one in several chunks, one of a single token, some drawn, one of three choices.
ASKS = [
    Ask(PROMPT, depth=Depth.SHALLOW, sampling=GREEDY), Ask(PROMPT[:40], depth=Depth.FULL, sampling=DRAWN),
    Ask(PROMPT[:1], depth=Depth.FULL, sampling=GREEDY), Ask(PROMPT[:50], depth=Depth.SHALLOW, sampling=DRAWN),
    Ask(PROMPT[:5], depth=Depth.FULL, sampling=replace(DRAWN, num_choices=3)),
]  # fmt: skip


class Again:
    """Stands in for a graph: runs what was captured once more."""

    def capture(self, run: Callable[[], None]) -> None:
        self.replay = run
        run()

    def replay(self) -> None:
        raise AssertionError("never captured")


class AtOnce(Executor):
    """In the calling thread: a pretended GPU is there in that one alone."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*args, **options))
        return done


def on_both(work: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    with pretended_gpu() as device:
        found = work(device)
    return found, work(CPU)


@pytest.mark.parametrize(
    ("family", "graphs"),
    [*((family, Again) for family in TINY_FAMILIES), *((family, None) for family in ("llama", "mistral", "gemma2"))],
)
def test_an_engine_says_what_a_cpus_says(family: str, graphs: Any) -> None:
    """Prompts in chunks, and one of them once more, whose K/V are there."""
    model = tiny_model(family, torch.float32, layers=4)

    def answers(device: torch.device) -> Any:
        engine = make_engine(model, SKIPPED, max_step_tokens=ROWS, device=device, new_graph=graphs, reuse=Reuse.EXACT)
        said = run_choices(engine, ASKS), run_choices(engine, ASKS[:1])
        assert engine.runner.pool.layers[0].device.type == device.type
        return said

    found, expected = on_both(answers)
    assert found == expected


@pytest.mark.parametrize(
    ("family", "wire_mode"), [("llama", WireMode.KV), ("gemma3_text", WireMode.KV), ("llama", WireMode.HIDDEN)]
)
async def test_a_hand_off_between_gpus(family: str, wire_mode: WireMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What prefill ships is the host's, and complete; what decode gets lands on its GPU."""
    model = tiny_model(family, torch.float32, layers=4)

    async def answer(device: torch.device) -> list[int]:
        prefill = make_engine(model, SKIPPED, stage=Stage.PREFILL, max_step_tokens=ROWS, device=device)
        decode = make_engine(model, SKIPPED, device=device, new_graph=Again)
        sink, blocks = reserved(decode, monkeypatch)
        async for chunk in shipped(prefill, wire_mode):
            assert await sink.write(blocks, chunk, lambda: True) == chunk.crc32c
        decode.start("0", num_arrived=len(PROMPT) - 1)
        said: list[int] = []
        while len(said) < GREEDY.max_tokens:
            output = decode.step()
            assert not output.failures
            said += [event.token_id for event in output.tokens]
        return said

    with pretended_gpu() as device:
        found = await answer(device)
    assert found == await answer(CPU)


def reserved(decode: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[PoolSink, tuple[int, ...]]:
    """What writes into the blocks that a prompt holds, and these."""
    decode.submit_generate("0", tuple(PROMPT), Depth.SHALLOW, GREEDY, hold=True)
    [reservation] = decode.step().reserved
    sink = PoolSink(decode.runner.pool, decode.runner.decoder.project)
    monkeypatch.setattr(sink, "_copy_thread", AtOnce())
    return sink, reservation.blocks


async def shipped(prefill: Engine, wire_mode: WireMode) -> Any:
    prefill.submit_prefill("0", len(PROMPT))
    prefill.step()
    prefill.start_shipping("0", tuple(PROMPT), wire_mode=wire_mode)
    modes, num_sent = set(), 0
    while num_sent < len(PROMPT) - 1:
        output = prefill.step()
        assert not output.failures
        for part in output.chunks:
            payload = payload_of(part, prefill.runner.pool)
            assert type(payload) is torch.Tensor and payload.device == CPU
            data = payload.contiguous().view(torch.uint8).numpy().tobytes()
            yield Chunk(
                bytes(16), 0, part.start, part.end, part.layers.start, part.layers.stop, crc32c(data), data, None,
                part.wire_mode,
            )  # fmt: skip
            modes.add(part.wire_mode)
            if part.is_whole:
                num_sent = part.end
                prefill.chunk_sent("0")
    assert wire_mode in modes


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_replica_with_a_gpu_is_built(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its files, warm, where its configuration says that it has one; decode with graphs."""
    monkeypatch.setattr(build, "CudaGraphs", lambda _: Again)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnns := Mock())
    monkeypatch.setattr(importlib, "import_module", loaded := Mock(wraps=importlib.import_module))
    save_tiny(tmp_path, tiny_model(family, torch.float32, layers=4))
    stages: dict[str, Any] = {"num_gpus": 1, "max_step_tokens": ROWS}
    config = load_config(model={"name": str(tmp_path), "skip_layers": SKIPPED}, prefill=stages, decode=stages)
    with pretended_gpu() as device:
        assert choose_device(config.prefill) == choose_device(config.decode) == device
        served = Served.of(config, device)
        assert served.dtype is torch.bfloat16
        for stage in Stage:
            engine = build_engine(config, stage, served, load_parameters(served, stage, device), device=device)
            assert all(isinstance(layer, OnGpu) for layer in engine.runner.pool.layers)
        assert isinstance(engine.runner.decode_path, StepGraphs)
    cudnns.assert_called_with(False)
    assert call("torch.nn.attention.bias") in loaded.call_args_list  # which takes a second, the first time


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("cuda", "device is cuda, but of GPUs torch finds 0 here"),
        ("cuda:1", "cuda:1, but of GPUs torch finds 1 here"),
        ("cudda", "cudda"),
    ],
)
def test_a_device_that_is_not_here_is_refused(wanted: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_gpus = 1 if wanted == "cuda:1" else 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(num_gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    config = load_config(decode={"device": wanted})
    with pytest.raises(ConfigError, match=said):
        choose_device(config.decode)


@pytest.mark.parametrize("num_gpus", [1, 0.5])
def test_where_gpus_are_set_aside_and_torch_finds_none_the_replica_does_not_compute_on_a_cpu(
    num_gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"num_gpus is {num_gpus:g}, but torch .* finds no GPU here"):
        choose_device(load_config(prefill={"num_gpus": num_gpus}).prefill)
    told = load_config(prefill={"num_gpus": num_gpus, "device": "cpu"}).prefill
    assert choose_device(told) == choose_device(load_config().prefill) == CPU
