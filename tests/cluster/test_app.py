"""The life cycle of the processes, with stand-ins for the pools: start, answer, end, and leave nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from shoal.app import Cluster, Progress, running
from shoal.config import ShoalConfig
from shoal.errors import ConfigError, ModelError
from standin_cluster import small_config, stand_ins
from standins import FAIL

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TESTS = Path(__file__).parents[1]
# Replicas find the stand-ins by it.
PYTHONPATH = os.pathsep.join([str(TESTS), str(TESTS.parent / "services")])


def eventually(holds: Callable[[], bool], within_s: float = 10) -> bool:
    """Whether ``holds`` becomes true in time; for what other processes do, of which no event tells us."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        threading.Event().wait(0.02)
    return True


def diary(folder: Path) -> list[str]:
    file = folder / "diary"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


# --- one cluster in this process ------------------------------------------------------------------------


@dataclass
class Live:
    cluster: Cluster
    folder: Path
    progress: list[Progress] = field(default_factory=list)

    def wrote(self, line: str, times: int = 1) -> bool:
        return eventually(lambda: diary(self.folder).count(line) >= times)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    progress: list[Progress] = []
    config = ShoalConfig(**small_config(str(folder)).model_dump() | {"decode": {"replicas": 2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        with running(config, progress.append, replicas=stand_ins()) as cluster:
            yield Live(cluster, folder, progress)


def test_it_answers_through_all_three(live: Live):
    assert httpx.get(f"{live.cluster.url}/collect").json() == [0, 1]
    assert httpx.get(f"{live.cluster.url}/stream").text == "data: 0\n\ndata: 1\n\n"


def test_an_error_of_a_replica_behind_arrives_with_its_fields(live: Live):
    answer = httpx.get(f"{live.cluster.url}/collect", params={"mode": "refuse"})
    assert (answer.status_code, answer.json()) == (400, {"param": "mode", "message": "no such mode"})


def test_progress_is_told_until_all_is_ready(live: Live):
    assert live.progress[0] == Progress("ray", 0, 2)
    assert Progress("ray", 2, 2) in live.progress
    assert live.progress[-1] == Progress("replicas", 4, 4)
    assert len(set(live.progress)) == len(live.progress)


def test_the_directory_lists_each_replica_here_and_in_the_gateway(live: Live):
    entries = live.cluster.replica_entries()
    assert [entry.role for entry in entries] == ["decode", "decode", "gateway", "prefill"]
    assert len({entry.pid for entry in entries}) == 4
    assert {entry.handoff_address for entry in live.cluster.replica_entries("decode")} == {"127.0.0.1:3"}
    assert httpx.get(f"{live.cluster.url}/replicas").json() == [entry.role for entry in entries]


def test_pools_get_their_threads_before_anything_loads(live: Live):
    assert f"prefill threads {len(os.sched_getaffinity(0))} passive" in diary(live.folder)


@pytest.mark.parametrize("path", ["collect", "stream"])
def test_a_client_that_leaves_while_decode_works_ends_its_work(live: Live, path: str):
    before = diary(live.folder).count("decode ended")
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{live.cluster.url}/{path}", params={"mode": "stay"}, timeout=httpx.Timeout(5, read=0.5))
    assert live.wrote("decode ended", before + 1)


@pytest.mark.parametrize("path", ["collect", "stream"])
def test_a_client_that_leaves_while_prefill_works_ends_both(live: Live, path: str):
    decode, prefill = (diary(live.folder).count(f"{stage} ended") for stage in ("decode", "prefill"))
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{live.cluster.url}/{path}", params={"mode": "prefill"}, timeout=httpx.Timeout(5, read=0.5))
    assert live.wrote("decode ended", decode + 1)
    assert live.wrote("prefill ended", prefill + 1)


def test_a_killed_replica_leaves_the_directory_and_another_takes_its_place(live: Live):
    [prefill] = live.cluster.replica_entries("prefill")
    os.kill(prefill.pid, signal.SIGKILL)
    assert eventually(lambda: prefill not in live.cluster.replica_entries("prefill"))
    assert eventually(lambda: len(live.cluster.replica_entries("prefill")) == 1, within_s=30)
    assert httpx.get(f"{live.cluster.url}/collect").json() == [0, 1]


# --- one that can't start -------------------------------------------------------------------------------


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path):
    config = small_config(str(tmp_path))
    with httpx.Client(), _listening() as port:
        taken = ShoalConfig(**config.model_dump() | {"gateway": {"port": port}})
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is taken"), running(taken):
            pytest.fail("it started")
    assert time.monotonic() - began_s < 2
