"""Who gets the blocks that are given back, and for whom those count that several hold."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.scheduler import Scheduler, StepPlan
from shoal.engine.sequence import Phase, Sequence
from shoal.engine.tables import Reuse
from shoal.model.kv_layout import stage_layout
from shoal.wire.messages import SamplingParams

BLOCK = 4


def make_scheduler(num_blocks: int, *, reuse: Reuse = Reuse.NONE, max_reserved_ratio: float = 1.0) -> Scheduler:
    layout = stage_layout(
        num_layers=2, num_kept=1, num_held=2, num_kv_heads=1, head_dim=1, dtype_bytes=1, block_tokens=BLOCK
    )
    return Scheduler(
        layout, num_blocks, max_step_tokens=128, max_sequences=16, max_queued=16, reuse=reuse,
        max_reserved_ratio=max_reserved_ratio,
    )  # fmt: skip


def sequence(name: str, num_prompt: int, *, max_tokens: int = 4, hold: bool = False) -> Sequence:
    """Prompts begin alike."""
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(name, tuple(range(num_prompt)), range(num_prompt - 1), sampling, hold=hold)


def step(scheduler: Scheduler) -> StepPlan:
    """What the engine does, with token 0 as every answer."""
    scheduler.admit()
    plan = scheduler.schedule()
    for item in plan.rows:
        item.sequence.advance(item.end)
        if item.sequence.sampled and item.completes:
            item.sequence.output.append(0)
        scheduler.remember(item.sequence)
        if len(item.sequence.output) >= item.sequence.sampling.max_tokens:
            scheduler.finish(item.sequence)
    return plan


def names(sequences: object) -> list[str]:
    return [one.request_id for one in sequences]  # type: ignore[attr-defined]


def one_that_lacks_blocks() -> tuple[Scheduler, Sequence, Sequence, Sequence]:
    """``a`` runs, and the blocks it wants are those of ``z`` and ``w``, which are reserved."""
    scheduler = make_scheduler(12)
    a, z, w = sequence("a", 7, max_tokens=20), sequence("z", 14, hold=True), sequence("w", 14, hold=True)
    for one in (a, z, w):
        scheduler.submit(one)
        scheduler.admit()
    assert names(scheduler.reserved) == ["z", "w"]
    while not step(scheduler).wants_blocks:
        pass
    return scheduler, a, z, w


def test_a_reserved_one_that_gives_way_comes_back_after_the_answer_that_gave_way_before_it() -> None:
    scheduler = make_scheduler(16)
    a, b = sequence("a", 8, max_tokens=40), sequence("b", 8, max_tokens=30)
    for one in (a, b):
        scheduler.submit(one)
    while len(b.output) < 13:
        step(scheduler)
    x = sequence("x", 15, max_tokens=20, hold=True)
    scheduler.submit(x)
    scheduler.admit()
    assert x.phase is Phase.RESERVED
    while not step(scheduler).wants_blocks:
        pass
    assert names(scheduler.running) == ["a"] and names(scheduler.waiting) == ["b"]
    scheduler.requeue(x)
    assert names(scheduler.waiting) == ["b", "x"]
    newcomer = sequence("new", 4)
    scheduler.submit(newcomer)
    assert names(scheduler.waiting) == ["b", "x", "new"], "who has waited before goes first"
    while b.phase is not Phase.FINISHED:
        step(scheduler)
        assert x.phase is not Phase.FINISHED and not (b.phase is Phase.WAITING and x.phase is Phase.RUNNING)
    while scheduler.sequences:
        assert step(scheduler).rows
    assert scheduler.allocator.num_used == 0


def test_what_is_given_back_is_for_the_running_one_that_wants_it() -> None:
    scheduler, _, _, w = one_that_lacks_blocks()
    scheduler.requeue(w)
    plan = step(scheduler)
    assert names(plan.sequences) == ["a"] and not plan.wants_blocks
    assert scheduler.num_preemptions == 0 and names(scheduler.reserved) == ["z"]


@pytest.mark.parametrize("hold", [False, True])
def test_a_prompt_fits_if_what_is_new_of_it_does(hold: bool) -> None:
    scheduler = make_scheduler(30, reuse=Reuse.EXACT)
    first = sequence("first", 81)
    scheduler.submit(first)
    step(scheduler)
    assert scheduler.allocator.num_free == 9
    second = sequence("second", 85, hold=hold)
    scheduler.submit(second)
    scheduler.admit()
    assert second.phase is (Phase.RESERVED if hold else Phase.RUNNING) and second.num_present == 80


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["local", "held", "shipped", "step", "step", "start", "requeue", "finish"]),
            st.integers(0, 40),
        ),
        max_size=60,
    ),
    st.sampled_from(Reuse),
)
def test_what_reserved_ones_hold_is_counted_right_whatever_comes(commands: list[tuple[str, int]], reuse: Reuse) -> None:
    scheduler = make_scheduler(20, reuse=reuse, max_reserved_ratio=0.7)
    for index, (command, number) in enumerate(commands):
        reserved = [one for one in scheduler.reserved if one.sampled or command == "start"]
        match command:
            case "local" | "held" | "shipped" if len(scheduler.waiting) < 16:
                new = sequence(str(index), 2 + number, hold=command != "local")
                new.sampled = command != "shipped"
                scheduler.submit(new)
            case "step":
                for item in step(scheduler).recalls:
                    item.sequence.num_shipped = item.end
            case "start" if reserved:
                one = reserved[number % len(reserved)]
                if one.sampled:
                    scheduler.start(one, number % one.num_prompt_tokens)
                else:
                    scheduler.start_shipping(one, 0)
            case "requeue" if reserved:
                scheduler.requeue(reserved[number % len(reserved)])
            case "finish" if scheduler.sequences:
                scheduler.finish(scheduler.sequences[number % len(scheduler.sequences)])
        holds = Counter(block for one in scheduler.reserved for block in one.blocks)
        assert scheduler.allocator.num_reserved == len(holds)
        alone = sum(num == scheduler.allocator.count(block) for block, num in holds.items())
        assert scheduler.num_reserved_blocks == alone
    for one in scheduler.sequences:
        scheduler.finish(one)
    assert scheduler.num_reserved_blocks == scheduler.allocator.num_used == 0


def test_who_has_found_what_is_known_no_more_goes_on_from_there_by_itself() -> None:
    """What others have computed since then follows other K/V than its own."""
    scheduler = make_scheduler(60, reuse=Reuse.EXACT)
    first, second, third = sequence("first", 21), sequence("second", 41, hold=True), sequence("third", 41)
    scheduler.submit(first)
    step(scheduler)
    scheduler.submit(second)
    scheduler.admit()
    scheduler.forget(first)
    scheduler.submit(third)
    step(scheduler)
    assert third.num_present == 0 and third.num_computed == 41
    scheduler.start(second, 0)
    [start] = [item.start for item in scheduler.schedule().rows if item.sequence is second]
    assert start == second.num_present == 20 and second.blocks[:5] == first.blocks[:5]
    assert not set(second.blocks) & set(third.blocks)


def test_choices_that_part_are_remembered_each_for_itself() -> None:
    """They have the prompt's blocks in common, also as the cache knows them, and go on from there."""
    scheduler = make_scheduler(30, reuse=Reuse.EXACT)
    root = sequence("root", 14, max_tokens=20)
    root.forks = {0: [], 1: []}
    scheduler.submit(root)
    scheduler.admit()
    [item] = scheduler.schedule().rows
    root.advance(item.end)
    scheduler.remember(root)
    [twin] = scheduler.fork(root)
    for one, token_id in ((root, 50), (twin, 60)):
        one.output = [token_id] * 8
        for start in range(14, 21):
            scheduler.tables[0].own(one, start, start + 1)
        one.advance(21)
    for one in (root, twin):
        scheduler.remember(one)
    for token_id, answered in ((50, root), (60, twin)):
        later = sequence("later", 14)
        later.prompt, later.shallow = (*range(14), *[token_id] * 8), range(13)
        scheduler.submit(later)
        scheduler.admit()
        assert later.num_present == 20 and later.blocks[:5] == answered.blocks[:5]
        scheduler.finish(later)


def test_who_lacked_blocks_and_is_gone_keeps_nobody_out() -> None:
    """Or the engine would sleep beside a free pool, until somebody new came."""
    scheduler, a, z, w = one_that_lacks_blocks()
    scheduler.requeue(w)
    scheduler.requeue(z)
    scheduler.finish(a)
    assert names(scheduler.waiting) == ["z", "w"], "of those that stand back, the youngest was asked first"
    scheduler.admit()
    assert names(scheduler.running) == ["z", "w"]


def test_what_was_shared_a_while_ago_lets_nobody_in() -> None:
    """As many blocks are free as when it was looked up, but they are others."""
    scheduler = make_scheduler(40, reuse=Reuse.EXACT)
    first, filler = sequence("first", 81), sequence("filler", 41)
    filler.tenant = "another"
    for one in (first, filler):
        scheduler.submit(one)
    step(scheduler)
    table, head = scheduler.tables[0], sequence("head", 101)
    free = scheduler.allocator.num_free
    assert table.fits(head, 101, free)
    scheduler.finish(first)
    newcomer = sequence("newcomer", 81)
    newcomer.tenant = "a third"
    table.allocate(newcomer, 82)
    assert scheduler.allocator.num_free == free
    assert not table.fits(head, 101, free)
