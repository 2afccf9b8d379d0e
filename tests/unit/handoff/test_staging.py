from __future__ import annotations

import pytest

from shoal.errors import InternalError
from shoal.handoff.staging import StagingSlots


def test_each_lending_of_a_slot_has_its_own_generation() -> None:
    slots = StagingSlots(1, 10, max_retired_bytes=10)
    first = slots.take()
    assert first is not None
    slots.give_back(first)
    second = slots.take()
    assert second is not None
    assert (second.index, second.generation) == (first.index, first.generation + 1)


def test_a_retired_slot_never_comes_back() -> None:
    slots = StagingSlots(2, 10, max_retired_bytes=20)
    first = slots.take()
    assert first is not None
    slots.retire(first)
    second = slots.take()
    assert second is not None
    assert second.index != first.index
    slots.give_back(second)
    assert (slots.num_retired, slots.retired_bytes, slots.num_lent) == (1, 10, 0)


def test_what_is_lent_and_retired_stays_below_the_bound() -> None:
    slots = StagingSlots(5, 10, max_retired_bytes=25)
    taken = [slots.take() for _ in range(3)]
    assert taken[2] is None
    assert taken[0] is not None
    slots.retire(taken[0])
    assert slots.take() is None


def test_a_slot_is_not_given_back_twice_nor_by_an_older_lending() -> None:
    slots = StagingSlots(1, 10, max_retired_bytes=10)
    old = slots.take()
    assert old is not None
    slots.give_back(old)
    with pytest.raises(InternalError):
        slots.give_back(old)
    assert slots.take() is not None
    with pytest.raises(InternalError):
        slots.retire(old)
