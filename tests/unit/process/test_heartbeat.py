"""What a thread says of itself, and what the processor does for it."""

from __future__ import annotations

import threading

from shoal.process.heartbeat import Heartbeat


def test_a_heartbeat_knows_what_the_processor_does_for_its_own_thread() -> None:
    idle, busy, may_end = Heartbeat("copy"), Heartbeat("engine"), threading.Event()

    def compute() -> None:
        busy.beat()
        while not may_end.is_set():
            pass

    assert busy.cpu_s == 0
    idle.beat()
    thread = threading.Thread(target=compute)
    thread.start()
    while busy.cpu_s < 0.05:
        assert thread.is_alive()
    may_end.set()
    thread.join()


def test_at_rest_there_is_no_beat_and_at_work_each_is_another() -> None:
    heartbeat = Heartbeat("engine")
    assert heartbeat.num_beats is None
    with heartbeat.at_work():
        first = heartbeat.num_beats
        heartbeat.beat()
        assert first is not None and heartbeat.num_beats == first + 1
    assert heartbeat.num_beats is None
