"""Cores that are shared: by niceness, and nothing is lost but what efficiency says."""

from __future__ import annotations

import pytest
from simulation.agenda import Agenda
from simulation.cores import OwnCores, SharedCores, shares

from shoal.errors import InternalError


def ends(
    jobs: list[tuple[float, int, float]], num: int = 2, efficiency: float = 1.0, niceness: tuple[int, ...] = ()
) -> list[float]:
    """When jobs ``(begins, width, work)`` end, each as nice as ``niceness`` says, if it does."""
    agenda = Agenda()
    cores = SharedCores(agenda, num, efficiency)
    ended = [0.0] * len(jobs)

    def begin(index: int) -> None:
        _, width, work_s = jobs[index]
        nice = niceness[index] if niceness else 0
        cores.run(width, work_s, lambda: ended.__setitem__(index, agenda.now_s), niceness=nice)

    for index, (begins_s, _, _) in enumerate(jobs):
        agenda.at(begins_s, lambda index=index: begin(index))
    agenda.run()
    return ended


def test_who_is_alone_has_all_cores():
    assert ends([(1.0, 2, 3.0)]) == [4.0]
    assert ends([(0.0, 1, 3.0), (0.0, 1, 5.0)]) == [3.0, 5.0]


def test_threads_are_alike_whoever_they_belong_to():
    """Three threads on two cores: each has two thirds of one."""
    assert ends([(0.0, 2, 2.0), (0.0, 1, 2.0)]) == pytest.approx([3.0, 3.0])


def test_who_is_nicer_gets_less_while_others_want_the_cores():
    """4 steps of niceness: 2.44 times as much for the other, of 2 cores for 2 threads each."""
    share = 1.25**4 / (1 + 1.25**4)
    of_one, other = ends([(0.0, 2, 1.0), (0.0, 2, 1.0)], niceness=(0, 4))
    assert of_one == pytest.approx(1 / share)
    assert other == pytest.approx(2.0), "no work is lost"
    assert ends([(0.0, 2, 1.0), (3.0, 2, 1.0)], niceness=(19, 4)) == [1.0, 4.0], "alone, it has all of them"


def test_no_thread_uses_more_than_a_core_and_others_get_what_it_leaves():
    assert shares([(1, 10.0), (1, 1.0), (1, 1.0)], 2) == pytest.approx([1.0, 0.5, 0.5])
    assert shares([(2, 1.0), (1, 10.0)], 2) == pytest.approx([0.5, 1.0])
    assert shares([(2, 3.0), (2, 1.0)], 2) == pytest.approx([0.75, 0.25])
    assert shares([(1, 1.0), (1, 5.0)], 2) == [1.0, 1.0]
    assert shares([], 2) == []


def test_what_sharing_costs_is_lost_by_all_and_only_while_cores_are_short():
    assert ends([(0.0, 2, 1.0), (0.0, 2, 1.0)], efficiency=0.8) == pytest.approx([2.5, 2.5])
    assert ends([(0.0, 1, 1.0), (0.0, 1, 1.0)], efficiency=0.8) == [1.0, 1.0]


def test_nobody_is_quicker_than_alone():
    """One thread, and two nicer ones, of which more gets done together: the first has a whole core, and no more."""
    assert ends([(0.0, 1, 1.0), (0.0, 2, 1.0)], efficiency=1.3, niceness=(0, 4))[0] == 1.0


def test_no_work_is_lost_however_it_comes():
    """One core is busy without a pause, and ends when all the work is done."""
    jobs = [(index * 0.37 % 1, 1, 0.5 + index % 3) for index in range(40)]
    first_s, work_s = min(begins for begins, _, _ in jobs), sum(work for _, _, work in jobs)
    assert max(ends(jobs, num=1)) == pytest.approx(first_s + work_s)


def test_who_has_own_cores_has_no_neighbours():
    agenda, ended = Agenda(), []
    cores = OwnCores(agenda)
    for _ in range(3):
        cores.run(8, 2.0, lambda: ended.append(agenda.now_s))
    agenda.run()
    assert ended == [2.0] * 3


def test_events_of_one_moment_happen_in_their_order_and_none_in_the_past():
    agenda, seen = Agenda(), []
    for index in range(5):
        agenda.at(1.0, lambda index=index: seen.append(index))
    agenda.run()
    assert seen == list(range(5))
    with pytest.raises(InternalError, match="put down at"):
        agenda.at(0.5, lambda: None)
