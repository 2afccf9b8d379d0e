"""The rounds of a comparison: each arm started, measured and stopped, one at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from arms import Arm, Mode
from child import ChildFailed, last_words, serving
from comparison import Comparison, Measured, best_mode
from load import Loads
from measurement import Figures, WrongAnswer, measure
from rich.progress import Progress

from shoal.cluster.ports import free_port
from shoal.errors import ShoalError

_START_WITHIN_S = 400.0
_BUSY_SECONDS = 1.0


class Rounds:
    """The arms of a run, one at a time, with a bar that shows how far it is."""

    def __init__(
        self, comparison: Comparison, loads: Loads, scratch: Path, progress: Progress, num_rounds: int
    ) -> None:
        self._comparison, self._loads, self._scratch, self._progress = comparison, loads, scratch, progress
        self._num_rounds = num_rounds
        self._bar = progress.add_task("", total=0)

    def choose_modes(self, only: Mode | None) -> None:
        """Fill in each arm's mode; an arm that fails in all of them has failed."""
        for measured in self._alive():
            own = measured.arm.modes
            modes = (only,) if only in own else own  # who hasn't that one is tried in its own
            self._grow(len(modes) if len(modes) > 1 else 0)
            if len(modes) == 1:
                measured.mode = modes[0]
                continue
            for mode in modes:
                measured.trials[mode] = self._try(measured.arm, mode, "pre-run", samples=1, streams=self._few_streams)
            measured.mode = best_mode(measured.trials, self._comparison.metrics)
            if measured.mode is None:
                measured.failure = next(why for why in measured.trials.values() if isinstance(why, str))
            self._say(f"{measured.arm.name}: {measured.mode or 'failed in every mode'}")

    def round(self, number: int) -> None:
        alive = self._alive()
        if not alive:
            return
        self._comparison.busy[number] = _busy_share(_BUSY_SECONDS)
        turn = (number - 1) % len(alive)
        options = self._loads.options
        for measured in alive[turn:] + alive[:turn]:
            assert measured.mode is not None
            key = f"round {number}"
            figures = self._try(measured.arm, measured.mode, key, samples=options.samples, streams=options.streams)
            if isinstance(figures, str):
                measured.retries[number] = figures
                self._say(f"{measured.arm.name}, once more in round {number}: {figures}")
                self._grow(1)
                figures = self._try(measured.arm, measured.mode, key, samples=options.samples, streams=options.streams)
            if isinstance(figures, str):
                measured.failure = figures
                self._say(f"{measured.arm.name} failed: {figures}")
                self._grow(number - self._num_rounds)  # its further rounds won't be
            else:
                measured.rounds[number] = figures

    @property
    def _few_streams(self) -> tuple[int, ...]:
        return self._loads.options.streams[:1]

    def _alive(self) -> list[Measured]:
        return [measured for measured in self._comparison.measured.values() if measured.failure is None]

    def _try(self, arm: Arm, mode: Mode, key: str, *, samples: int, streams: Sequence[int]) -> Figures | str:
        """The figures, or why there are none. Ctrl-C ends the server, too, and goes on."""
        port = free_port("127.0.0.1")
        url, log = f"http://127.0.0.1:{port}", self._scratch / "server.log"
        environment = arm.environment(mode)

        def on_step(step: str) -> None:
            self._progress.update(self._bar, description=f"{key}: {arm.name} ({mode}), {step}")

        on_step("starting")
        try:
            with serving(arm.command(mode, port), environment, log, url, arm.health, _START_WITHIN_S) as start_s:
                return asyncio.run(
                    measure(
                        arm, url, self._loads, key, start_s=start_s, samples=samples, streams=streams, on_step=on_step
                    )
                )
        except (ChildFailed, OSError, httpx.HTTPError) as error:
            return str(error) or type(error).__name__
        except (WrongAnswer, ShoalError) as error:
            return f"{error}; its last words: {last_words(log)}"
        finally:
            self._progress.advance(self._bar)

    def grow_by_rounds(self) -> None:
        self._grow(self._num_rounds * len(self._alive()))

    def _grow(self, number: int) -> None:
        total = self._progress.tasks[0].total or 0
        self._progress.update(self._bar, total=total + number)

    def _say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)


def _busy_share(seconds: float) -> float:
    """Of all cores, used by others while this process sleeps."""
    before = _cpu_ticks()
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(_cpu_ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def _cpu_ticks() -> tuple[int, int]:
    """Idle, and in all, since the machine started."""
    line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    ticks = [int(field) for field in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
