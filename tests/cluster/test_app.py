"""The life cycle of the processes, with stand-ins for the pools: start, answer, end, and leave nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from processes import command_lines, eventually
from standin_cluster import small_config, stand_ins
from standins import FAIL, STAY

from shoal.cluster import Cluster, Progress, running
from shoal.cluster.ports import require_free
from shoal.config import ShoalConfig
from shoal.decode import neighbours
from shoal.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

TESTS = Path(__file__).parents[1] / "support"
# Replicas find the stand-ins by it.
PYTHONPATH = os.pathsep.join([str(TESTS), str(TESTS.parents[1] / "services")])


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
    assert neighbours.VARIABLE not in os.environ


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


def test_replicas_know_how_many_they_are_and_are_no_nicer_than_whoever_started_them(live: Live):
    assert diary(live.folder).count(f"decode one of 2, nice {os.getpriority(os.PRIO_PROCESS, 0)}") == 2


@contextmanager
def asked(live: Live, path: str) -> Iterator[None]:
    """By a client that leaves at the block's end, whether an answer has begun or not."""
    with closing(HTTPConnection(live.cluster.url.removeprefix("http://"), timeout=20)) as connection:
        connection.request("GET", path)
        yield


@pytest.mark.parametrize("path", ["collect", "stream"])
def test_a_client_that_leaves_while_decode_works_ends_its_work(live: Live, path: str):
    before = Counter(diary(live.folder))
    with asked(live, f"/{path}?mode=stay"):
        assert live.wrote("decode started", before["decode started"] + 1)
    assert live.wrote("decode ended", before["decode ended"] + 1)


@pytest.mark.parametrize("path", ["collect", "stream"])
def test_a_client_that_leaves_while_prefill_works_ends_both(live: Live, path: str):
    before = Counter(diary(live.folder))
    with asked(live, f"/{path}?mode=prefill"):
        assert live.wrote("prefill started", before["prefill started"] + 1)
    assert live.wrote("decode ended", before["decode ended"] + 1)
    assert live.wrote("prefill ended", before["prefill ended"] + 1)


def test_ray_refuses_whoever_comes_without_its_token(live: Live):
    """Where the directory, and all else of the cluster, is kept; and where its processes are started."""
    import ray  # not before the cluster has set Ray's environment
    from ray.core.generated.gcs_service_pb2 import InternalKVKeysRequest
    from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub
    from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    def answers(token: str | None) -> list[grpc.StatusCode]:
        options: Any = {"metadata": token and (("authorization", f"Bearer {token}"),), "timeout": 10}
        keys = InternalKVGcsServiceStub(head).InternalKVKeys.future(
            InternalKVKeysRequest(namespace=b"shoal"), **options
        )
        stats = NodeManagerServiceStub(node).GetNodeStats.future(GetNodeStatsRequest(), **options)
        return [keys.code(), stats.code()]

    [found] = ray.nodes()
    address = f"{found['NodeManagerAddress']}:{found['NodeManagerPort']}"
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as head, grpc.insecure_channel(address) as node:
        assert answers(os.environ["RAY_AUTH_TOKEN"]) == 2 * [grpc.StatusCode.OK]
        for wrong in (None, secrets.token_hex(32)):
            assert answers(wrong) == 2 * [grpc.StatusCode.UNAUTHENTICATED]


def test_ray_s_token_is_in_no_command_line(live: Live):
    """Every user of a machine may read them all."""
    token, lines = os.environ["RAY_AUTH_TOKEN"], [" ".join(words) for words in command_lines()]
    assert len(token) >= 32 and sum("ServeReplica" in line for line in lines) >= 4
    assert not [line for line in lines if token in line]


def test_a_killed_replica_leaves_the_directory_and_another_takes_its_place(live: Live):
    [prefill] = live.cluster.replica_entries("prefill")
    os.kill(prefill.pid, signal.SIGKILL)
    assert eventually(lambda: prefill not in live.cluster.replica_entries("prefill"))
    assert eventually(lambda: len(live.cluster.replica_entries("prefill")) == 1, within_s=30)
    assert httpx.get(f"{live.cluster.url}/collect").json() == [0, 1]


# --- one that can't start -------------------------------------------------------------------------------


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "ConfigError: port" in (told := run_to_its_end(tmp_path, str(port)))
        assert f"{port} on 127.0.0.1 is taken" in told and "ray" not in told
        told = run_to_its_end(tmp_path, "0", str(port))
        assert f"{port} on 127.0.0.1 is taken" in told and "--grpc-port" in told and "ray" not in told


def test_a_replica_that_can_not_start_tells_why(tmp_path: Path):
    (tmp_path / FAIL).touch()
    assert "ModelError: there is no model here: put one there" in run_to_its_end(tmp_path)


