"""How long a decode step takes the engine alone: nobody asks, nobody is told, and the cores are its own.

    python tests/benchmarks/engine_alone.py --streams 1 8 32 --prompt-tokens 16 --output-tokens 128

Prints, as JSON, the median step in seconds by number of streams: of those that an answer of so many tokens takes after
its first one, of prompts that were handed over.
"""

from __future__ import annotations

import os

# As replicas have it, before torch loads (app/graph.py).
os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="5000", TOKENIZERS_PARALLELISM="false")

import argparse
import json

import torch
from step_times import Grid, config_for, decode_times, make_engine

from shoal.messages import Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    grid = Grid((1,), 1, options.streams, (options.prompt_tokens,), 2, options.output_tokens - 1)
    samples = decode_times(make_engine(config_for(0, grid), Stage.DECODE), grid, lambda: None)
    print(json.dumps({one["streams"]: one["seconds"] for one in samples}))


if __name__ == "__main__":
    main()
