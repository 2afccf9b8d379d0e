"""What is taken back from a cluster that nobody waits for any more."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent import futures
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.cluster.start import _GONE, _Start
from shoal.config import ShoalConfig


def started(address: str | None, monkeypatch: pytest.MonkeyPatch, deleted: list[str]) -> _Start:
    """As it is once the pools are deployed."""
    serve = pytest.importorskip("ray.serve")
    monkeypatch.setattr(serve, "delete", lambda app, **_: deleted.append(app))
    status = SimpleNamespace(app_status=SimpleNamespace(status=_GONE))
    monkeypatch.setattr(_Start, "_status", lambda self: status)
    start = object.__new__(_Start)
    start._config = ShoalConfig(ray={"address": address})  # type: ignore[arg-type]
    start._app = "shoal"
    start._is_over = threading.Event()
    start._is_serve_ours = False
    drained: Any = SimpleNamespace(result=lambda timeout_s: None)
    start._gateway = SimpleNamespace(drain=SimpleNamespace(remote=lambda: drained))  # type: ignore[assignment]
    return start


@pytest.mark.parametrize(("address", "deleted"), [("auto", ["shoal"]), (None, [])])
def test_a_second_signal_leaves_no_application_on_a_cluster_that_stays(
    address: str | None, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    start = started(address, monkeypatch, found)
    start._is_over.set()
    start._take_back(())
    assert found == deleted


def test_what_is_being_deployed_is_waited_for_before_it_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    start = started("auto", monkeypatch, order)
    deploying = Future[None]()

    def wait(begun: Sequence[Future[None]], timeout: float) -> None:
        assert [*begun] == [deploying] and timeout > 0
        order.append("waited")

    monkeypatch.setattr(futures, "wait", wait)
    start._take_back([deploying])
    assert order == ["waited", "shoal"]
