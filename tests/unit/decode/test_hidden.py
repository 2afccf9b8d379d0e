"""States instead of projected K/V: fewer bytes, the same answer, and prefill's own finds serve both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny
from reference import pop_generate

from shoal.cluster.local import LocalShoal, open_local
from shoal.config import load_config
from shoal.decode.sink import PoolSink
from shoal.errors import ConfigError
from shoal.handoff.base import crc32c
from shoal.model.kv_layout import stage_layout
from shoal.model.kv_pool import KvPool
from shoal.wire.handoff_messages import Chunk, WireMode
from shoal.wire.messages import Depth, GenerateRequest, HandoffReport, RequestContext, SamplingParams

SKIPPED, LAYERS, BLOCK = 3, 6, 4
PROMPT = tuple(3 + index * 7 % 90 for index in range(60))
Opened = Callable[..., AbstractAsyncContextManager[LocalShoal]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return save_tiny(folder, dtype=torch.float32, layers=LAYERS)


@pytest.fixture
def opened(model: Any, folder: Path) -> Opened:
    @asynccontextmanager
    async def open_it(wire_mode: str, **options: Any) -> AsyncIterator[LocalShoal]:
        stage = {"num_blocks": 64, "block_tokens": BLOCK, "max_step_tokens": 16, "num_threads": 1}
        settings = {"name": str(folder), "skip_layers": SKIPPED, "dtype": "float32"}
        config = load_config(
            model=settings | options.pop("model", {}),
            prefill=stage | options.pop("prefill", {}),
            decode=stage,
            handoff={"wire_mode": wire_mode} | options,
        )
        async with open_local(config) as local:
            yield local
            await asyncio.wait_for(local.decode.desk.idle.wait(), 5)
            counts = await local.decode.counts()
            assert counts.num_free_blocks == counts.num_blocks

    return open_it


async def ask(local: LocalShoal, prompt: tuple[int, ...] = PROMPT) -> tuple[tuple[int, ...], HandoffReport]:
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(RequestContext("test", 30), "tiny", prompt, Depth.SHALLOW, params)
    outputs = [output async for output in local.decode.worker.generate(request)]
    report = outputs[0].handoff
    assert report is not None and report.transferred, report
    return tuple(token for output in outputs for token in output.token_ids), report


async def test_the_answer_is_the_same_and_the_bytes_are_fewer(opened: Opened, model: Any):
    reports = {}
    for wire_mode in ("kv", "hidden"):
        async with opened(wire_mode) as local:
            tokens, reports[wire_mode] = await ask(local)
        assert tokens == pop_generate(model, PROMPT, 5, SKIPPED).token_ids
    state_bytes = model.config.hidden_size * 4
    kv, hidden = reports["kv"], reports["hidden"]
    assert (hidden.deep_bytes, hidden.hidden_bytes) == (0, (len(PROMPT) - 1) * state_bytes)
    assert kv.hidden_bytes == 0 and kv.deep_bytes > hidden.hidden_bytes
    assert kv.shallow_bytes == hidden.shallow_bytes


@pytest.mark.parametrize("settings", [{"skip_layers": 0}, {"plan": "speed"}], ids=["nothing skipped", "speed"])
async def test_where_nothing_is_projected_there_are_no_states(opened: Opened, settings: dict[str, Any]):
    async with opened("hidden", model=settings) as local:
        _, report = await ask(local)
    assert report.hidden_bytes == 0 and report.shallow_bytes > 0


def test_a_state_must_fit_a_frame(opened: Opened, tmp_path: Path):
    save_tiny(tmp_path, dtype=torch.float32, layers=LAYERS, hidden=320)  # of a token 1,280 bytes; its K/V are 256

    async def start() -> None:
        async with opened("hidden", max_frame_bytes=1024, model={"name": str(tmp_path)}):
            pass

    with pytest.raises(ConfigError, match=r"max_frame_bytes is 1024.*or its state, are 1280 bytes: raise it"):
        asyncio.run(start())


def sink_of(project: Any = None) -> tuple[KvPool, PoolSink]:
    layout = stage_layout(
        num_layers=2, num_kept=1, num_held=2, num_kv_heads=1, head_dim=2, dtype_bytes=4, block_tokens=BLOCK
    )
    pool = KvPool(layout, 2, dtype=torch.float32, device=torch.device("cpu"))
    return pool, PoolSink(pool, project)


def hidden_chunk(states: torch.Tensor, start: int) -> Chunk:
    payload = states.numpy().tobytes()
    return Chunk(b"", 0, start, start + len(states), 1, 2, crc32c(payload), payload, wire_mode=WireMode.HIDDEN)


async def test_states_land_as_what_they_project_to_at_their_positions():
    def project(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        return (states * 10 + positions[:, None]).view(1, -1, 2, 1, 2)

    pool, sink = sink_of(project)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        states = torch.arange(12, dtype=torch.float32).view(3, 4)
        chunk = hidden_chunk(states, 3)
        assert await sink.write([1, 0], chunk, lambda: True) == chunk.crc32c
        expected = states * 10 + torch.tensor([[3.0], [4.0], [5.0]])
        held = torch.cat([pool.layers[1][BLOCK + 3 : BLOCK + 4], pool.layers[1][:2]]).view(3, 4)
        torch.testing.assert_close(held, expected, rtol=0, atol=0)
        assert not pool.layers[0].any()
        # A thread that computes for the first time now still gets as many as before.
        assert await asyncio.to_thread(torch.get_num_threads) == 2
    finally:
        torch.set_num_threads(before)
        sink.close()