def test_a_second_cluster_in_one_process_leaves_the_first_alone(live: Live, tmp_path: Path):
    with pytest.raises(ConfigError, match="already"), running(small_config(str(tmp_path)), replicas=stand_ins()):
        pytest.fail("it started")
    assert httpx.get(f"{live.cluster.url}/collect").json() == [0, 1]


# --- a program that serves until a signal ---------------------------------------------------------------


class Program:
    """``standin_cluster.py`` as a process group of its own. All that it starts can be told by its environment."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self._mark = f"SHOAL_TEST_MARK={secrets.token_hex(8)}".encode()
        name, _, value = self._mark.decode().partition("=")
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "standin_cluster.py"), str(folder), *arguments],
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "TMPDIR": str(self._short_folder()), name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _short_folder(self) -> Path:
        """Ray's sockets lie in it, and Linux wants their paths short."""
        self.scratch = Path(tempfile.mkdtemp(prefix="t-"))
        return self.scratch

    def read(self, word: str) -> str:
        """What follows ``word`` on the line that begins with it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        pytest.fail(f"it ended without {word!r}")

    def left_behind(self) -> list[str]:
        """Its processes that live, and files that it wrote."""
        return [*self.command_lines(), *(str(path) for path in self.scratch.iterdir())]

    def command_lines(self) -> list[str]:
        lines = []
        for pid in self._pids():
            with suppress(OSError):  # it ended just now
                lines.append(Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"))
        return lines

    def _pids(self) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if self._mark in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
                except OSError:  # it ended just now
                    continue
        return found

    def close(self) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextmanager
def program(folder: Path, *arguments: str) -> Iterator[Program]:
    one = Program(folder, *arguments)
    try:
        yield one
    finally:
        one.close()


def run_to_its_end(folder: Path, *arguments: str) -> str:
    """What it wrote. It must have failed, and left nothing behind."""
    with program(folder, *arguments) as one:
        output, _ = one.process.communicate(timeout=60)
        assert one.process.returncode == 1
        assert one.left_behind() == []
        return output


def test_ctrl_c_lets_open_requests_end_and_leaves_nothing_behind(tmp_path: Path):
    with program(tmp_path) as one:
        url = one.read("ready")
        with httpx.stream("GET", f"{url}/stream", params={"mode": "prefill"}, timeout=30) as answer:
            assert eventually(lambda: "prefill started" in diary(tmp_path))
            os.killpg(one.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
            assert answer.read() == b"data: unavailable\n\n"
        assert one.process.wait(30) == 0
        assert one.read("stopped") == ""
        assert one.left_behind() == []
        assert sorted(diary(tmp_path)[-3:]) == ["decode closed", "gateway closed", "prefill closed"]
        require_free("127.0.0.1", int(url.rpartition(":")[2]))


def test_sigterm_while_ray_starts_is_obeyed_and_leaves_nothing_behind(tmp_path: Path):
    with program(tmp_path) as one:
        one.read("starting")
        # In the midst of Ray's own start: its daemons are there, its node isn't complete.
        assert eventually(lambda: any("gcs_server" in line for line in one.left_behind()))
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
        assert one.read("stopped") == ""
        assert one.left_behind() == []


@pytest.mark.long
def test_ctrl_c_while_replicas_load_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / STAY).touch()
    with program(tmp_path) as one:
        one.read("starting")
        assert eventually(lambda: "prefill loading" in diary(tmp_path), within_s=60)
        os.killpg(one.process.pid, signal.SIGINT)
        assert one.process.wait(60) == 0
        assert one.read("stopped") == ""
        assert one.left_behind() == []


def test_a_killed_program_takes_its_replicas_with_it(tmp_path: Path):
    with program(tmp_path) as one:
        one.read("ready")
        assert sum("ServeReplica" in line for line in one.command_lines()) == 3
        one.process.kill()
        # Two agents of Ray's try for up to a minute to tell somebody.
        assert eventually(lambda: all("Agent" in line for line in one.command_lines()))


@pytest.fixture
def heeds_hangups() -> Iterator[None]:
    """What starts here does, also where nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_hangups")
def test_a_terminal_that_is_closed_lets_open_requests_end_and_leaves_nothing_behind(tmp_path: Path):
    with program(tmp_path) as one:
        url = one.read("ready")
        with httpx.stream("GET", f"{url}/stream", params={"mode": "prefill"}, timeout=30) as answer:
            assert eventually(lambda: "prefill started" in diary(tmp_path))
            for _ in range(2):  # as a shell does, and then the system
                os.killpg(one.process.pid, signal.SIGHUP)
            assert answer.read() == b"data: unavailable\n\n"
        assert one.process.wait(30) == 0
        assert one.read("stopped") == ""
        assert one.left_behind() == []
        assert sorted(diary(tmp_path)[-3:]) == ["decode closed", "gateway closed", "prefill closed"]
