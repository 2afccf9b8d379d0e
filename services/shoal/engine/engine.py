"""One engine for both stages: scheduler, runner and sampler behind a handful of commands.

``step`` runs one forward, or projects some layers of the last one's rows, and returns all that came of it. Not
thread-safe: engine/thread.py gives it its thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from shoal.backends.chooser import Chooser, SampleRow
from shoal.engine.ahead import Ahead
from shoal.engine.desertion import Deserted, Desertion
from shoal.engine.events import EngineCounts, FailureEvent, PromptEvent, Reservation, StepOutput, TokenEvent
from shoal.engine.logprobs import NOT_FINITE
from shoal.engine.runner import KV_NOT_FINITE, PrefillChunk, Runner, RunOutput
from shoal.engine.sampler import Sampled, sample
from shoal.engine.scheduler import ScheduledRows, Scheduler, StepPlan
from shoal.engine.sequence import Phase, Sequence
from shoal.errors import InternalError, ShoalError
from shoal.wire.handoff_messages import WireMode
from shoal.wire.messages import Depth, FinishReason, PromptOutline, SamplingParams, SentChoice

_log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""Who may wait longer is treated as if this were all: nobody is overtaken by what comes so much later."""
HURRIED_S = 60.0
"""Whose time ends within it isn't slowed down for others' prompts."""


