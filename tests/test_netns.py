"""The hosts that tests of several nodes run on: what they share, what they don't, and that they leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netns import network

SERVE = [sys.executable, "-m", "http.server", "8000"]


def test_hosts_reach_one_another_by_name_and_only_there(tmp_path: Path):
    (tmp_path / "file").write_text("from outside", encoding="utf-8")
    with network("one", "two") as hosts:
        assert hosts.run("one", ["cat", "/etc/hosts"]).stdout.endswith("10.77.0.2 one\n10.77.0.3 two\n")
        serve = "import socket; s = socket.create_server(('10.77.0.2', 80)); s.accept()[0].sendall(b'hello')"
        ask = "import socket, sys\nwhile True:\n try: print(socket.create_connection(('one', 80)).recv(9)); break\n except ConnectionError: pass"
        hosts.start("one", [sys.executable, "-c", serve], {})
        assert hosts.run("two", [sys.executable, "-c", ask]).stdout == "b'hello'\n"
