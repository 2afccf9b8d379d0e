"""How long steps of the own engine take: prefill's by tokens and context, decode's by sequences and context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from cost_fits import Sample

from shoal.config import ShoalConfig, load_config
from shoal.engine.build import Served, build_engine, load_parameters
from shoal.engine.engine import Engine
from shoal.wire.messages import Depth, SamplingParams, Stage


@dataclass(frozen=True, slots=True)
class Grid:
    """``chunks`` of prompts of ``prompt_tokens``; decode steps of each of ``streams`` at each of ``contexts``. Each is
    run ``rounds`` times, decode's ``steps`` times in a row, and the median counts.
    """

    chunks: Sequence[int]
    prompt_tokens: int
    streams: Sequence[int]
    contexts: Sequence[int]
    rounds: int
    steps: int


def config_for(skip_layers: int, grid: Grid) -> ShoalConfig:
    """A model as the grid wants it: how long steps take doesn't depend on what the projection was learned from."""
    block = 16
    prefill = (grid.prompt_tokens + max(grid.chunks)) // block + 2
    decode = max(grid.streams) * (max(grid.contexts) + grid.rounds * grid.steps + 8 * block) // block
    return load_config(
        model={"skip_layers": skip_layers, "dtype": "bfloat16", "projector": "paper"},
        prefill={"num_blocks": prefill, "block_tokens": block, "max_step_tokens": max(grid.chunks)},
        decode={"num_blocks": decode, "block_tokens": block, "max_sequences": max(grid.streams)},
        handoff={"max_reserved_ratio": 1.0},
    )


def make_engine(config: ShoalConfig, stage: Stage) -> Engine:
    """With a pool of random numbers: pages that nobody wrote would all be one, and read from the nearest cache."""
    device = torch.device("cpu")
    served = Served.of(config)
    engine = build_engine(config, stage, served, load_parameters(served, stage, device), device=device)
    for layer in engine.runner.pool.layers:
        layer.normal_()
    return engine


def prefill_times(engine: Engine, grid: Grid, on_step: Callable[[], None]) -> list[Sample]:
    """One sample for each chunk of a long prompt, for each size of chunks: its tokens, those before it, seconds."""
    times: dict[tuple[int, int, int], list[float]] = {}
    for number in range(grid.rounds):
        for chunk in grid.chunks:
            for start, end, seconds in run_prompt(engine, f"{number}, {chunk}", grid.prompt_tokens, chunk):
                times.setdefault((chunk, start, end), []).append(seconds)
            on_step()
    return [
        {"chunk": chunk, "start": start, "end": end, "seconds": statistics.median(found)}
        for (chunk, start, end), found in times.items()
    ]


def run_prompt(engine: Engine, key: str, num_tokens: int, chunk: int) -> list[tuple[int, int, float]]:
    """All chunks of one prompt: start, end, seconds."""
    engine.scheduler.max_step_tokens = chunk
    prompt = tuple(20 + (7919 * index) % 40_000 for index in range(num_tokens + 1))
    engine.submit_prefill(key, len(prompt))
    engine.step()
    engine.start_shipping(key, prompt)
    found, end = [], 0
    while end < num_tokens:
        began_s = time.perf_counter()
        [computed] = engine.step().chunks
        while not computed.is_whole:
            [computed] = engine.step().chunks
        found.append((computed.start, computed.end, time.perf_counter() - began_s))
        engine.chunk_sent(key)
        end = computed.end
    engine.finish(key)
    return found


def decode_times(engine: Engine, grid: Grid, on_step: Callable[[], None]) -> list[Sample]:
    """One sample for each number of streams and context: what a step of all of them takes."""
    samples: list[Sample] = []
    for streams in grid.streams:
        for context in grid.contexts:
            seconds = []
            for number in range(grid.rounds):
                begin(engine, streams, context, f"{number}")
                engine.step()
                for _ in range(grid.steps):
                    began_s = time.perf_counter()
                    output = engine.step()
                    seconds.append(time.perf_counter() - began_s)
                    if len(output.tokens) != streams:
                        raise SystemExit(f"{len(output.tokens)} tokens of {streams} streams: raise the pool")
                for index in range(streams):
                    engine.finish(f"{number}, {index}")
            middle = context + (grid.steps + 1) // 2
            samples.append({"streams": streams, "context": middle, "seconds": statistics.median(seconds)})
            on_step()
    return samples


def begin(engine: Engine, streams: int, context: int, key: str) -> None:
    """As many sequences whose prompts were handed over, though nobody computed them."""
    sampling = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True, may_shorten=True)
    for index in range(streams):
        engine.submit_generate(f"{key}, {index}", (20 + index,) * context, Depth.SHALLOW, sampling, hold=True)
    engine.step()
    for index in range(streams):
        engine.start(f"{key}, {index}", num_arrived=context - 1)
