"""An engine whose scheduler is the real one and whose forward takes only time."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from simulation.agenda import Agenda
from simulation.cores import Cores

from shoal.engine.scheduler import ScheduledRows, Scheduler, StepPlan
from shoal.engine.sequence import Sequence
from shoal.engine.yielding import NEVER, Yielding
from shoal.wire.messages import SamplingParams


class Stage(Protocol):
    """Whose engine it is."""

    def step_s(self, rows: tuple[ScheduledRows, ...]) -> float:
        """What the step costs on idle cores (seconds)."""
        ...

    def reserved(self, sequence: Sequence) -> None:
        """It holds blocks for its whole prompt now."""
        ...

    def stepped(self, plan: StepPlan) -> None:
        """The rows' K/V are there."""
        ...

    def wants_blocks(self) -> None:
        """A running sequence needs blocks that reserved ones hold."""
        ...


class SimulatedEngine:
    """One step after the other, as long as there is anything to run.

    As in the real one, what is admitted is told at once, not after the forward of others that follows; commands that
    come during a step count from the next one on; and it yields as that one does.
    """

    def __init__(
        self, agenda: Agenda, cores: Cores, threads: int, scheduler: Scheduler, stage: Stage, *,
        niceness: int = 0, yielding: Yielding = NEVER,
    ) -> None:  # fmt: skip
        self.scheduler = scheduler
        self.num_steps = 0
        self.num_tokens = 0
        """Rows computed."""
        self.busy_s = 0.0
        self._agenda, self._cores, self._threads, self._stage = agenda, cores, threads, stage
        self._niceness, self._yielding, self._began_s = niceness, yielding, 0.0
        self._runs = self._is_called = False

    def kick(self) -> None:
        """Something changed: look whether a step can run, once all else of this moment has happened."""
        if not self._runs and not self._is_called:
            self._is_called = True
            self._agenda.after(0.0, self._look)

    def _look(self) -> None:
        wait_s = self._yielding.wait_s(self.scheduler, self._began_s, self._agenda.now_s)
        if wait_s > 0:  # unless something changes meanwhile, which is looked at at once
            self._is_called = False
            self._agenda.after(wait_s, self.kick)
        else:
            self._begin()

    def _begin(self) -> None:
        # What is told of reservations may call again: that is before the step that begins now.
        for sequence in self.scheduler.admit():
            self._stage.reserved(sequence)
        self._is_called = False
        plan = self.scheduler.schedule()
        if plan.rows:
            self._runs, self._began_s = True, self._agenda.now_s
            step_s = self._stage.step_s(plan.rows)
            self._cores.run(self._threads, step_s, lambda: self._end(plan), niceness=self._niceness)
        elif plan.wants_blocks:
            self._stage.wants_blocks()

    def _end(self, plan: StepPlan) -> None:
        took_s = self._agenda.now_s - self._began_s
        self._runs = False
        self.num_steps += 1
        self.num_tokens += plan.num_rows
        self.busy_s += took_s
        self.scheduler.pace.saw(plan.num_rows, took_s)
        for row in plan.rows:
            row.sequence.advance(row.end)
            if not row.sequence.sampled:
                row.sequence.ready_to_send(row.end)
        self._stage.stepped(plan)
        if plan.wants_blocks:
            self._stage.wants_blocks()
        self.kick()


def make_sequence(
    key: str, num_prompt_tokens: int, num_output_tokens: int, *, is_shallow: bool, hold: bool, sampled: bool
) -> Sequence:
    """A prompt that nobody reads: only its length counts."""
    shallow = range(num_prompt_tokens - 1 if is_shallow else 0)
    sampling = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)
    return Sequence(key, _zeros(num_prompt_tokens), shallow, sampling, hold=hold, sampled=sampled)


@lru_cache(maxsize=4096)
def _zeros(num: int) -> tuple[int, ...]:
    return (0,) * num
