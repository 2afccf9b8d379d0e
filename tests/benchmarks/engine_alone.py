"""How long a token takes the engine alone: nobody asks, nobody is told, and the cores are its own.

    echo 8 | python tests/benchmarks/engine_alone.py --max-streams 32 --prompt-tokens 16 --output-tokens 128

For each line of its input, a number of streams, it prints seconds a step: the mean of those that an answer of so many
tokens takes after its first one, of prompts that were handed over. It waits for lines, so another process can have it
ready and ask it in turns with something else.
"""

from __future__ import annotations

import os

# As replicas have it, before torch loads (cluster/graph.py).
os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="5000", TOKENIZERS_PARALLELISM="false")

import argparse
import sys
import time

import torch
from step_times import Grid, begin, config_for, make_engine

from shoal.engine.engine import Engine
from shoal.wire.messages import Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    steps = options.output_tokens - 1
    grid = Grid((1,), 1, (options.max_streams,), (options.prompt_tokens,), rounds=1, steps=steps)
    engine = make_engine(config_for(0, grid), Stage.DECODE)
    for line in sys.stdin:
        print(_mean_step_s(engine, int(line), options.prompt_tokens, steps), flush=True)


def _mean_step_s(engine: Engine, streams: int, context: int, steps: int) -> float:
    """From the end of the first step to that of the last, as a client counts time per token."""
    begin(engine, streams, context, "alone")
    engine.step()
    began_s = time.perf_counter()
    num_tokens = sum(len(engine.step().tokens) for _ in range(steps))
    seconds = time.perf_counter() - began_s
    for index in range(streams):
        engine.finish(f"alone, {index}")
    if num_tokens != steps * streams:
        raise SystemExit(f"{num_tokens} tokens of {streams} streams in {steps} steps: raise --max-streams")
    return seconds / steps


if __name__ == "__main__":
    main()
