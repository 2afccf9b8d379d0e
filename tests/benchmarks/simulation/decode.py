"""A decode replica: reserves, has prompts handed to it, and gives every sequence a token a step.

Its ways, down the ladder too, are those of decode/worker.py, but for ``handoff.busy_after_s``, which counts here as
unset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from simulation.cores import Cores
from simulation.costs import ServingCost, decode_step_s
from simulation.engine import SimulatedEngine, make_sequence
from simulation.link import Link
from simulation.prefill import Handoff, PrefillReplica
from simulation.setting import Setting

from shoal.decode.ladder import Ladder
from shoal.engine.scheduler import ScheduledRows, StepPlan
from shoal.engine.sequence import Phase, Sequence
from shoal.engine.yielding import Yielding
from shoal.errors import Overloaded
from shoal.telemetry.labels import FallbackRung
from shoal_lab.bench.workload import PlannedRequest


@dataclass(eq=False, slots=True)
class Request:
    """One of a client's. Times in seconds of the agenda; ``failure`` is an error's code."""

    planned: PlannedRequest
    sent_s: float
    ended: Callable[[Request], None]
    sequence: Sequence | None = None
    handoff: Handoff | None = None
    asked: PrefillReplica | None = None
    excluded: set[int] = field(default_factory=set)
    attempt: int = 1
    token_s: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def key(self) -> str:
        return str(self.planned.index)


class Outlet:
    """What takes a replica's tokens to their clients: one step's after the other's, by a thread of its own."""

    def __init__(self, cores: Cores, cost: ServingCost) -> None:
        self._cores, self._cost = cores, cost
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()

    def send(self, num_tokens: int, arrived: Callable[[], None]) -> None:
        self._waiting.append((num_tokens, arrived))
        if len(self._waiting) == 1:
            self._next()

    def _next(self) -> None:
        self._cores.run(1, self._cost.step_s + self._cost.token_s * self._waiting[0][0], self._arrived)

    def _arrived(self) -> None:
        _, arrived = self._waiting.popleft()
        arrived()
        if self._waiting:
            self._next()


class DecodeReplica:
    """``prefill`` is the pool that prompts are handed to, if any; ``choose`` brings one of it, given the indices of
    those that have failed a prompt.
    """

    def __init__(
        self, index: int, setting: Setting, cores: Cores, outlet: Outlet, prefill: Many[PrefillReplica],
        choose: Callable[[Collection[int]], PrefillReplica], yielding: Yielding,
    ) -> None:  # fmt: skip
        self.index = index
        self.num_ongoing = 0
        self.num_fallbacks = 0
        scheduler = setting.decode_scheduler()
        self.engine = SimulatedEngine(
            setting.agenda, cores, setting.threads, scheduler, self, niceness=setting.decode_niceness, yielding=yielding
        )
        self.into = Link(setting.costs.handoff.bytes_per_s)
        self._agenda, self._cost, self._local = setting.agenda, setting.costs.decode, setting.prefill_cost
        self._outlet, self._prefill, self._choose = outlet, prefill, choose
        self._ladder = Ladder(setting.config.handoff, setting.agenda.now)
        self._min_tokens = max(2, setting.config.handoff.min_tokens)
        self._open: dict[str, Request] = {}

    def submit(self, request: Request) -> None:
        """Take a request in; it may end at once, refused."""
        planned = request.planned
        hold = bool(self._prefill) and planned.prompt_tokens >= self._min_tokens
        sequence = make_sequence(
            request.key, planned.prompt_tokens, planned.max_tokens, is_shallow=self._local.skip_layers > 0, hold=hold,
            sampled=True,
        )  # fmt: skip
        self.num_ongoing += 1
        self._open[request.key] = request
        try:
            self.engine.scheduler.submit(sequence)
        except Overloaded as error:
            self._end(request, error.code)
            return
        request.sequence = sequence
        self.engine.kick()

    # --- what the engine tells ------------------------------------------------------------------------

    def step_s(self, rows: tuple[ScheduledRows, ...]) -> float:
        return decode_step_s(self._cost, self._local, rows)

    def reserved(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.RESERVED:
            self._hand_off(self._open[sequence.request_id])

    def stepped(self, plan: StepPlan) -> None:
        sampled = [row.sequence for row in plan.rows if row.samples]
        if not sampled:
            return
        requests = []
        for sequence in sampled:
            sequence.output.append(0)
            requests.append(self._open[sequence.request_id])
            if len(sequence.output) == sequence.sampling.max_tokens:
                self.engine.scheduler.finish(sequence)
        self._outlet.send(len(requests), lambda: self._arrived(requests))

    def wants_blocks(self) -> None:
        """The youngest prompt that no prefill replica works on yet stands back."""
        for sequence in reversed(self.engine.scheduler.reserved):
            request = self._open[sequence.request_id]
            if request.handoff is not None and not request.handoff.is_claimed and request.asked is not None:
                request.asked.cancel(request.handoff)
                self.num_fallbacks += 1
                self.engine.scheduler.requeue(sequence)
                self.engine.kick()
                return

    # --- the hand-off ---------------------------------------------------------------------------------

    def _hand_off(self, request: Request) -> None:
        replica = self._choose(request.excluded)
        handoff = Handoff(
            request.key,
            request.planned.prompt_tokens,
            self.into,
            arrived=lambda: self._start(request, request.planned.prompt_tokens - 1),
            failed=lambda reason: self._descend(request),
        )
        request.asked, request.handoff = replica, handoff
        try:
            replica.ask(handoff)
        except Overloaded:
            self._descend(request)

    def _descend(self, request: Request) -> None:
        """The ladder's next rung: another replica, decode itself, or an error."""
        if request.asked is not None:
            request.excluded.add(request.asked.index)
        others = len(self._prefill) > len(request.excluded)
        rung = self._ladder.after(request.attempt, has_other_replica=others)
        self.num_fallbacks += 1
        request.attempt += 1
        if rung is FallbackRung.OTHER_REPLICA:
            self._hand_off(request)
        elif rung is FallbackRung.LOCAL:
            self._start(request, 0)
        else:
            self._end(request, "unavailable")

    def _start(self, request: Request, num_arrived: int) -> None:
        if request.sequence is None:
            return
        self.engine.scheduler.start(request.sequence, num_arrived)
        self.engine.kick()

    # --- the end --------------------------------------------------------------------------------------

    def _arrived(self, requests: Many[Request]) -> None:
        for request in requests:
            request.token_s.append(self._agenda.now_s)
            if len(request.token_s) == request.planned.max_tokens:
                self._end(request, None)

    def _end(self, request: Request, failure: str | None) -> None:
        self.num_ongoing -= 1
        del self._open[request.key]
        if request.sequence is not None:
            self.engine.scheduler.finish(request.sequence)
            self.engine.kick()
        request.failure = failure
        request.ended(request)
