"""What the next step runs. Plain Python: no tensors, no clock, no threads.

Who is due first comes first, and of equals who came first. In every step, running sequences get one token each; what is
left of the token budget and of the step's time goes to chunks of prompts, and to waiting sequences.

When a running sequence needs a block and none is free, the youngest running one gives up all of its blocks and goes
back to the head of the queue; it is recomputed from its tokens, each with the depth it had. While reserved ones hold
blocks, the last one running waits for those instead.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import takewhile

from shoal.engine.blocks import BlockAllocator
from shoal.engine.pace import Pace
from shoal.engine.sequence import Phase, Sequence
from shoal.engine.tables import Reuse, block_tables
from shoal.errors import InternalError, InvalidRequest, OutOfBlocks, Overloaded
from shoal.model.kv_layout import KvLayout

# Prefill computes at most this many chunks ahead of the wire.
MAX_UNSENT_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """Positions ``[start, end)`` of one sequence."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def completes(self) -> bool:
        """Everything known is computed after this step, so the next token can be sampled."""
        return self.end == self.sequence.num_to_compute

    @property
    def samples(self) -> bool:
        """This step's last row is to be continued: by one token, or at the boundary by one for each choice."""
        return self.completes and self.sequence.sampled and self.sequence.sampling.max_tokens > 0

    @property
    def goes_on(self) -> bool:
        """One token of full depth, the last one. Nothing of a prompt is to be told then: its last token says only what
        comes after it."""
        return self.num_rows == 1 and self.samples and self.start not in self.sequence.shallow

    @property
    def scored(self) -> range:
        """Positions whose next token is one of the prompt's and has a log-probability to tell, not told before."""
        sequence = self.sequence
        if sequence.sampling.num_prompt_logprobs is None:
            return range(0)
        return range(max(self.start, sequence.num_scored), min(self.end, sequence.num_prompt_tokens - 1))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: first copy blocks ``(source, target)``, then run the rows. A sequence may have two pieces in a step.

    ``recalls`` are rows that needn't run: they were computed for another prompt, and are to be shipped for this one.
    ``deep_copies`` are of deep layers that have blocks of their own.
    ``wants_blocks`` says that a running sequence waits for blocks which reserved ones hold.
    """

    rows: tuple[ScheduledRows, ...]
    copies: tuple[tuple[int, int], ...]
    deep_copies: tuple[tuple[int, int], ...] = ()
    recalls: tuple[ScheduledRows, ...] = ()
    wants_blocks: bool = False

    @property
    def num_rows(self) -> int:
        return sum(item.num_rows for item in self.rows)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that run or are shipped, each once."""
        return list(dict.fromkeys(item.sequence for item in (*self.recalls, *self.rows)))


