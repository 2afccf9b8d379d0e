"""What two stages that compute on the same cores at once get done, beside what each would by itself.

A process of each stage runs the same step for some seconds, alone and beside the other. The sum of what each reached of
its own rate is 1 if sharing costs nothing. As a program, it is one of these processes.
"""

from __future__ import annotations

import os

# As replicas have it, before torch loads (cluster/graph.py).
os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="5000", TOKENIZERS_PARALLELISM="false")

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from step_times import Grid, begin, config_for, make_engine

from shoal.config import PREFILL_NICENESS
from shoal.engine.engine import Engine
from shoal.process.machine import step_back
from shoal.wire.messages import Stage

_CHUNK, _STREAMS, _CONTEXT = 512, 8, 512


def sharing_efficiency(skip_layers: int, threads: int, seconds: float) -> tuple[float, dict[str, float]]:
    """The efficiency, and the rates that it is made of (steps a second)."""
    with _child("prefill", skip_layers, threads) as prefill, _child("decode", skip_layers, threads) as decode:
        alone = [_rates([one], seconds)[0] for one in (prefill, decode)]
        together = _rates([prefill, decode], seconds)
    shares = [beside / rate for beside, rate in zip(together, alone, strict=True)]
    rates = {
        "prefill alone": alone[0], "decode alone": alone[1], "prefill beside decode": together[0],
        "decode beside prefill": together[1],
    }  # fmt: skip
    return sum(shares), rates


@contextmanager
def _child(stage: str, skip_layers: int, threads: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__, stage, str(skip_layers), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _line(process)  # ready
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _rates(processes: list[subprocess.Popen[str]], seconds: float) -> list[float]:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return [float(_line(process)) for process in processes]


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("error: a stage ended before it was measured")
    return line


def main() -> None:
    stage, skip_layers, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    if stage == "prefill":
        step_back(PREFILL_NICENESS)  # as a server's does
    grid = Grid((_CHUNK,), _CHUNK, (_STREAMS,), (_CONTEXT,), 1, 1)
    engine = make_engine(config_for(skip_layers, grid), Stage(stage))
    step = _prefill_step(engine) if stage == "prefill" else _decode_step(engine)
    next(step)
    print("ready", flush=True)
    for line in sys.stdin:
        ends_s, num = time.perf_counter() + float(line), 0
        began_s = time.perf_counter()
        while time.perf_counter() < ends_s:
            next(step)
            num += 1
        print(num / (time.perf_counter() - began_s), flush=True)


def _prefill_step(engine: Engine) -> Iterator[None]:
    prompt = tuple(range(20, 21 + _CHUNK))
    while True:
        engine.submit_prefill("one", len(prompt))
        engine.step()
        engine.start_shipping("one", prompt)
        while not engine.step().is_idle:
            pass
        engine.finish("one")
        yield


def _decode_step(engine: Engine) -> Iterator[None]:
    """A few steps at one context, then anew."""
    while True:
        begin(engine, _STREAMS, _CONTEXT, "one")
        for _ in range(64):
            engine.step()
            yield
        for index in range(_STREAMS):
            engine.finish(f"one, {index}")


if __name__ == "__main__":
    main()
