"""Requests under way: as many as are wanted, by the gRPC client, each judged as it ends."""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from shoal.client import AsyncClient
from shoal.errors import DeadlineExceeded, PeerGone, ShoalError
from shoal_lab.chaos.cases import Case
from shoal_lab.chaos.truth import Truths, is_right
from shoal_lab.chaos.waiting import until

_GRACE_S = 5.0


class End(enum.StrEnum):
    """How a request ended."""

    CORRECT = "correct"
    ERROR = "error"
    """The server said what was wrong, and no token before it was."""
    CUT_OFF = "cut_off"
    """The connection to the gateway broke, or there was none."""
    WRONG = "wrong"
    HUNG = "hung"
    """Its deadline passed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are the event loop's."""

    case: str
    end: End
    started_s: float
    ended_s: float
    error: ShoalError | None = None


class Load:
    """Made by ``loading``. A lane asks one case after the other, whichever is next for all of them."""

    def __init__(self, client: AsyncClient, target: str, truths: Truths, deadline_s: float) -> None:
        self._client = client
        self._target = target
        self._truths = truths
        self._deadline_s = deadline_s
        self._is_over = False
        self._changed = asyncio.Event()
        self.num_open = 0
        self.outcomes: list[Outcome] = []

    async def ask(self, case: Case) -> Outcome:
        """One request, from its first byte to its end."""
        clock = asyncio.get_running_loop()
        started_s, token_ids = clock.time(), list[int]()
        error: ShoalError | None = None
        self.num_open += 1
        self._tell()
        try:
            async with asyncio.timeout(self._deadline_s + _GRACE_S):
                await self._read(case, token_ids)
            end = End.CORRECT
        except TimeoutError:
            end, error = End.HUNG, DeadlineExceeded("nothing was heard of it")
        except ShoalError as raised:
            end, error = self._end_of(raised), raised
        finally:
            self.num_open -= 1
        if not is_right(self._truths[case.name], token_ids, is_complete=end is End.CORRECT):
            end = End.WRONG
        outcome = Outcome(case.name, end, started_s, clock.time(), error)
        self.outcomes.append(outcome)
        self._tell()
        return outcome

    def _end_of(self, error: ShoalError) -> End:
        if isinstance(error, DeadlineExceeded):
            return End.HUNG
        is_cut_off = isinstance(error, PeerGone) and error.message.startswith(self._target)
        return End.CUT_OFF if is_cut_off else End.ERROR

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the requests under way, or those that have ended, are such that ``holds``."""
        while not holds():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _read(self, case: Case, token_ids: list[int]) -> None:
        """Adds to ``token_ids`` what comes, so that it's there if no more does."""
        if not case.is_streamed:
            completion = await self._client.generate(case.prompt_token_ids, timeout_s=self._deadline_s, **case.options)
            token_ids += completion.choices[0].token_ids
            return
        async for delta in self._client.stream(case.prompt_token_ids, timeout_s=self._deadline_s, **case.options):
            token_ids += delta.token_ids

    async def run_lane(self, cases: itertools.cycle[Case]) -> None:
        while not self._is_over:
            outcome = await self.ask(next(cases))
            if outcome.error is not None:
                await asyncio.sleep(outcome.error.retry_after_s or 0)
                await self._until_ready()

    async def _until_ready(self) -> None:
        """Who was refused comes again when there is something to come to."""

        async def is_ready() -> bool:
            return self._is_over or await self._client.is_ready(timeout_s=_GRACE_S)

        await until(is_ready)

    def stop(self) -> None:
        """Ask nothing more; what is under way goes on to its end."""
        self._is_over = True


@asynccontextmanager
async def loading(
    target: str, cases: Sequence[Case], truths: Truths, *, num_in_flight: int, deadline_s: float
) -> AsyncIterator[Load]:
    """``num_in_flight`` requests, at all times. On leaving, all that are under way have ended."""
    # One attempt each: what a retry would hide is to be seen.
    async with AsyncClient(target, timeout_s=deadline_s, max_attempts=1) as client:
        load, turns = Load(client, target, truths, deadline_s), itertools.cycle(cases)
        lanes = [asyncio.create_task(load.run_lane(turns)) for _ in range(num_in_flight)]
        try:
            yield load
            load.stop()
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*lanes, return_exceptions=True)
