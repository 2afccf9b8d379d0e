"""What crosses wires and reaches Ray's head, counted from the code's own rules, for pools of any size.

One application is one gateway, one pool of each kind, and a session for every pair of a prefill and a decode replica.
A large fleet may be one application, or many small ones side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from simulation.costs import StepCosts
from simulation.plan import Outcome

from shoal.config import ShoalConfig
from shoal_lab.bench.mix import RequestClass

# A test compares these with what they are taken from.
BEATS_PER_TTL = 3  # transfer/session.py, from each side of a session
ASKED_EVERY_S = 1.0  # directory.py: how often a process that routes asks who lives
HEALTH_CHECK_PERIOD_S = 1.0  # app/graph.py
_NUM_GATEWAYS = 1  # app/graph.py
_FRAMES_PER_LEASE = 5  # Granted, Claim, Accepted, Seal, Committed
READS_PER_LISTING = 3  # directory.py: the keys, all their entries, and the names of all actors


@dataclass(frozen=True, slots=True)
class Work:
    """What an application of ``num_prefill`` and ``num_decode`` replicas does in a second.

    ``prompt_tokens`` is the mean of the prompts that are handed off, which are the share ``handed_off`` of all.
    """

    num_prefill: int
    num_decode: int
    requests_per_s: float
    prompt_tokens: float
    output_tokens: float
    decode_steps_per_s: float
    handed_off: float = 1.0

    @classmethod
    def of(cls, outcome: Outcome, mix: Sequence[RequestClass], config: ShoalConfig) -> Work | None:
        """At its goodput, as simulated; ``None`` where there is none."""
        found = outcome.at_goodput
        if found is None:
            return None
        handed_off, prompt_tokens = _handed_off(mix, max(2, config.handoff.min_tokens))
        return cls(
            outcome.fleet.num_prefill, outcome.fleet.num_decode, outcome.goodput, prompt_tokens,
            found.level.overall.output_tokens or 0.0, found.usage.num_decode_steps / found.usage.window_s, handed_off,
        )  # fmt: skip

    def times(self, factor: float) -> Work:
        """The same ratio, as near as whole replicas come to it, and the same work for each, in an application that is
        ``factor`` times as large, or as small as its pools may be."""
        least = 2 if self.num_prefill else 1
        total = max(least, round(factor * (self.num_prefill + self.num_decode)))
        num_prefill = min(max(1, round(factor * self.num_prefill)), total - 1) if self.num_prefill else 0
        return replace(
            self,
            num_prefill=num_prefill,
            num_decode=total - num_prefill,
            requests_per_s=self.requests_per_s * factor,
            decode_steps_per_s=self.decode_steps_per_s * factor,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one application, a second. ``out`` and ``into`` are one replica's; ``ray`` counts what Ray's head is asked."""

    wire_bytes: float
    wire_bytes_out: float
    wire_bytes_into: float
    frames: float
    num_sessions: int
    beats: float
    beats_into_decode: float
    handle_calls: float
    token_messages: float
    serving_cores: float
    """Cores that client, gateway and event loops would keep busy, by the costs' ``serving``."""
    num_ray_entries: int
    ray_reads: float
    ray_entries_read: float
    """What those reads bring."""
    health_checks: float


def traffic(work: Work, costs: StepCosts, config: ShoalConfig) -> Traffic:
    """By the rules of hand-off, token stream and directory. Where nothing is prefilled apart, nothing is shipped."""
    num_prefill, num_decode, rate = work.num_prefill, work.num_decode, work.requests_per_s
    handoffs = rate * work.handed_off if num_prefill else 0.0
    prompt_bytes = max(0.0, work.prompt_tokens - 1) * costs.handoff.token_bytes
    handoff = config.handoff
    chunk_bytes = handoff.max_frame_bytes if handoff.carrier == "inline" else handoff.slot_bytes
    frames = _FRAMES_PER_LEASE + 2 * math.ceil(prompt_bytes / chunk_bytes)  # Chunk, Credit
    beats_each_way = BEATS_PER_TTL / config.handoff.ttl_s
    num_sessions = num_prefill * num_decode
    tokens = rate * work.output_tokens
    return Traffic(
        wire_bytes=handoffs * prompt_bytes,
        wire_bytes_out=handoffs * prompt_bytes / max(1, num_prefill),
        wire_bytes_into=handoffs * prompt_bytes / num_decode,
        frames=handoffs * frames,
        num_sessions=num_sessions,
        beats=2 * beats_each_way * num_sessions,
        beats_into_decode=beats_each_way * num_prefill,
        handle_calls=rate + handoffs,  # gateway -> decode, decode -> prefill
        token_messages=min(tokens, _NUM_GATEWAYS * work.decode_steps_per_s),
        serving_cores=(
            rate * costs.serving.request_s
            + work.decode_steps_per_s * costs.serving.step_s
            + tokens * costs.serving.token_s
        ),
        num_ray_entries=num_prefill + num_decode + _NUM_GATEWAYS,
        ray_reads=(num_decode + _NUM_GATEWAYS) * READS_PER_LISTING / ASKED_EVERY_S,
        ray_entries_read=(num_decode * num_prefill + _NUM_GATEWAYS * num_decode) / ASKED_EVERY_S,
        health_checks=(num_prefill + num_decode + _NUM_GATEWAYS) / HEALTH_CHECK_PERIOD_S,
    )  # fmt: skip


def _handed_off(mix: Sequence[RequestClass], min_tokens: int) -> tuple[float, float]:
    """The share of prompts with so many tokens at least, and their mean; a class's lengths are drawn evenly."""
    share = tokens = 0.0
    for one in mix:
        low, high = one.prompt_tokens
        least = max(low, min_tokens)
        weight = one.share * max(0, high + 1 - least) / (high + 1 - low)
        share += weight
        tokens += weight * (least + high) / 2
    return share / sum(one.share for one in mix), tokens / share if share else 0.0
