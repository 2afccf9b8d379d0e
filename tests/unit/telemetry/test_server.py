"""One port a process, from a range that a firewall can be told."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from shoal.errors import ConfigError
from shoal.telemetry import Target, serve_metrics, targets_document


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on, with a free one above it as far as can be known."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_metrics_are_served_and_the_port_is_free_after_close() -> None:
    registry = CollectorRegistry()
    Counter("shoal_tries", "Tries.", registry=registry).inc(3)
    server = serve_metrics(registry, "127.0.0.1", 22600, 22699)  # nobody else's: it is bound again below
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        assert "shoal_tries_total 3.0" in answer.read().decode()
    server.close()
    server.close()
    with socket.create_server(("127.0.0.1", server.port)):
        pass


def test_a_taken_port_is_passed_over(taken: int) -> None:
    server = serve_metrics(CollectorRegistry(), "127.0.0.1", taken, min(taken + 20, 65535))
    try:
        assert taken < server.port <= taken + 20
    finally:
        server.close()


def test_no_free_port_says_which_setting_to_change(taken: int) -> None:
    with pytest.raises(ConfigError, match=rf"{taken}\.\.{taken} on 127\.0\.0\.1.*metrics\.port_range"):
        serve_metrics(CollectorRegistry(), "127.0.0.1", taken, taken)


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    server = serve_metrics(CollectorRegistry(), first_port=22800, last_port=22899)
    try:
        # The same port on another loopback address is free only if the server did not take all interfaces.
        with socket.create_server(("127.0.0.2", server.port)):
            pass
    finally:
        server.close()


def test_targets_document_is_what_prometheus_reads() -> None:
    document = targets_document([Target("127.0.0.1:22001", "prefill", "b"), Target("127.0.0.1:22000", "decode", "a")])
    assert json.loads(json.dumps(document)) == [
        {"targets": ["127.0.0.1:22000"], "labels": {"role": "decode", "replica": "a"}},
        {"targets": ["127.0.0.1:22001"], "labels": {"role": "prefill", "replica": "b"}},
    ]
    assert targets_document([]) == []
