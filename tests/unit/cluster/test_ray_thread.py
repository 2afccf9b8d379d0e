from __future__ import annotations

import subprocess
import threading

import pytest

from shoal.cluster.ray_thread import RayThread


def test_all_calls_run_in_one_thread_that_is_not_the_callers():
    home = RayThread("test")
    threads = {home.submit(threading.get_ident).result(5) for _ in range(3)}
    home.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_reaches_the_one_who_waits_and_the_thread_goes_on():
    home = RayThread("test")
    with pytest.raises(SystemExit):
        home.submit(raise_system_exit).result(5)
    assert home.submit(max, 1, 2).result(5) == 2
    home.close()


def test_a_closed_thread_ends():
    home = RayThread("test")
    thread = home.submit(threading.current_thread).result(5)
    assert thread.daemon
    home.close()
    thread.join(5)
    assert not thread.is_alive()


def test_what_it_starts_outlives_a_terminal_that_is_closed():
    home = RayThread("test")
    shell = home.submit(subprocess.run, ["sh", "-c", "kill -HUP $$; echo lives"], capture_output=True).result(5)
    home.close()
    assert shell.stdout == b"lives\n"


def raise_system_exit() -> None:
    raise SystemExit
