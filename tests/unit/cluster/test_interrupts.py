from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future

import pytest
from processes import eventually

from shoal.cluster.interrupts import Interrupts, caught


def send(*numbers: signal.Signals) -> None:
    """To this process; Python runs the handler before the next statement of the main thread."""
    for number in numbers:
        os.kill(os.getpid(), number)
        threading.Event().wait(0.01)


def send_and_fail(number: signal.Signals) -> None:
    send(number)
    raise ValueError("of the block")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_both_signals_raise_keyboard_interrupt(number: signal.Signals):
    with caught(), pytest.raises(KeyboardInterrupt):
        send(number)


def test_a_signal_in_a_held_block_is_raised_after_it():
    reached: list[str] = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.held():
            send(signal.SIGTERM)
            reached.append("the end of the block")
        reached.append("what follows")

    with caught() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert reached == ["the end of the block"]


def test_a_held_signal_is_raised_once():
    with caught() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.held():
            send(signal.SIGINT, signal.SIGTERM)
        with interrupts.held():
            pass


def test_the_error_of_a_held_block_goes_first_and_the_signal_is_dropped():
    with caught() as interrupts:
        with pytest.raises(ValueError, match="of the block"), interrupts.held():
            send_and_fail(signal.SIGINT)
        with interrupts.held():
            pass


def test_signals_are_taken_again_from_who_took_them_in_a_held_block():
    with caught() as interrupts:
        with interrupts.held():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with caught():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_off_the_main_thread_signals_stay_with_whoever_has_them():
    before = signal.getsignal(signal.SIGINT)
    within: list[object] = []

    def run() -> None:
        with caught() as interrupts, interrupts.held():
            within.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert within == [before]


def test_waiting_notes_signals_though_others_take_them_meanwhile():
    future: Future[int] = Future()

    def elsewhere() -> None:
        if eventually(lambda: signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL):
            os.kill(os.getpid(), signal.SIGTERM)
        future.set_result(1)

    with caught() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        threading.Thread(target=elsewhere).start()
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait(future)
    assert future.result() == 1


def test_a_terminal_that_is_closed_raises_keyboard_interrupt():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with caught():
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL  # or it would end the tests
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGHUP)
            send(signal.SIGHUP)  # the shell's and the system's are of one end, and answers are being finished by then
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with caught() as interrupts, interrupts.held():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