class Scheduler:
    """Owns all sequences of one engine and decides who runs. Called by the engine thread alone.

    A step runs at most ``max_step_tokens``, and with prompts in it should take ``target_step_s`` at most.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_queued: int,
        max_queued_tokens: int = 1 << 62,
        max_reserved_ratio: float = 1.0,
        num_deep_blocks: int = 0,
        reuse: Reuse = Reuse.NONE,
        target_step_s: float = math.inf,
    ) -> None:
        self.layout = layout
        self.tables = block_tables(layout, num_blocks, num_deep_blocks, reuse)
        self.waiting: deque[Sequence] = deque()
        self.reserved: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._wants_blocks = False
        self._num_turns = 0  # that running ones have had of steps with no room for all of them
        self._prompts_first = False  # in the last step that had room for none of a prompt
        self._short: Sequence | None = None  # a running one that got no block in the last step
        self.max_step_tokens = max_step_tokens
        self.pace = Pace(target_step_s, max_step_tokens)
        self._max_sequences = max_sequences
        self._max_queued = max_queued
        self._max_queued_tokens = max_queued_tokens
        self._max_reserved_ratio = max_reserved_ratio

    # --- commands -------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises InvalidRequest if it could never fit, Overloaded if the queue is full.

        For one that is resumed it never is: somebody reads its answer, and there are no more than ran elsewhere.
        """
        most = self.num_tokens_at_end(sequence)
        for table in self.tables:
            if (wanted := table.num_held_tokens(sequence, most)) > table.num_slots:
                raise InvalidRequest(
                    f"prompt and answer need {wanted} tokens of KV, this pool holds {table.num_slots}"
                    f"{' in its deep layers' if table is not self.tables[0] else ''}",
                    param="prompt",
                )
        if not sequence.is_resumed:
            self._refuse_if_full(sequence)
        index = len(self.waiting)
        while index and self._is_due_before(sequence, self.waiting[index - 1]):
            index -= 1
        self.waiting.insert(index, sequence)

    @property
    def allocator(self) -> BlockAllocator:
        """Of the layers that hold every token."""
        return self.tables[0].allocator

    @property
    def num_tokens_held(self) -> int:
        """How many tokens' K/V the whole pool holds in every layer."""
        return min(table.num_slots for table in self.tables)

    def num_tokens_left(self, sequence: Sequence) -> int:
        """How many tokens of KV the whole pool would hold beyond a sequence's prompt."""
        num_prompt = sequence.num_prompt_tokens
        return min(table.num_slots - table.num_held_tokens(sequence, num_prompt) for table in self.tables)

    def kv_bytes(self, sequence: Sequence) -> int:
        """Bytes of the pool that a sequence's blocks are."""
        return sum(len(table.held(sequence)) * table.block_bytes for table in self.tables)

    def num_tokens_at_end(self, sequence: Sequence) -> int:
        """K/V slots a sequence holds when it is done: the last token sampled is never run."""
        if not sequence.sampled:
            return sequence.num_to_compute
        return sequence.num_prompt_tokens + max(0, sequence.sampling.max_tokens - 1)

    def start(self, sequence: Sequence, num_arrived: int) -> None:
        """Let a reserved sequence run, whose first ``num_arrived`` tokens' K/V came from prefill."""
        if sequence.phase is not Phase.RESERVED:
            raise InternalError(f"{sequence.request_id} is {sequence.phase.name}, not RESERVED")
        self._unreserve(sequence)
        sequence.arrive(num_arrived)
        self._run(sequence)

    def start_shipping(self, sequence: Sequence, num_present: int) -> None:
        """Let a reserved prompt run, now that its ids are known, whose first ``num_present`` tokens' K/V decode has.

        What of it has been computed for another prompt is found, now or before its first step, and not computed again.
        """
        self.start(sequence, 0)
        sequence.num_shipped = num_present
        for table in self.tables:
            table.find(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """A reserved sequence gives up its blocks, and will compute its prompt here when its turn comes."""
        if sequence.phase is not Phase.RESERVED:
            raise InternalError(f"{sequence.request_id} is {sequence.phase.name}, not RESERVED")
        self._unreserve(sequence)
        # Behind running ones that gave way, whose blocks these may have been; before those that stood back as it does,
        # since the youngest are asked first.
        gave_way = takewhile(lambda one: one.came_back and not one.stood_back, self.waiting)
        self._back_to_waiting(sequence, at=sum(1 for _ in gave_way))
        sequence.stood_back = True

    def finish(self, sequence: Sequence) -> None:
        """Give back everything; a second time is a no-op."""
        if sequence.phase is Phase.FINISHED:
            return
        match sequence.phase:
            case Phase.WAITING:
                self.waiting.remove(sequence)
            case Phase.RESERVED:
                self._unreserve(sequence)
            case Phase.RUNNING:
                self.running.remove(sequence)
        self._give_up_blocks(sequence)
        sequence.phase = Phase.FINISHED

    def remember(self, sequence: Sequence) -> None:
        """Let sequences to come find what this one has computed."""
        for table in self.tables:
            table.remember(sequence)

    def forget(self, sequence: Sequence) -> None:
        """What this one holds can't be trusted: nobody may find it, nor what came after it."""
        for table in self.tables:
            table.allocator.forget(table.held(sequence))

    def fork(self, root: Sequence) -> list[Sequence]:
        """The other choices of ``root``, sharing its blocks: its prompt is computed, and each goes on from there."""
        (_, root.output), *others = root.forks.items()
        root.forks, forks = {}, []
        for choice, output in others:
            twin = replace(root, choice=choice, blocks=[], deep_blocks=[], output=output, phase=Phase.RUNNING)
            for table in self.tables:
                table.share(root, twin)
            forks.append(twin)
        position = self.running.index(root) + 1
        self.running[position:position] = forks
        return forks

    # --- the step -------------------------------------------------------------------------------------

    def admit(self) -> list[Sequence]:
        """Move waiting sequences on while the head of the queue fits; return those that are now reserved.

        None while a running one lacks blocks: what has been given back meanwhile is for that one.
        """
        if self._short is not None and self._short.phase is Phase.RUNNING:
            return []
        reserved = []
        while self._may_admit():
            head = self.waiting.popleft()
            for table in self.tables:
                table.allocate(head, self._tokens_at_first(head))
            if head.hold:
                head.phase = Phase.RESERVED
                self.reserved.append(head)
                for table in self.tables:
                    table.allocator.reserve(table.held(head))
                reserved.append(head)
            else:
                self._run(head)
        return reserved

    def _may_admit(self) -> bool:
        """Whether there is a head of the queue, and it fits."""
        if not self.waiting or not self._has_place_for(self.waiting[0]):
            return False
        head = self.waiting[0]
        tokens = self._tokens_at_first(head)
        fits = all(table.fits(head, tokens, table.allocator.num_free) for table in self.tables)
        return fits and (not head.hold or self._may_reserve(head, tokens))

    def _tokens_at_first(self, sequence: Sequence) -> int:
        """One more than is known: else a sequence could come back only to give way again at once."""
        return min(sequence.num_to_compute + 1, self.num_tokens_at_end(sequence))

    def schedule(self) -> StepPlan:
        """Choose the next step's rows; empty if nothing can run now."""
        budget, prompt_budget = self.max_step_tokens, self.pace.num_tokens
        self._wants_blocks, self._short = False, None
        rows: list[ScheduledRows] = []
        recalls: list[ScheduledRows] = []
        for sequence in self._in_order():
            if budget == 0:
                break
            if sequence.phase is not Phase.RUNNING or sequence.num_unsent >= MAX_UNSENT_CHUNKS:
                continue
            if prompt_budget and sequence.is_untouched:  # others that begin like it may have been computed meanwhile
                for table in self.tables:
                    table.find(sequence)
            if found := sequence.recalled[:budget]:
                recalls.append(ScheduledRows(sequence, found.start, found.stop))
                budget -= len(found)
                continue
            is_prompt = sequence.num_pending > 1
            most = min(budget, prompt_budget) if is_prompt else budget
            pieces = list(sequence.pieces(most)) if most > 0 else []
            if pieces and self._make_room(sequence, pieces, rows):
                rows += (ScheduledRows(sequence, start, end) for start, end in pieces)
                num_rows = sum(end - start for start, end in pieces)
                budget -= num_rows
                prompt_budget -= num_rows if is_prompt else 0
        # Without rows nothing runs, and copies wait for the next step.
        copies = [table.take_copies() if rows else () for table in self.tables]
        deep_copies = copies[1] if len(copies) > 1 else ()
        return StepPlan(tuple(rows), copies[0], deep_copies, tuple(recalls), wants_blocks=self._wants_blocks)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.reserved, *self.waiting]

    def only_goes_on(self, now_s: float) -> bool:
        """There's nothing to do but to go on with answers that have time, each by the token that it said last."""
        return (
            bool(self.running)
            and all(one.output and one.num_pending == 1 and now_s < one.hurries_from_s for one in self.running)
            and not self._may_admit()
        )

    @property
    def num_reserved_blocks(self) -> int:
        """That reserved sequences alone hold, each once."""
        return self.allocator.num_only_reserved

    # --- helpers --------------------------------------------------------------------------------------

    def _refuse_if_full(self, sequence: Sequence) -> None:
        if len(self.waiting) >= self._max_queued:
            raise Overloaded("as many requests are waiting as may: try again later")
        num_queued = sum(one.num_to_compute for one in self.waiting)
        if num_queued and num_queued + sequence.num_to_compute > self._max_queued_tokens:
            raise Overloaded("as many tokens are waiting as may: try again later")

    def _is_due_before(self, new: Sequence, waiting: Sequence) -> bool:
        """One that gave its blocks up stays first: somebody may be reading its answer."""
        return not waiting.came_back and new.due_s < waiting.due_s

    def _in_order(self) -> list[Sequence]:
        """Those that only need one token, oldest first, or in turns where a step hasn't room for all, before those with
        a prompt to chew on; but where there's no room for any of a prompt, every other step is theirs first."""
        going_on, prompts = [], []
        for sequence in self.running:
            num_pending = sequence.num_pending
            if num_pending == 1:
                going_on.append(sequence)
            elif num_pending > 1:
                prompts.append(sequence)
        prompts.sort(key=lambda sequence: sequence.due_s)
        if prompts and len(going_on) >= self.max_step_tokens:
            self._prompts_first = not self._prompts_first
            if self._prompts_first:
                return [*prompts, *going_on]
        if len(going_on) > self.max_step_tokens:
            first = self._num_turns % len(going_on)
            going_on = going_on[first:] + going_on[:first]
            self._num_turns += self.max_step_tokens
        return [*going_on, *prompts]

    def _unreserve(self, sequence: Sequence) -> None:
        """Before anything is done with its blocks."""
        self.reserved.remove(sequence)
        for table in self.tables:
            table.allocator.unreserve(table.held(sequence))

    def _run(self, sequence: Sequence) -> None:
        sequence.phase = Phase.RUNNING
        self.running.append(sequence)

    def _has_place_for(self, head: Sequence) -> bool:
        """Choices that are yet to fork count already. One with more choices than places may run alone."""
        taken = sum(sequence.num_places for sequence in (*self.running, *self.reserved))
        return taken == 0 or taken + head.num_places <= self._max_sequences

    def _may_reserve(self, head: Sequence, num_tokens: int) -> bool:
        # A prompt larger than the share may still go alone, or it would wait for ever.
        return not self.reserved or all(
            table.fits(
                head,
                num_tokens,
                max(1, int(table.allocator.num_blocks * self._max_reserved_ratio)) - table.allocator.num_reserved,
            )
            for table in self.tables
        )

    def _make_room(self, sequence: Sequence, pieces: list[tuple[int, int]], rows: list[ScheduledRows]) -> bool:
        """Make all pieces' positions writable. False if the sequence had to give way itself."""
        while True:
            try:
                for table in self.tables:
                    for start, end in pieces:
                        table.own(sequence, start, end)
                return True
            except OutOfBlocks:
                if not self._preempt_youngest(sequence, rows):
                    return False

    def _preempt_youngest(self, asking: Sequence, rows: list[ScheduledRows]) -> bool:
        """Take the blocks of the youngest running sequence. False if that is the one asking.

        Rows that this very step already gave to the victim are taken back with their copies.
        """
        victim = self.running[-1]
        if self.reserved:
            self._wants_blocks = True
            if victim is asking:
                self._short = asking
                return False  # reserved ones are younger: it keeps what it has until one of them gives way
        self.num_preemptions += 1
        rows[:] = [item for item in rows if item.sequence is not victim]
        self.running.remove(victim)
        self._back_to_waiting(victim)
        return victim is not asking

    def _back_to_waiting(self, sequence: Sequence, *, at: int = 0) -> None:
        self._give_up_blocks(sequence)
        sequence.phase = Phase.WAITING
        sequence.num_present = sequence.num_computed = 0
        sequence.arrived = range(0)
        sequence.hold = False
        sequence.came_back, sequence.stood_back = True, False
        self.waiting.insert(at, sequence)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        for table in self.tables:
            table.give_up(sequence)
