from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.scheduler import MAX_UNSENT_CHUNKS, Scheduler, StepPlan
from shoal.engine.sequence import Sequence
from shoal.errors import InternalError, InvalidRequest, Overloaded
from shoal.model.kv_layout import stage_layout
from shoal.wire.messages import SamplingParams

BLOCK = 4


def make_scheduler(num_blocks: int = 64, **limits: float) -> Scheduler:
    """With ``num_deep_blocks`` its deep layers have blocks of their own."""
    layout = stage_layout(
        num_layers=2, num_kept=1, num_held=2, num_kv_heads=1, head_dim=1, dtype_bytes=1, block_tokens=BLOCK,
        is_apart="num_deep_blocks" in limits,
    )  # fmt: skip
    settings_ = {"max_step_tokens": 32, "max_sequences": 16, "max_queued": 16} | limits
    return Scheduler(layout, num_blocks, **settings_)  # type: ignore[arg-type]


def sequence(
    name: str, num_prompt: int, *, max_tokens: int = 4, choices: int = 1, num_sent: int = 0, **fields: float
) -> Sequence:
    """Of its ``choices``, each but the last has ``num_sent`` tokens already."""
    sampling = SamplingParams(max_tokens=max_tokens, num_choices=choices)
    shallow = range(num_prompt - 1)
    one = Sequence(name, tuple(range(num_prompt)), shallow, sampling, **fields)  # type: ignore[arg-type]
    if choices > 1:
        one.forks = {index: [0] * (num_sent if index < choices - 1 else 0) for index in range(choices)}
    else:
        one.output = [0] * num_sent
    return one


def rows_of(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(item.sequence.request_id, item.start, item.end) for item in plan.rows]


def carry_out(plan: StepPlan) -> None:
    """What the engine does with a step, with token 0 as every answer."""
    for item in plan.rows:
        item.sequence.advance(item.end)
        if item.sequence.sampled and item.completes and not item.sequence.forks:
            item.sequence.output.append(0)


def step(scheduler: Scheduler) -> StepPlan:
    scheduler.admit()
    plan = scheduler.schedule()
    carry_out(plan)
    for item in plan.rows:
        if item.sequence.sampled and len(item.sequence.output) >= item.sequence.sampling.max_tokens:
            scheduler.finish(item.sequence)
    return plan


def test_sequences_that_need_one_token_go_before_those_with_a_prompt_to_compute():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.submit(sequence("old", 30))
    step(scheduler)
    scheduler.submit(sequence("short", 1))
    assert rows_of(step(scheduler)) == [("short", 0, 1), ("old", 8, 15)]
    assert rows_of(step(scheduler)) == [("short", 1, 2), ("old", 15, 22)]


def test_admission_is_first_in_first_out_even_if_a_later_one_would_fit():
    scheduler = make_scheduler(num_blocks=8)
    scheduler.submit(sequence("first", 20))
    step(scheduler)
    scheduler.submit(sequence("large", 16))
    scheduler.submit(sequence("small", 2))
    step(scheduler)
    assert [item.request_id for item in scheduler.waiting] == ["large", "small"]


def test_who_is_due_first_is_admitted_first_and_of_equals_who_came_first():
    scheduler = make_scheduler(max_sequences=1)
    scheduler.submit(sequence("runs", 4))
    step(scheduler)
    for name, due_s in (("late", 600), ("soon", 10), ("late too", 600), ("sooner", 5), ("soon too", 10)):
        scheduler.submit(sequence(name, 4, due_s=due_s))
    expected = ["sooner", "soon", "soon too", "late", "late too"]
    assert [item.request_id for item in scheduler.waiting] == expected


def test_one_that_gave_its_blocks_up_comes_back_before_all_others_whenever_they_are_due():
    scheduler = make_scheduler(num_blocks=8)
    scheduler.submit(sequence("old", 12, max_tokens=20))
    scheduler.submit(sequence("young", 12, max_tokens=20))
    while scheduler.num_preemptions == 0:
        step(scheduler)
    scheduler.submit(sequence("urgent", 4, due_s=1))
    assert [item.request_id for item in scheduler.waiting] == ["young", "urgent"]


def test_of_prompts_that_run_the_one_that_is_due_first_is_computed_first():
    scheduler = make_scheduler(max_step_tokens=8)
    scheduler.submit(sequence("old", 30, due_s=600))
    step(scheduler)
    scheduler.submit(sequence("urgent", 12, due_s=5))
    assert rows_of(step(scheduler)) == [("urgent", 0, 8)]
    assert rows_of(step(scheduler)) == [("urgent", 8, 12), ("old", 8, 12)]