class Engine:
    """``eos_token_ids`` end a choice unless it ignores them. Without a ``chooser`` of tokens, torch is it. ``ahead`` is
    of the runner's pool."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        eos_token_ids: tuple[int, ...] = (),
        chooser: Chooser | None = None,
        ahead: Ahead | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._eos_token_ids = eos_token_ids
        self._chooser = chooser
        self._ahead = ahead
        self._clock = clock
        self.desertion = Desertion()
        self._sequences: dict[str, dict[int, Sequence]] = {}
        self._finished_kv_bytes: list[int] = []
        self._unprojected: deque[ScheduledRows] = deque()
        self._projecting: Iterator[PrefillChunk] | None = None
        """What is left of the first of them, if it was begun."""
        self._has_projected = False

    def told_of_progress(self, progressed: Callable[[], None]) -> None:
        """Call it within a step, again and again: with every layer. There, from now on, a step of prompts that nobody
        waits for ends."""

        def told() -> None:
            progressed()
            self.desertion.check()

        self.runner.progressed = self.runner.decoder.progressed = told

    # --- commands -------------------------------------------------------------------------------------

    def submit_generate(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        depth: Depth,
        sampling: SamplingParams,
        *,
        hold: bool = False,
        outline: PromptOutline | None = None,
        tenant: str = "",
        timeout_s: float = math.inf,
        sent: tuple[SentChoice, ...] = (),
    ) -> None:
        """Queue a prompt to be continued. With ``hold`` it waits, once it has its blocks, for ``start``. K/V are shared
        within a ``tenant`` only. Who has little of ``timeout_s`` left comes first.

        What was ``sent`` of each choice before is recomputed at full depth, as after a preemption, and continued."""
        self._require_known(prompt, *(choice.token_ids for choice in sent))
        shallow = self.runner.decoder.plan.shallow_tokens(len(prompt), depth, outline)
        if sampling.num_prompt_logprobs is not None and (shallow or hold):
            raise InternalError("prompt log-probabilities need a prompt that decode computes itself, at full depth")
        due_s = self._due_s(0.0 if sent else timeout_s)  # somebody may be reading what was sent
        sequence = Sequence(
            request_id, prompt, shallow, sampling, hold=hold, tenant=tenant, due_s=due_s,
            hurries_from_s=self._clock() + timeout_s - HURRIED_S, is_resumed=bool(sent),
        )  # fmt: skip
        outputs = _open_outputs(sampling.num_choices, sent)
        sequence.choice = min(outputs)
        if len(outputs) > 1:
            sequence.forks = outputs
        else:
            sequence.output = outputs[sequence.choice]
        room = self.scheduler.num_tokens_left(sequence) + 1
        if sampling.may_shorten and 0 < room < sampling.max_tokens:
            room = max(room, 1 + max(map(len, outputs.values())))  # another pool had room for those
            sequence.sampling = replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        self._submit(sequence)

    def submit_prefill(
        self, request_id: str, num_prompt_tokens: int, *, tenant: str = "", timeout_s: float = math.inf
    ) -> None:
        """Queue a prompt whose K/V are to be computed and shipped. Its ids come with ``start_shipping``.

        Its depth is this stage's plan: all tokens but the boundary token, which isn't run here.
        """
        shallow = range(num_prompt_tokens - 1 if self.runner.decoder.plan.num_skipped else 0)
        placeholder = (0,) * num_prompt_tokens
        sampling = SamplingParams(max_tokens=1)
        due_s = self._due_s(timeout_s)
        self._submit(
            Sequence(request_id, placeholder, shallow, sampling, hold=True, sampled=False, tenant=tenant, due_s=due_s)
        )

    def start_shipping(
        self, request_id: str, prompt: tuple[int, ...], *, num_present: int = 0, wire_mode: WireMode = WireMode.KV
    ) -> None:
        """Let a held prompt run whose ids are known now, and ship what comes after ``num_present`` tokens."""
        sequence = self._held(request_id)
        if len(prompt) != sequence.num_prompt_tokens:
            raise InternalError(f"{len(prompt)} token ids for a prompt of {sequence.num_prompt_tokens}")
        self._require_known(prompt)
        sequence.prompt, sequence.wire_mode = prompt, wire_mode
        self.scheduler.start_shipping(sequence, num_present)

    def start(self, request_id: str, *, num_arrived: int = 0) -> None:
        """Let a held request run: from its first token, or with the K/V of the ``num_arrived`` that prefill sent."""
        sequence = self._held(request_id)
        if self.runner.decoder.plan.num_skipped and not sequence.shallow:
            num_arrived = 0  # all of its tokens are full depth: what a stage without deep layers has is no use
        self.scheduler.start(sequence, num_arrived)

    def requeue(self, request_id: str) -> None:
        """A held request gives up its blocks; it will compute its prompt here when its turn comes."""
        for sequence in self._sequences.get(request_id, {}).values():
            self.scheduler.requeue(sequence)

    def chunk_sent(self, request_id: str) -> None:
        """A chunk is on its way: the next may be computed."""
        for sequence in self._sequences.get(request_id, {}).values():
            sequence.num_unsent -= 1

    def finish(self, request_id: str, choice: int | None = None) -> None:
        """Stop a request (or one choice) and give back all it holds. Unknown ones are a no-op."""
        if choice is None:
            self.desertion.ended(request_id)
        for sequence in list(self._sequences.get(request_id, {}).values()):
            if choice is None or sequence.choice == choice:
                self._finish(sequence)

    def counts(self) -> EngineCounts:
        scheduler = self.scheduler
        deep = scheduler.tables[1].allocator if len(scheduler.tables) > 1 else None
        return EngineCounts(
            num_waiting=len(scheduler.waiting),
            num_reserved=len(scheduler.reserved),
            num_running=len(scheduler.running),
            num_blocks=scheduler.allocator.num_blocks,
            num_free_blocks=scheduler.allocator.num_free,
            num_reserved_blocks=scheduler.num_reserved_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_deep_blocks=0 if deep is None else deep.num_blocks,
            num_free_deep_blocks=0 if deep is None else deep.num_free,
        )

    # --- between requests -----------------------------------------------------------------------------

    @property
    def is_prepared(self) -> bool:
        """Nothing is left to be done for who comes next, or somebody is here: what would be done costs the cores
        time that its prompt may be computed in."""
        return self._ahead is None or bool(self._sequences) or self._ahead.is_far_enough

    def prepare(self) -> None:
        """Take some of the memory that prompts to come will want; some milliseconds at most."""
        if self._ahead is not None:
            self._ahead.take()

    # --- the step -------------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Admit, schedule, run, sample. Never raises for one request's fault: it fails that request alone."""
        output = self._step()
        finished, self._finished_kv_bytes = tuple(self._finished_kv_bytes), []
        return replace(output, finished_kv_bytes=finished) if finished else output

    def _step(self) -> StepOutput:
        started_s = self._clock()
        if admitted := self.scheduler.admit():
            # Told at once: whoever waited for blocks need not wait for a forward of others, too.
            reserved = tuple(Reservation(item.request_id, tuple(item.blocks), item.num_present) for item in admitted)
            return StepOutput(started_s, self._clock(), self.counts(), reserved=reserved)
        while self._unprojected:
            if self._unprojected[0].sequence.phase is Phase.RUNNING:
                return self._project(started_s)
            self._end_projection()
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return StepOutput(started_s, self._clock(), self.counts(), wants_blocks=plan.wants_blocks)
        try:
            output = self._run(plan, started_s)
            prompts, unscored = self._advance(plan, output)
            tokens, unsampled = self._sample(plan, output.logits)
            if not tokens:
                self.runner.wait()
        except Deserted:
            return StepOutput(started_s, self._clock(), self.counts(), wants_blocks=plan.wants_blocks)
        except Exception as error:  # noqa: BLE001 - the engine's edge: a defect must not take other requests along
            _log.exception("a step failed")
            failed = [self._fail(sequence, error) for sequence in plan.sequences]
            for sequence in plan.sequences:  # choices that this very step forked
                self.finish(sequence.request_id)
            return StepOutput(
                started_s, self._clock(), self.counts(), plan.num_rows, failures=tuple(failed), all_failed=True
            )
        ended_s = self._clock()
        failures = (*unscored, *unsampled)
        self._unprojected.extend(output.unprojected)
        self._has_projected = False
        if not plan.recalls:  # they take time, too, but no forward
            self.scheduler.pace.saw(plan.num_rows, ended_s - started_s)
        return StepOutput(
            started_s,
            ended_s,
            self.counts(),
            plan.num_rows,
            len(plan.sequences),
            prompts=tuple(prompts),
            tokens=tuple(tokens),
            chunks=output.chunks,
            failures=failures,
            all_failed=bool(failures) and not tokens and _are_all_of(failures, plan),
            wants_blocks=plan.wants_blocks,
        )

    def _run(self, plan: StepPlan, started_s: float) -> RunOutput:
        sequences = plan.sequences
        for sequence in sequences:
            if sequence.first_step_s is None:
                sequence.first_step_s = started_s
        # To go on by a token is soon done; and a graph that is captured for it is for whoever comes later, too.
        is_short = all(item.goes_on for item in plan.rows)
        with self.desertion.running([] if is_short else [sequence.request_id for sequence in sequences]):
            try:
                return self.runner.run(plan)
            except Deserted:
                self.runner.wait()
                raise

    def _project(self, started_s: float) -> StepOutput:
        """Some layers of a prompt, before another forward: until then the rows' states are where they left them."""
        sequence = self._unprojected[0].sequence
        try:
            self._projecting = self._projecting or self.runner.project(self._unprojected[0])
            chunk = next(self._projecting)
        except Exception as error:  # noqa: BLE001 - as of a step
            _log.exception("a projection failed")
            self._end_projection()
            failure = self._fail(sequence, error)
            # Of one forward's prompts, as of a step: all, and told once.
            are_others = any(other.sequence.phase is Phase.RUNNING for other in self._unprojected)
            all_failed = not (are_others or self._has_projected)
            return StepOutput(started_s, self._clock(), self.counts(), failures=(failure,), all_failed=all_failed)
        if chunk.is_whole:
            self._end_projection()
            self._has_projected = True
        return StepOutput(started_s, self._clock(), self.counts(), chunks=(chunk,))

    def _end_projection(self) -> None:
        """Of the first of those that wait for it: it is projected, has failed, or is wanted no more."""
        self._unprojected.popleft()
        self._projecting = None

    def _advance(self, plan: StepPlan, output: RunOutput) -> tuple[list[PromptEvent], list[FailureEvent]]:
        """Note what is computed; tell what prompts were asked for, and end those that nothing is to follow."""
        prompts: list[PromptEvent] = []
        # First of all: what others would find of them is forgotten before anything of this step is remembered.
        failures = [self._fail_alone(item.sequence, InternalError(KV_NOT_FINITE)) for item in output.broken]
        for item in (*plan.recalls, *plan.rows):
            if not item.sequence.sampled:
                item.sequence.ready_to_send(item.end)
        scores = iter(output.scores)
        for item in plan.rows:
            sequence, scored = item.sequence, item.scored
            tokens = next(scores) if scored else ()
            if sequence.phase is Phase.FINISHED:
                continue
            sequence.advance(item.end)
            sequence.num_scored = max(sequence.num_scored, scored.stop)
            if any(token.is_broken for token in tokens):
                failures.append(self._fail_alone(sequence, InternalError(NOT_FINITE)))
                continue
            ends = item.completes and sequence.sampled and not item.samples
            if tokens or ends:
                first_step_s = sequence.first_step_s or self._clock()
                reason = FinishReason.LENGTH if ends else None
                prompts.append(PromptEvent(sequence.request_id, tokens, reason, first_step_s, sequence.num_present))
            if item.completes and not sequence.output:
                self.scheduler.remember(sequence)
            if ends:
                self._finish(sequence)
        return prompts, failures

    def _sample(self, plan: StepPlan, logits: torch.Tensor | None) -> tuple[list[TokenEvent], list[FailureEvent]]:
        """The next token of each sequence that is complete, unless it has failed just now."""
        sampling = [item for item in plan.rows if item.samples]
        wanted = [
            (choice, self._sample_row(choice, row_index))
            for row_index, item in enumerate(sampling)
            if item.sequence.phase is Phase.RUNNING
            for choice in self._choices(item)
        ]
        if logits is None or not wanted:
            return [], []
        try:
            sampled: list[Sampled | InternalError] = [*sample(logits, [row for _, row in wanted], self._chooser)]
        except InternalError:
            sampled = [_sample_alone(logits, row, self._chooser) for _, row in wanted]
        tokens, failures = [], []
        for (sequence, _), one in zip(wanted, sampled, strict=True):
            if isinstance(one, InternalError):
                failures.append(self._fail_alone(sequence, one))
            else:
                tokens.append(self._accept(sequence, one))
        return tokens, failures

    def _choices(self, item: ScheduledRows) -> list[Sequence]:
        """The sequence itself and, right after its boundary step, the forks of its other choices; of those, only who
        has said nothing yet: the others run first what they have said."""
        root = item.sequence
        if not root.forks:
            return [root]
        forks = self.scheduler.fork(root)
        self._sequences[root.request_id].update({fork.choice: fork for fork in forks})
        return [choice for choice in (root, *forks) if not choice.output]

    def _sample_row(self, sequence: Sequence, row_index: int) -> SampleRow:
        params = sequence.sampling
        banned: tuple[int, ...] = ()
        if sequence.must_go_on:
            banned = (*self._eos_token_ids, *params.stop_token_ids)
        return SampleRow(params, sequence.choice, len(sequence.output), row_index, banned)

    def _accept(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        params, index = sequence.sampling, len(sequence.output)
        sequence.output.append(sampled.token_id)
        reason, stop = None, None
        if index + 1 > params.min_tokens and sampled.token_id in params.stop_token_ids:
            reason, stop = FinishReason.STOP, sampled.token_id
        elif index + 1 > params.min_tokens and not params.ignore_eos and sampled.token_id in self._eos_token_ids:
            reason = FinishReason.STOP
        elif index + 1 >= params.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._finish(sequence)
        first_step_s = sequence.first_step_s or self._clock()
        is_first, sequence.has_spoken = not sequence.has_spoken, True
        return TokenEvent(
            sequence.request_id, sequence.choice, index, sampled.token_id, sampled.logprob, sampled.top, reason, stop,
            first_step_s, sequence.num_present, is_first,
        )  # fmt: skip

    # --- helpers --------------------------------------------------------------------------------------

    def _due_s(self, timeout_s: float) -> float:
        return self._clock() + min(timeout_s, PATIENCE_S)

    def _require_known(self, *tokens: tuple[int, ...]) -> None:
        """The gateway has refused others; a step with one would fail, and others' prompts in it."""
        if max(map(max, filter(None, tokens))) >= self.runner.decoder.spec.vocab_size:
            raise InternalError("a token id is outside the vocabulary")

    def _held(self, request_id: str) -> Sequence:
        if request_id not in self._sequences:
            raise InternalError(f"request {request_id} isn't here")
        [sequence] = self._sequences[request_id].values()
        return sequence

    def _submit(self, sequence: Sequence) -> None:
        if sequence.request_id in self._sequences:
            raise InternalError(f"request {sequence.request_id} is here already")
        self.scheduler.submit(sequence)
        self._sequences[sequence.request_id] = {sequence.choice: sequence}

    def _finish(self, sequence: Sequence) -> None:
        if sequence.blocks:
            self.scheduler.remember(sequence)
        if sequence.sampled and sequence.blocks:
            self._finished_kv_bytes.append(self.scheduler.kv_bytes(sequence))
        self.scheduler.finish(sequence)
        choices = self._sequences.get(sequence.request_id, {})
        choices.pop(sequence.choice, None)
        if not choices:
            self._sequences.pop(sequence.request_id, None)

    def _fail(self, sequence: Sequence, error: Exception) -> FailureEvent:
        if sequence.phase is not Phase.FINISHED:
            self.scheduler.forget(sequence)
            self._finish(sequence)
        known = error if isinstance(error, ShoalError) else InternalError("the engine failed on this request")
        return FailureEvent(sequence.request_id, sequence.choice, known)

    def _fail_alone(self, sequence: Sequence, error: InternalError) -> FailureEvent:
        """For what its own rows brought, whoever shared the step."""
        return replace(self._fail(sequence, error), prompt=hash(sequence.prompt))


def _open_outputs(num_choices: int, sent: tuple[SentChoice, ...]) -> dict[int, list[int]]:
    """What each choice that isn't complete has said already."""
    choices = sent or (SentChoice(),) * num_choices
    return {index: list(choice.token_ids) for index, choice in enumerate(choices) if not choice.is_complete}


def _are_all_of(failures: tuple[FailureEvent, ...], plan: StepPlan) -> bool:
    return {sequence.request_id for sequence in plan.sequences} == {failure.request_id for failure in failures}


def _sample_alone(logits: torch.Tensor, row: SampleRow, chooser: Chooser | None) -> Sampled | InternalError:
    """A row that can't be sampled, say because its logits are NaN, must not take the others along."""
    try:
        return sample(logits, [row], chooser)[0]
    except InternalError as error:
        return error
