"""A prefill replica: holds blocks, computes chunk by chunk, and sends each one while the next is computed.

Its ways are those of prefill/worker.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulation.cores import Cores
from simulation.costs import prefill_step_s
from simulation.engine import SimulatedEngine, make_sequence
from simulation.link import Link, send
from simulation.setting import Setting

from shoal.engine.scheduler import ScheduledRows, StepPlan
from shoal.engine.sequence import Phase, Sequence


@dataclass(eq=False, slots=True)
class Handoff:
    """One prompt on its way. ``arrived`` is called when decode may start, ``failed`` with a reason if it never will."""

    key: str
    num_prompt_tokens: int
    into: Link
    arrived: Callable[[], None]
    failed: Callable[[str], None]
    sequence: Sequence | None = None
    is_over: bool = False

    @property
    def is_claimed(self) -> bool:
        return self.sequence is not None and self.sequence.phase is not Phase.WAITING


class PrefillReplica:
    def __init__(self, index: int, setting: Setting, cores: Cores) -> None:
        self.index = index
        self.num_ongoing = 0
        self.engine = SimulatedEngine(
            setting.agenda, cores, setting.threads, setting.prefill_scheduler(), self, niceness=setting.prefill_niceness
        )
        self.out = Link(setting.costs.handoff.bytes_per_s)
        self._agenda, self._cost, self._handoff = setting.agenda, setting.prefill_cost, setting.costs.handoff
        self._claim_timeout_s = setting.config.handoff.claim_timeout_s
        self._open: dict[str, Handoff] = {}

    def ask(self, handoff: Handoff) -> None:
        """Take a prompt in. Raises Overloaded if too many wait already."""
        num_tokens, is_shallow = handoff.num_prompt_tokens, self._cost.skip_layers > 0
        sequence = make_sequence(handoff.key, num_tokens, 1, is_shallow=is_shallow, hold=True, sampled=False)
        self.engine.scheduler.submit(sequence)
        handoff.sequence = sequence
        self._open[handoff.key] = handoff
        self.num_ongoing += 1
        self._agenda.after(self._claim_timeout_s, lambda: self._lose_patience(handoff))
        self.engine.kick()

    def cancel(self, handoff: Handoff) -> None:
        """Decode no longer wants it; after the end, a no-op."""
        self._end(handoff)

    # --- what the engine tells ------------------------------------------------------------------------

    def step_s(self, rows: tuple[ScheduledRows, ...]) -> float:
        return prefill_step_s(self._cost, rows)

    def reserved(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.RESERVED:  # not cancelled meanwhile
            self.engine.scheduler.start(sequence, 0)
            self.engine.kick()

    def stepped(self, plan: StepPlan) -> None:
        for row in plan.rows:
            handoff = self._open.get(row.sequence.request_id)
            if handoff is not None:
                self._send(handoff, row)

    def wants_blocks(self) -> None:
        """Prefill reserves a whole prompt's blocks before it runs any of it: it never wants more."""

    # --- helpers --------------------------------------------------------------------------------------

    def _send(self, handoff: Handoff, row: ScheduledRows) -> None:
        num_bytes = row.num_rows * self._handoff.token_bytes
        left_s, arrived_s = send(num_bytes, self.out, handoff.into, self._agenda.now_s)
        self._agenda.at(left_s, lambda: self._sent(row.sequence))
        if row.completes:
            self._agenda.at(arrived_s + self._handoff.latency_s, lambda: self._commit(handoff))

    def _sent(self, sequence: Sequence) -> None:
        sequence.num_unsent -= 1
        self.engine.kick()

    def _commit(self, handoff: Handoff) -> None:
        if not handoff.is_over:
            self._end(handoff)
            handoff.arrived()

    def _lose_patience(self, handoff: Handoff) -> None:
        if not handoff.is_over and not handoff.is_claimed:
            self._end(handoff)
            handoff.failed("prefill_queue_timeout")

    def _end(self, handoff: Handoff) -> None:
        if handoff.is_over or handoff.sequence is None:
            return
        handoff.is_over = True
        self.num_ongoing -= 1
        del self._open[handoff.key]
        self.engine.scheduler.finish(handoff.sequence)
        self.engine.kick()