def test_chunks_of_prompts_are_as_long_as_a_step_may_take_and_tokens_come_beside_them():
    scheduler = make_scheduler(num_blocks=512, max_step_tokens=1024, target_step_s=0.5)
    scheduler.submit(sequence("chats", 4, max_tokens=20))
    step(scheduler)
    scheduler.submit(sequence("long", 1000))
    scheduler.submit(sequence("long too", 1000))
    scheduler.pace.saw(1024, 2.0)
    assert rows_of(step(scheduler)) == [("chats", 4, 5), ("long", 0, 256)]
    scheduler.pace.forget()
    assert rows_of(step(scheduler)) == [("chats", 5, 6), ("long", 256, 1000), ("long too", 0, 279)]


def test_a_full_queue_refuses():
    scheduler = make_scheduler(max_queued=2)
    for name in "ab":
        scheduler.submit(sequence(name, 4))
    with pytest.raises(Overloaded, match="as many requests"):
        scheduler.submit(sequence("c", 4))
    assert len(scheduler.waiting) == 2


def test_a_queue_is_full_of_tokens_too_but_one_request_may_always_wait():
    scheduler = make_scheduler(max_queued_tokens=10)
    scheduler.submit(sequence("long", 12))
    with pytest.raises(Overloaded, match="as many tokens"):
        scheduler.submit(sequence("b", 1))
    step(scheduler)
    scheduler.submit(sequence("c", 6))
    scheduler.submit(sequence("d", 4))
    with pytest.raises(Overloaded, match="as many tokens"):
        scheduler.submit(sequence("e", 1))


def test_an_answer_that_was_begun_elsewhere_is_not_refused_by_a_full_queue():
    for limits in ({"max_queued": 1}, {"max_queued_tokens": 10}):
        scheduler = make_scheduler(max_sequences=1, **limits)
        scheduler.submit(sequence("waits", 10))
        scheduler.submit(sequence("resumed", 8, num_sent=2, due_s=1, is_resumed=True))
        assert [item.request_id for item in scheduler.waiting] == ["resumed", "waits"]
        with pytest.raises(Overloaded):
            scheduler.submit(sequence("new", 8))


def test_what_can_never_fit_is_refused_at_once():
    scheduler = make_scheduler(num_blocks=4)
    scheduler.submit(sequence("fits", 13, max_tokens=4))
    with pytest.raises(InvalidRequest, match="need 17 tokens of KV, this pool holds 16"):
        scheduler.submit(sequence("too long", 14, max_tokens=4))


def test_out_of_blocks_the_youngest_gives_way_and_never_the_oldest():
    scheduler = make_scheduler(num_blocks=6)
    for name in ("oldest", "middle", "youngest"):
        scheduler.submit(sequence(name, 7, max_tokens=12))
    finished: list[str] = []
    first_preempted = None
    for _ in range(200):
        before = [item.request_id for item in scheduler.running]
        plan = step(scheduler)
        if scheduler.num_preemptions and first_preempted is None:
            first_preempted = scheduler.waiting[0].request_id
        finished += [name for name in before if name not in {s.request_id for s in scheduler.sequences}]
        if not plan.rows:
            break
    assert first_preempted == "youngest"
    assert finished == ["oldest", "middle", "youngest"]
    assert scheduler.allocator.num_used == 0


def test_a_held_sequence_waits_with_all_its_blocks_until_it_is_started():
    scheduler = make_scheduler()
    held = sequence("held", 9, hold=True)
    scheduler.submit(held)
    assert scheduler.admit() == [held]
    assert len(held.blocks) == 3 and scheduler.num_reserved_blocks == 3
    assert scheduler.schedule().rows == ()
    scheduler.start(held, 8)
    assert rows_of(scheduler.schedule()) == [("held", 8, 9)]
    with pytest.raises(InternalError, match="is RUNNING, not RESERVED"):
        scheduler.start(held, 8)


def test_prompts_on_their_way_hold_at_most_their_share_of_the_pool_but_one_always_goes():
    scheduler = make_scheduler(num_blocks=10, max_reserved_ratio=0.5)
    for name in "abc":
        scheduler.submit(sequence(name, 11, max_tokens=1, hold=True))
    assert [item.request_id for item in scheduler.admit()] == ["a"]
    scheduler.start(scheduler.reserved[0], 10)
    assert [item.request_id for item in scheduler.admit()] == ["b"]


