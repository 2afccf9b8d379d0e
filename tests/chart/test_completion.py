"""The script of `helm test`: it passes only if an answer came and a hand-off was counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import charts

SCRIPT = charts.CHART / "files" / "completion.py"


@contextmanager
def gateway(*, counts: bool, key: str = "") -> Iterator[str]:
    """A server that is gateway and replica at once; with ``counts``, a completion of a long prompt that it hasn't had
    before is one hand-off.

    The gateway wants ``key``, and the replica's metrics must not be shown it.
    """
    num_transfers = 3
    had: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_admitted():
                return
            answers = {
                "/v1/models": json.dumps({"data": [{"id": "fish"}]}),
                "/metrics/targets": json.dumps([{"targets": [self.headers["host"]], "labels": {}}]),
                "/metrics": f'shoal_kv_transfer_seconds_count{{transport="grpc"}} {num_transfers}.0\nother 1.0\n',
            }
            self._answer(answers[self.path])

        def do_POST(self) -> None:
            nonlocal num_transfers
            if not self._is_admitted():
                return
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if (self.path, asked["model"]) == ("/v1/completions", "fish"):
                num_transfers += counts and len(asked["prompt"].split()) > 300 and asked["prompt"] not in had
                had.add(asked["prompt"])
                self._answer(json.dumps({"choices": [{"text": " it is safe."}]}))

        def _is_admitted(self) -> bool:
            wanted = f"Bearer {key}" if key and self.path != "/metrics" else None
            if self.headers["authorization"] != wanted:
                self.send_error(401)
            return bool(self.headers["authorization"] == wanted)

        def _answer(self, body: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            """Nothing: the test says what matters."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(url: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if key is None else {"SHOAL_API_KEY": key})}
    return subprocess.run(
        [sys.executable, SCRIPT, url], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_an_answer_by_way_of_prefill_passes() -> None:
    """Also the second time, where decode keeps what it had."""
    with gateway(counts=True) as url:
        for _ in range(2):
            done = run(url)
            assert (done.returncode, done.stdout) == (0, " it is safe.\n1 counted\n")


def test_where_the_gateway_wants_a_key_it_gets_one_and_nobody_else_does() -> None:
    with gateway(counts=True, key="sk-shoal-test") as url:
        assert run(url, "sk-shoal-test").returncode == 0
        refused = run(url)
    assert refused.returncode == 1 and "401" in refused.stderr


def test_an_answer_without_a_hand_off_fails() -> None:
    with gateway(counts=False) as url:
        done = run(url)
    assert done.returncode == 1
    assert "the prompt never passed from prefill to decode" in done.stderr
