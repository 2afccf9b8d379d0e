"""What this machine can do at most, measured now: arithmetic, memory, loopback, shared memory. Prints JSON.

    python tests/benchmarks/machine_limits.py [--seconds 1] [--threads 2]

Each is the best of all repetitions within its seconds, in the process' own buffers, with nothing else of ours running.
A process of its own, so that no thread of torch's stays behind to spin beside what is measured next.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.shared_memory import SharedMemory

import torch

_GEMM_SIZE = 2048
_READ_BYTES = 512 << 20  # far beyond any cache
_COPY_BYTES = 64 << 20
_SEND_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Rates per second."""

    gemm_flops: float
    """Multiplying two square matrices on all threads, in bfloat16 or in float32, whichever is quicker."""
    read_bytes: float
    """Reading memory, on all threads."""
    loopback_bytes: float
    """One TCP connection over 127.0.0.1, one thread at each end."""
    shared_memory_bytes: float
    """One thread, copying into memory that another process could map."""


def measure_limits(seconds: float) -> MachineLimits:
    return MachineLimits(
        gemm_flops=_gemm(seconds),
        read_bytes=memory_read_bytes_per_s(seconds),
        loopback_bytes=_loopback(seconds),
        shared_memory_bytes=_shared_memory(seconds),
    )


def _gemm(seconds: float) -> float:
    def in_dtype(dtype: torch.dtype) -> float:
        left, right = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * _GEMM_SIZE**3 / _best(lambda: torch.mm(left, right, out=out), seconds)

    return max(in_dtype(torch.bfloat16), in_dtype(torch.float32))


def memory_read_bytes_per_s(seconds: float = 1.0) -> float:
    values = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _best(values.sum, seconds)


def _shared_memory(seconds: float) -> float:
    memory = SharedMemory(create=True, size=_COPY_BYTES)
    try:
        source, shared = memoryview(bytearray(_COPY_BYTES)), memory.buf
        assert shared is not None

        def copy() -> None:
            shared[:_COPY_BYTES] = source

        return _COPY_BYTES / _best(copy, seconds)
    finally:
        memory.close()
        memory.unlink()


def _loopback(seconds: float) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        data, into = memoryview(bytearray(_SEND_BYTES)), memoryview(bytearray(_CHUNK_BYTES))

        def send() -> None:
            thread = threading.Thread(target=sender.sendall, args=(data,))
            thread.start()
            left = _SEND_BYTES
            while left:
                left -= receiver.recv_into(into[: min(left, _CHUNK_BYTES)])
            thread.join()

        return _SEND_BYTES / _best(send, seconds)


def _best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of at least three, after one that doesn't count."""
    run()
    best, num_runs, ends_s = float("inf"), 0, time.perf_counter() + seconds
    while num_runs < 3 or time.perf_counter() < ends_s:
        started_s = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started_s)
        num_runs += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each limit")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(asdict(measure_limits(options.seconds))))


if __name__ == "__main__":
    main()
