"""llama.cpp's own HTTP server, run by a Python that has xllamacpp, which carries it.

Not llama-cpp-python's: that one answers one request after another, and takes no token ids.

    python tests/benchmarks/llamacpp_server.py MODEL.gguf --port 8100 [--threads 2] [--poll 50] [--parallel 64]
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    options = _options()
    # Before the server's own threads are, so that none of them takes the signals.
    ends = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.parallel
    params.n_threads_http = 2 * options.parallel + 8  # connections that wait for their next request hold one each
    params.n_ctx = options.context
    params.kv_unified = True
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.ui = False
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = options.threads
        threads.poll = options.poll
    server = xllamacpp.Server(params)
    print(f"llama.cpp listens on {server.listening_address}", flush=True)
    signal.sigwait(ends)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--poll", type=int, default=50, help="0: idle threads sleep; 100: they spin")
    parser.add_argument("--parallel", type=int, default=64, help="requests that run at once")
    parser.add_argument("--context", type=int, default=32_768, help="tokens that all of them may have together")
    return parser.parse_args()


if __name__ == "__main__":
    main()
