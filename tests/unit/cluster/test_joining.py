"""Clusters that can't be joined, and what doesn't start there: each is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.serve.context
from ray import serve

from shoal.cluster.progress import Progress
from shoal.cluster.start import _GONE, _Start
from shoal.config import ShoalConfig
from shoal.errors import ConfigError, ShoalError, Unavailable

PLACE = "10.0.0.9:6379"
Join = Callable[..., _Start]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Ray says of a cluster in which all goes well. ``has_begun`` is whether anything was started there."""
    found = SimpleNamespace(
        resources={"CPU": 8.0, "prefill": 1.0, "decode": 1.0}, names=["another"], status="RUNNING", has_begun=False
    )

    def refuse(**_options: Any) -> None:
        raise ConnectionError("nobody answers")

    def begin(**_options: Any) -> None:
        found.has_begun = True

    def status(_start: _Start) -> Any:
        return SimpleNamespace(app_status=SimpleNamespace(status=found.status))

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "cluster_resources", lambda: found.resources)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=found.names))
    monkeypatch.setattr(serve, "start", begin)
    for name in ("_get_global_client", "_set_global_client"):
        monkeypatch.setattr(ray.serve.context, name, lambda *_values, **_options: None)
    monkeypatch.setattr(_Start, "_status", status)
    return found


@pytest.fixture
def join() -> Iterator[Join]:
    """How one begins to join a cluster. It is given up at the end."""
    begun: list[_Start] = []

    def begin(
        on_progress: Callable[[Progress], None] = lambda _progress: None, port: int = 8000, **of_ray: Any
    ) -> _Start:
        config = ShoalConfig(gateway={"port": port}, ray={"address": PLACE, **of_ray})
        begun.append(_Start(config, None, on_progress, show_logs=False))
        return begun[-1]

    yield begin
    for start in begun:
        start._home.close()
        start.daemons.close()


def test_where_all_is_there_the_application_starts(cluster: SimpleNamespace, join: Join) -> None:
    start = join(join_timeout_s=0)
    start._wait_for_nodes()
    start._start_serve()
    assert cluster.has_begun and start._is_running()


def test_nodes_are_waited_for(cluster: SimpleNamespace, join: Join) -> None:
    told: list[Progress] = []

    def note(progress: Progress) -> None:
        told.append(progress)
        cluster.resources = there  # the last one comes

    there = cluster.resources
    cluster.resources = there | {"prefill": 0.0}
    join(note, join_timeout_s=60)._wait_for_nodes()
    assert told == [Progress("resources", 2, 3)]


def test_without_a_port_no_cluster_is_joined(cluster: SimpleNamespace, join: Join) -> None:
    with pytest.raises(ConfigError, match=r"say which port: .*gateway\.port"):
        join(port=0)


@pytest.mark.parametrize(
    ("of_cluster", "step", "kind", "said"),
    [
        ({}, "_start_ray", ConfigError, rf"no Ray cluster at {PLACE}: .*ray start --head.*leave --address"),
        ({"resources": {}}, "_wait_for_nodes", ConfigError, "the cluster lacks .* prefill.*: start nodes with"),
        ({"names": ["shoal"]}, "_start_serve", ConfigError, r"already serves 'shoal': .*ray\.app_name"),
        ({"status": _GONE}, "_is_running", Unavailable, "somebody deleted 'shoal' from the cluster while it started"),
    ],
    ids=["nobody there", "nodes that do not join", "a name that is taken", "deleted meanwhile"],
)
def test_what_keeps_it_from_starting_is_told(
    cluster: SimpleNamespace, join: Join, of_cluster: dict[str, Any], step: str, kind: type[ShoalError], said: str
) -> None:
    vars(cluster).update(of_cluster)
    with pytest.raises(kind, match=said):
        getattr(join(join_timeout_s=0), step)()
    assert not cluster.has_begun
