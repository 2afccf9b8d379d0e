"""The hosts that tests of several nodes run on: what they share, what they don't, and that nothing of them stays."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from netns import Network, network
from processes import command_lines, eventually

TESTS = Path(__file__).parents[2] / "support"
CONNECT = """
import socket, sys
try:
    print(socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5))
except OSError as error:
    print(type(error).__name__)
"""
# A process, and one that has left its group and session, as daemons do. For how long they sleep tells them from others.
DAEMONS = ["sh", "-c", 'setsid sleep "$0" & sleep "$0"; :']
PROGRAM = f"""
import sys, threading
from netns import network
with network("one") as hosts:
    hosts.start("one", [*{DAEMONS!r}, sys.argv[1]], {{}})
    threading.Event().wait()
"""


def connected(hosts: Network, address: str, port: int) -> str:
    done = hosts.run("one", [sys.executable, "-c", CONNECT, address, str(port)])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def num_living(seconds: str) -> int:
    """Processes of ``DAEMONS`` that were started with ``seconds``."""
    return sum(command_line[:2] == ["sleep", seconds] for command_line in command_lines())


def test_hosts_reach_one_another_by_name():
    with network("one", "two") as hosts:
        assert connected(hosts, "two", 80) == "ConnectionRefusedError"  # it is there, and nobody listens
        assert connected(hosts, "three", 80) == "gaierror"


def test_hosts_do_not_reach_what_listens_on_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server, network("one") as hosts:
        assert connected(hosts, "127.0.0.1", server.getsockname()[1]) == "ConnectionRefusedError"


def test_files_lie_where_a_host_wants_them_and_there_alone(tmp_path: Path):
    (tmp_path / "given").write_text("from outside", encoding="utf-8")
    with network("one") as hosts:
        copy = ["sh", "-c", f"echo mine > /etc/netns-test/other; cat /etc/netns-test/file > {tmp_path}/got; sleep 600"]
        hosts.start("one", copy, {}, {"/etc/netns-test/file": tmp_path / "given"})
        assert eventually((tmp_path / "got").exists)
        assert eventually(lambda: (tmp_path / "got").read_text(encoding="utf-8") == "from outside")
        assert not Path("/etc/netns-test").exists()


def test_all_processes_end_with_the_network():
    seconds = str(secrets.choice(range(10**8, 10**9)))
    with network("one") as hosts:
        hosts.start("one", [*DAEMONS, seconds], {})
        assert eventually(lambda: num_living(seconds) == 2)
    assert num_living(seconds) == 0


def test_all_processes_end_if_the_test_is_killed(tmp_path: Path):
    seconds = str(secrets.choice(range(10**8, 10**9)))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS), "TMPDIR": str(tmp_path)}
    with network("one"):
        pass  # or the test is skipped: the program's own skip would be no more than its end
    with subprocess.Popen([sys.executable, "-c", PROGRAM, seconds], env=environment) as program:
        try:
            assert eventually(lambda: num_living(seconds) == 2)
        finally:
            program.kill()
        assert eventually(lambda: num_living(seconds) == 0)


def test_a_host_whose_program_ended_fails_the_test_with_its_log():
    with network("one") as hosts:
        hosts.start("one", ["sh", "-c", "echo out of fish >&2; exit 3"], {})
        with pytest.raises(pytest.fail.Exception, match=r"one ended with 3:\nout of fish"):
            eventually(lambda: bool(hosts.require_alive()))


def test_a_command_can_join_the_processes_of_a_host(tmp_path: Path):
    with network("one") as hosts:
        hosts.start("one", ["sh", "-c", f"echo here > /run/file; : > {tmp_path}/ready; exec sleep 600"], {})
        assert eventually((tmp_path / "ready").exists)
        assert hosts.execute("one", ["cat", "/run/file"]).stdout == "here\n"
        assert eventually(lambda: hosts.execute("one", ["cat", "/proc/1/cmdline"]).stdout == "sleep\x00600\x00")
