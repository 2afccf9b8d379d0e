"""Whether anything grows: hours of mixed load against real servers, and what each process holds between its rounds.

    python tests/benchmarks/soak.py [--minutes 60] [--json FILE]

Starts what ``shoal serve`` starts, and asks it in rounds of mixed load (soak_load.py). After each round it waits until
nothing is held: no block, no lease, no request. Then it looks at each process: its memory, open files, threads, and
mappings of shared memory. Samples of the first part of the run are warm-up; the others must be flat (flatness.py).

Exits with 1 if something grew, stayed held, failed, or a process was replaced meanwhile, or if there were too few
samples to tell.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from clusters import TestCluster, cluster
from flatness import FEWEST, Trend, trend_of
from footprint import Footprint
from soak_load import MixedLoad, Tally
from texts import passages

from shoal.cluster.ports import free_port
from shoal.model.files import locate

MIB = float(1 << 20)
_HELD_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Quantity:
    """``allowance`` is how much more of it there may be at the end, and ``ratio`` the same as a share of what is."""

    name: str
    read: Callable[[Footprint], float]
    allowance: float
    ratio: float = 0.0

    def allowed(self, level: float) -> float:
        return max(self.allowance, self.ratio * level)


QUANTITIES = (
    Quantity("memory (MiB)", lambda it: it.memory_bytes / MIB, allowance=8.0, ratio=0.02),
    Quantity("open files", lambda it: float(it.num_files), allowance=1.5),
    Quantity("threads", lambda it: float(it.num_threads), allowance=1.5),
    Quantity("shared-memory mappings", lambda it: float(it.num_segments), allowance=0.5),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A process between two rounds. ``at_s`` counts from the first round."""

    at_s: float
    process: str
    pid: int
    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Verdict:
    process: str
    quantity: str
    trend: Trend
    allowed: float
    num_samples: int

    @property
    def grows(self) -> bool:
        return self.num_samples >= FEWEST and self.trend.grows(self.allowed)

    @property
    def says(self) -> str:
        if self.num_samples < FEWEST:
            return "too short"
        return "GROWS" if self.grows else "flat"


@dataclass(frozen=True, slots=True)
class Soak:
    """``faults`` are what isn't growth, and mustn't be either."""

    samples: tuple[Sample, ...]
    tally: Tally
    verdicts: tuple[Verdict, ...]
    faults: tuple[str, ...]

    @property
    def is_flat(self) -> bool:
        return not self.faults and not any(verdict.grows for verdict in self.verdicts)


def soak(minutes: float, round_s: float, warm_up: float, seed: int = 0) -> Soak:
    """Of ``minutes``, the share ``warm_up`` isn't judged. There is one replica of each pool, on shm."""
    grpc_port = free_port("127.0.0.1")
    reuse = {"reuse": "exact", "num_blocks": 512}
    with cluster(model={"dtype": "bfloat16"}, prefill=reuse, decode=reuse, gateway={"grpc_port": grpc_port}) as live:
        load = MixedLoad(live.url, f"127.0.0.1:{grpc_port}", _text_ids(), long_tokens=600, seed=seed)
        samples, faults = asyncio.run(_rounds(live, load, minutes * 60, round_s))
    begin_s = warm_up * minutes * 60
    verdicts = judge([sample for sample in samples if sample.at_s >= begin_s])
    faults += [*too_short(verdicts), *(f"{number} of {what}" for what, number in load.tally.failed.items())]
    return Soak(tuple(samples), load.tally, verdicts, tuple(faults))


async def _rounds(live: TestCluster, load: MixedLoad, seconds: float, round_s: float) -> tuple[list[Sample], list[str]]:
    samples: list[Sample] = []
    faults: list[str] = []
    begun_s = time.monotonic()
    for _ in track(range(max(4, round(seconds / round_s))), "soaking", console=Console(stderr=True)):
        await load.run(round_s)
        held = await asyncio.to_thread(_still_held, live)
        at_s = time.monotonic() - begun_s
        faults += [f"after {at_s:.0f} s there were {number:g} {what}" for what, number in held.items()]
        entries = live.live.replica_entries()
        samples += [Sample(at_s, entry.role, entry.pid, Footprint.of(entry.pid)) for entry in entries]
    if len({(sample.process, sample.pid) for sample in samples}) > len({sample.process for sample in samples}):
        faults.append("a process was replaced")
    return samples, faults


def _still_held(live: TestCluster) -> dict[str, float]:
    deadline_s = time.monotonic() + _HELD_WITHIN_S
    while (held := live.look().held()) and time.monotonic() < deadline_s:
        pass  # each look is a few HTTP requests
    return held


def judge(samples: Sequence[Sample]) -> tuple[Verdict, ...]:
    """Of each process and quantity."""
    verdicts = []
    for process in sorted({sample.process for sample in samples}):
        mine = [sample for sample in samples if sample.process == process]
        for quantity in QUANTITIES:
            trend = trend_of([one.at_s for one in mine], [quantity.read(one.footprint) for one in mine])
            verdicts.append(Verdict(process, quantity.name, trend, quantity.allowed(trend.level), len(mine)))
    return tuple(verdicts)


def too_short(verdicts: Sequence[Verdict]) -> list[str]:
    """The fault that a run is of which nothing can be told, or none."""
    if verdicts and all(one.num_samples >= FEWEST for one in verdicts):
        return []
    return [f"fewer than {FEWEST} rounds after the warm-up can't tell whether anything grows: more --minutes"]


def _text_ids() -> list[int]:
    ids: list[int] = locate("smollm2").tokenizer().encode(" ".join(passages().values()))
    return ids


# --- what is told ---------------------------------------------------------------------------------------

_COLUMNS = ("process", "what", "median", "rise", "allowed", "over (min)", "sigmas", "")


def _rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    return [
        (
            one.process, one.quantity, f"{one.trend.level:.1f}", f"{one.trend.rise:+.2f}", f"{one.allowed:.1f}",
            f"{one.trend.time_s / 60:.1f}", f"{one.trend.sigmas:.1f}", one.says,
        )
        for one in verdicts
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--round-s", type=float, default=15.0, help="Seconds of load between two samples.")
    parser.add_argument("--warm-up", type=float, default=0.25, help="Share of the time that isn't judged.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = soak(arguments.minutes, arguments.round_s, arguments.warm_up, arguments.seed)
    _show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    sys.exit(not result.is_flat)


def _show(result: Soak) -> None:
    console = Console()
    table = Table(*_COLUMNS)
    for row in _rows(result.verdicts):
        table.add_row(*row)
    console.print(table)
    console.print(f"{sum(result.tally.answered.values())} requests were answered as they should be")
    for fault in result.faults:
        console.print(f"fault: {fault}", markup=False)


if __name__ == "__main__":
    main()
