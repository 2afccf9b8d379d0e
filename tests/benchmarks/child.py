"""A server that this process started: when it answers, what it said last, that it can be stopped for a while, and that
nothing of it stays behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

_PR_SET_CHILD_SUBREAPER = 36
_END_WITHIN_S = 30.0
_POLL_S = 0.2
# These would make a server another one than its arm says.
_NOT_INHERITED = ("GOMP_", "KMP_", "LD_PRELOAD", "MKL_", "OMP_", "SHOAL_", "VLLM_")


class ChildFailed(Exception):
    """It ended, or didn't answer in time; the message says which, and its last words."""


def adopt_orphans() -> None:
    """From now on, processes whose parents died are this one's children, and can be found and ended (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def clean_environment() -> dict[str, str]:
    """This process' own, without what decides how a server computes."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}


@contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str], log: Path, url: str, health: str, start_within_s: float
) -> Iterator[float]:
    """Run ``command`` for the block, and yield how many seconds passed until ``health`` said 200. Raises ChildFailed.

    It gets SIGTERM at the end, however the block ends; what of it then doesn't go is killed, orphans of it, too. Ctrl-C
    doesn't reach it: it has a session of its own. Only one may run at a time.
    """
    started_s = time.perf_counter()
    with log.open("wb") as output:
        popen = subprocess.Popen(
            command,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_answer(popen, log, url + health, started_s + start_within_s)
        yield time.perf_counter() - started_s
    finally:
        _end(popen)


@contextmanager
def stopped(keep: int) -> Iterator[None]:
    """Stop all that this process started, but for the process ``keep``, and let it go on after the block (SIGSTOP).

    Ray takes an actor that doesn't answer for dead in half a minute or so: keep the block well below that.
    """
    held: set[int] = set()
    try:
        while more := set(_descendants(os.getpid())) - held - {keep}:
            _signal(more, signal.SIGSTOP)
            held |= more
        yield
    finally:
        _signal(held, signal.SIGCONT)


def last_words(log: Path, num_lines: int = 3) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    # What was raised says more than how the interpreter ended.
    errors = [line for line in said if "Error" in line or line.lower().startswith("error")]
    return " / ".join((errors or said)[-num_lines:])


def _await_answer(popen: subprocess.Popen[bytes], log: Path, url: str, deadline_s: float) -> None:
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.perf_counter() < deadline_s:
            if popen.poll() is not None:
                raise ChildFailed(f"it ended with {popen.returncode} while starting: {last_words(log)}")
            with suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(_POLL_S)
    raise ChildFailed(f"it didn't answer in time: {last_words(log)}")


def _end(popen: subprocess.Popen[bytes]) -> None:
    """With Ctrl-C and SIGTERM put off until all is gone, which is at most a minute."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            popen.wait(_END_WITHIN_S)
        _kill_descendants(time.perf_counter() + _END_WITHIN_S)
        popen.wait(_END_WITHIN_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_descendants(deadline_s: float) -> None:
    """All that are left; those that its end made orphans are our own children now, and so are ours to reap."""
    while (left := _descendants(os.getpid())) and time.perf_counter() < deadline_s:
        _signal(left, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(_POLL_S / 4)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    """Each thread has a list of the processes that it started."""
    children = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            children += [int(child) for child in path.read_text(encoding="ascii").split()]
    return children + [one for child in children for one in _descendants(child)]
