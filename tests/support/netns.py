"""A private network of hosts on one machine: what containers would be, of the kernel's own namespaces alone.

::

    network namespace of the switch      bridge 10.77.0.1
        ├── host gateway                 eth0 10.77.0.2
        └── host prefill                 eth0 10.77.0.3      each name is in every host's /etc/hosts

A host has its own network, processes, /etc, /run and /dev/shm; it sees this machine's other files. Nothing of it can
be reached from outside, and nothing outside can be reached from it. The switch ends with its standard input, a pipe of
this process, and takes every process of every host with it, however this process ends.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_NETWORK = "10.77.0"
_END_WITHIN_S = 30
# Whoever isn't root becomes it, within namespaces of one's own.
_BECOME = () if os.geteuid() == 0 else ("--map-root-user",)
_ENTER = () if os.geteuid() == 0 else ("--user", "--preserve-credentials")

_SWITCH = """
read -r pid _ < /proc/self/stat  # as the test knows it: /proc is still the old one
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add switch type bridge
ip addr add {network}.1/24 dev switch
ip link set switch up
number=2
for name in {names}; do
    ip netns add "$name"
    ip link add "to-$number" type veth peer name eth0 netns "$name"
    ip link set "to-$number" master switch up
    ip -n "$name" addr add "{network}.$number/24" dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
    ip -n "$name" route add default via {network}.1
    number=$((number + 1))
done
echo "$pid"
exec cat  # until the pipe closes
"""

# Its /etc is this machine's, of links that can be replaced. Without a resolv.conf nobody waits for a name server.
_HOST = """
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/etc
mount --rbind /etc /run/etc
mount -t tmpfs tmpfs /etc
ln -s /run/etc/* /etc/
rm -f /etc/hosts /etc/resolv.conf
printf '%s\\n' "$HOSTS" > /etc/hosts
{mounts}
exec "$@"
"""


@dataclass(frozen=True)
class Process:
    """A host's main process. ``log`` is what it wrote, both streams."""

    name: str
    log: Path
    _popen: subprocess.Popen[bytes]

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def require_alive(self) -> None:
        if not self.is_alive:
            pytest.fail(f"{self.name} ended with {self._popen.returncode}:\n{self.tail()}")

    @property
    def pid(self) -> int:
        """Of the host's first process, as this machine counts: below those that made its namespaces."""
        pid = self._popen.pid
        while _status(pid, "NSpid")[-1] != "1":
            [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
            pid = int(child)
        return pid

    def tail(self, num_lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-num_lines:])

    def ended(self, within_s: float) -> int:
        """Its exit status, as soon as it has ended by itself."""
        return self._popen.wait(within_s)

    def kill(self) -> None:
        """The host's first process, and so all of them, as if its machine were gone. Twice is a no-op."""
        if self.is_alive:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(_END_WITHIN_S)


@dataclass
class Network:
    """A switch and its hosts, by name. Made by ``network``."""

    addresses: Mapping[str, str]
    _folder: Path
    _switch_pid: int
    _processes: list[Process] = field(default_factory=list)

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        mounts: Mapping[str, Path] | None = None,
    ) -> Process:
        """Begin a host's main process; one that it has is killed first, as if its machine had lost power.

        ``mounts`` lay files and folders of this machine below its /etc and /run.
        """
        for process in [one for one in self._processes if one.name == name]:
            process.kill()
            self._processes.remove(process)
        log = self._folder / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                self._on(name, command, mounts or {}),
                env=self._environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Process(name, log, popen)
        self._processes.append(process)
        return process

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts whose main process runs."""
        return tuple(process.name for process in self._processes if process.is_alive)

    def process(self, name: str) -> Process:
        """The main process of a host that has one."""
        [found] = (process for process in self._processes if process.name == name)
        return found

    def run(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A short command with the host's network, and nothing else of what runs there."""
        return self._run(self._on(name, command, {}), environment, stdin)

    def execute(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command in the midst of what the running host has: its processes, its files, as ``docker exec``."""
        enter = ("nsenter", "--target", str(self.process(name).pid), *_ENTER, "--mount", "--pid", "--net", "--ipc")
        return self._run([*enter, *command], environment)

    def _run(
        self, command: Sequence[str], environment: Mapping[str, str] | None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self._environment(environment or {}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def require_alive(self) -> None:
        """Fail the test with the log of a host whose main process ended."""
        for process in self._processes:
            process.require_alive()

    def logs(self) -> str:
        return "\n\n".join(f"--- {process.name} ---\n{process.tail()}" for process in self._processes)

    def close(self) -> None:
        """Await the hosts, whose processes ended with the switch."""
        for process in self._processes:
            process.kill()

    def _on(self, name: str, command: Sequence[str], mounts: Mapping[str, Path]) -> list[str]:
        script = _HOST.format(mounts="\n".join(_mounted(target, source) for target, source in mounts.items()))
        return [
            *("nsenter", "--target", str(self._switch_pid), *_ENTER, "--mount", "--pid"),
            *("nsenter", f"--net=/run/netns/{name}"),
            *("unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-euc", script, "sh", *command),
        ]

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        # A host's own folder for sockets and other short-lived files: what containers have as /tmp.
        kept = {name: os.environ[name] for name in ("HOME", "PATH", "LANG") if name in os.environ}
        names = "\n".join(f"{address} {name}" for name, address in self.addresses.items())
        return kept | {"TMPDIR": "/run", "HOSTS": f"127.0.0.1 localhost {os.uname().nodename}\n{names}", **more}


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Hosts of these names, none of which runs anything yet. Skips the test where that isn't allowed."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} isn't here: install util-linux and iproute2")
    addresses = {name: f"{_NETWORK}.{number}" for number, name in enumerate(names, start=2)}
    script = _SWITCH.format(network=_NETWORK, names=" ".join(map(shlex.quote, names)))
    switch = subprocess.Popen(
        ["unshare", *_BECOME, "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert switch.stdin is not None
    assert switch.stdout is not None
    first = switch.stdout.readline().strip()
    if not first.isdigit():
        pytest.skip(f"this machine allows no network of its own here: {first} {switch.communicate()[0]}")
    with tempfile.TemporaryDirectory(prefix="shoal-hosts-") as folder:
        hosts = Network(addresses, Path(folder), int(first))
        try:
            yield hosts
        finally:
            switch.stdin.close()
            switch.wait(_END_WITHIN_S)
            switch.stdout.close()
            hosts.close()


def _status(pid: int, name: str) -> list[str]:
    """The words of a line of a process' status."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    [words] = (line.split()[1:] for line in lines if line.startswith(f"{name}:"))
    return words


def _mounted(target: str, source: Path) -> str:
    at, there = shlex.quote(target), shlex.quote(str(source))
    make = f"mkdir -p {at}" if source.is_dir() else f'mkdir -p "$(dirname {at})"; : > {at}'
    return f"{make}; mount --bind {there} {at}"