def test_prefill_waits_for_the_wire_and_never_computes_the_boundary_token():
    scheduler = make_scheduler(max_step_tokens=4)
    prompt = sequence("p", 13, hold=True, sampled=False)
    scheduler.submit(prompt)
    scheduler.admit()
    scheduler.start(prompt, 0)
    computed = []
    for _ in range(MAX_UNSENT_CHUNKS):
        plan = step(scheduler)
        computed += rows_of(plan)
        prompt.ready_to_send(prompt.num_computed)
    assert step(scheduler).rows == ()
    prompt.num_unsent = 0
    computed += rows_of(step(scheduler))
    assert computed == [("p", 0, 4), ("p", 4, 8), ("p", 8, 12)]
    assert step(scheduler).rows == ()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 10), st.booleans(), st.integers(1, 3), st.integers(0, 9)),
        min_size=1,
        max_size=10,
    ),
    st.integers(8, 24),
    st.integers(1, 40),
    st.sampled_from([{}, {"num_deep_blocks": 4}, {"num_deep_blocks": 8}]),
    st.integers(0, 6),
)
def test_whatever_comes_everything_ends_and_no_slot_has_two_writers(
    wanted: list[tuple[int, int, bool, int, int]],
    num_blocks: int,
    budget: int,
    deep: dict[str, float],
    num_anchors: int,
):
    scheduler = make_scheduler(num_blocks=num_blocks, max_step_tokens=budget, **deep)
    for index, (num_prompt, max_tokens, hold, choices, num_sent) in enumerate(wanted):
        one = sequence(
            str(index), num_prompt, max_tokens=max_tokens, hold=hold, choices=choices,
            num_sent=min(num_sent, max_tokens - 1),
        )  # fmt: skip
        one.shallow = range(num_anchors, num_prompt - 1) if num_anchors < num_prompt - 1 else range(0)
        try:
            scheduler.submit(one)
        except InvalidRequest:
            assert deep
    for _ in range(2000):
        for item in scheduler.admit():
            scheduler.start(item, item.num_prompt_tokens - 1)
        plan = scheduler.schedule()
        assert plan.num_rows <= budget
        assert (plan.rows or not plan.copies) and (plan.rows or not plan.deep_copies)
        for table in scheduler.tables:
            writers: dict[int, Sequence] = {}
            for item in plan.rows:
                start, end = (table.num_held_tokens(item.sequence, at) for at in (item.start, item.end))
                for block in table.held(item.sequence)[start // BLOCK : -(-end // BLOCK) if start < end else 0]:
                    assert table.allocator.count(block) == 1
                    assert writers.setdefault(block, item.sequence) is item.sequence
        roots = [item.sequence for item in plan.rows if item.completes and item.sequence.forks]
        carry_out(plan)
        for root in roots:
            for choice in (root, *scheduler.fork(root)):
                if not choice.output:
                    choice.output.append(0)
        for item in list(scheduler.running):
            if len(item.output) >= item.sampling.max_tokens:
                scheduler.finish(item)
        if not scheduler.sequences:
            break
    assert scheduler.sequences == []
    assert all(table.allocator.num_used == 0 for table in scheduler.tables)


def test_where_a_step_has_no_room_for_all_answers_they_take_turns():
    scheduler = make_scheduler()
    for name in range(8):
        scheduler.submit(sequence(str(name), 2, max_tokens=20))
    step(scheduler)
    assert [len(one.output) for one in scheduler.running] == [1] * 8
    scheduler.max_step_tokens = 3
    for _ in range(8):
        assert len(step(scheduler).rows) == 3
    assert [len(one.output) for one in scheduler.running] == [4] * 8


@pytest.mark.parametrize("num_answers", [32, 40])
def test_a_prompt_is_computed_where_answers_alone_would_fill_every_step(num_answers: int):
    scheduler = make_scheduler(num_blocks=4096, max_step_tokens=32, max_sequences=64, max_queued=64)
    for name in range(num_answers):
        scheduler.submit(sequence(str(name), 1, max_tokens=2000))
    step(scheduler)
    prompt = sequence("prompt", 300)
    scheduler.submit(prompt)
    before = [len(one.output) for one in scheduler.running]
    # Each other step: ten for the prompt, and ten for the others, who lose no more by it.
    for _ in range(20):
        step(scheduler)
    assert prompt.num_computed >= 300 and prompt.output
    came = sum(len(one.output) for one in scheduler.running if one is not prompt) - sum(before)
    assert came >= 10 * 32
