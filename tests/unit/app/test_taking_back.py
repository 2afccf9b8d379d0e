"""What is taken back from a cluster that nobody waits for any more."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.app.cluster import _GONE, _Start
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


def test_what_is_being_deployed_is_taken_back_once_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    start = started("auto", monkeypatch, found)
    deploying = Future[None]()
    taking = threading.Thread(target=start._take_back, args=([deploying],))
    taking.start()
    taking.join(0.05)
    assert found == []
    deploying.set_result(None)
    taking.join(20)
    assert found == ["shoal"]
