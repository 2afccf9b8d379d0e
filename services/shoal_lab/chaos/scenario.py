"""What can go wrong: each scenario says what it injects, and when it counts as recovered."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shoal.errors import ConfigError
from shoal_lab.chaos import injections
from shoal_lab.chaos.injections import NUM_RESETS, Inject
from shoal_lab.chaos.proxy import LinkFault
from shoal_lab.chaos.switchboard import FrameFault

if TYPE_CHECKING:
    from shoal.wire.messages import Role

ALL = "all"
_DELAY_S = 0.3
_SLOW_BYTES_PER_S = 8e6


class Sign(enum.StrEnum):
    """Of recovery; looked for from the moment the fault is over."""

    WHOLE = "every pool has all its replicas"
    ANSWER = "a request that was asked since was answered correctly"
    HANDOFF = "a prompt was handed over since"
    SAME_ADDRESS = "the new replica listens where the lost one did"


USUAL = frozenset({Sign.WHOLE, Sign.ANSWER, Sign.HANDOFF})


@dataclass(frozen=True, slots=True)
class Scenario:
    """``holds``: whether the fault lasts a while, or is a moment's. ``carrier`` is handoff.carrier."""

    name: str
    says: str
    inject: Inject
    holds: bool = False
    carrier: str = "inline"
    signs: frozenset[Sign] = USUAL
    changes_plan: bool = False


def _killed(role: Role, number: int | None = 1) -> Inject:
    return partial(injections.killed, role, number)


def _link(fault: LinkFault) -> Inject:
    return partial(injections.on_link, fault)


def _frames(fault: FrameFault) -> Inject:
    return partial(injections.on_frames, fault)


_CUT = {way: LinkFault(**dict.fromkeys(stops, True)) for way, stops in {
    "both": ("stops_up", "stops_down"), "to decode": ("stops_up",), "to prefill": ("stops_down",),
}.items()}  # fmt: skip

_OF_PROCESSES = (
    Scenario("kill-prefill", "kill -9 of a prefill replica", _killed("prefill")),
    Scenario("kill-prefill-pool", "kill -9 of all prefill replicas at once", _killed("prefill", None)),
    Scenario("kill-decode", "kill -9 of a decode replica", _killed("decode")),
    Scenario("kill-gateway", "kill -9 of the gateway", _killed("gateway")),
    Scenario("restart", "kill -9 of decode, restart on its address", _killed("decode"), signs=frozenset(Sign)),
    Scenario("pause-prefill", "a prefill replica stands still", partial(injections.paused, "prefill"), holds=True),
    Scenario("pause-decode", "a decode replica stands still", partial(injections.paused, "decode"), holds=True),
)
_OF_THE_NETWORK = (
    Scenario("partition", "nothing passes between the pools", _link(_CUT["both"]), holds=True),
    Scenario("partition-to-decode", "nothing passes from prefill to decode", _link(_CUT["to decode"]), holds=True),
    Scenario("partition-to-prefill", "nothing passes from decode to prefill", _link(_CUT["to prefill"]), holds=True),
    Scenario("delay", f"{_DELAY_S:g} s between the pools", _link(LinkFault(delay_s=_DELAY_S)), holds=True),
    Scenario(
        "slow-reader", f"decode reads {_SLOW_BYTES_PER_S / 1e6:g} MB/s",
        _link(LinkFault(bytes_per_s=_SLOW_BYTES_PER_S)), holds=True,
    ),
    Scenario("reset", f"all connections between the pools are reset, {NUM_RESETS} times", injections.reset),
    Scenario("half-open", "all connections between the pools are dead, unnoticed", injections.half_open),
)  # fmt: skip
_OF_FRAMES = (
    Scenario("truncate", "a tenth of the chunks is cut in half", _frames(FrameFault.TRUNCATE), holds=True),
    Scenario("bit-flip", "in a tenth of the chunks a bit flips", _frames(FrameFault.CORRUPT), holds=True),
    Scenario("drop", "a tenth of the frames is lost", _frames(FrameFault.DROP), holds=True),
    Scenario("duplicate", "a tenth of the frames comes twice", _frames(FrameFault.DUPLICATE), holds=True),
    Scenario("reorder", "a tenth of the frames is overtaken by the next", _frames(FrameFault.REORDER), holds=True),
)
_OF_THE_HOST = (
    Scenario("full-pool", "long prompts, more than decode's pools hold", injections.burst),
    Scenario("clock-jump", "all wall clocks jump an hour on, then two back", injections.clock_jump),
    Scenario("disk-full", "no file can be written, and both pools lose a replica", injections.disk_full),
    Scenario(
        "roll-plan", "replicas give way to others of another plan, and back", injections.rolled, changes_plan=True
    ),
)
_OF_SHARED_MEMORY = (
    Scenario("kill-prefill-shm", "kill-prefill, with payload in shared memory", _killed("prefill"), carrier="shm"),
    Scenario("kill-decode-shm", "kill-decode, with payload in shared memory", _killed("decode"), carrier="shm"),
    Scenario(
        "bit-flip-shm", "bit-flip, with payload in shared memory", _frames(FrameFault.CORRUPT), holds=True,
        carrier="shm",
    ),
    Scenario("drop-shm", "drop, with payload in shared memory", _frames(FrameFault.DROP), holds=True, carrier="shm"),
)  # fmt: skip
SCENARIOS = (*_OF_PROCESSES, *_OF_THE_NETWORK, *_OF_FRAMES, *_OF_THE_HOST, *_OF_SHARED_MEMORY)


def choose(names: str) -> tuple[Scenario, ...]:
    """``all``, or some with commas between them. Raises ConfigError for one that there isn't."""
    if names == ALL:
        return SCENARIOS
    known = {scenario.name: scenario for scenario in SCENARIOS}
    wanted = dict.fromkeys(name.strip() for name in names.split(","))
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"there is no scenario {unknown[0]!r}: there are {', '.join(known)}, and {ALL}")
    return tuple(known[name] for name in wanted)
