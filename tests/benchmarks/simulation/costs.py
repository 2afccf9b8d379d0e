"""What steps cost on some machine: measured by tests/benchmarks/step_costs.py, or written down by hand.

::

    prefill step   step_s + token_s * tokens + token_context_s * Σ (a token * what it sees)
                          + context_token_s * Σ (what each piece of a prompt reads)          for each skip count
    decode step    step_s + sequence_s * sequences beyond free_sequences + context_token_s * Σ (what each sequence sees)
    hand-off       latency_s + bytes / bytes_per_s, of which the next chunks' computing hides all but the tail
    serving        request_s once a request; step_s + token_s * tokens for what a decode step sends to clients

All in seconds, tokens and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.engine.scheduler import ScheduledRows
from shoal.errors import ConfigError

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PrefillCost(_Frozen):
    """Of a step that runs pieces of prompts through the layers that ``skip_layers`` leaves."""

    skip_layers: Annotated[int, Field(ge=0)]
    step_s: Seconds
    token_s: Seconds
    token_context_s: Seconds
    context_token_s: Seconds = 0.0

    def seconds(self, pieces: Iterable[tuple[int, int]]) -> float:
        """Of one step that runs the tokens ``[start, end)`` of these prompts."""
        pieces = list(pieces)
        num_tokens, num_read = sum(end - start for start, end in pieces), sum(end for _, end in pieces)
        num_seen = math.fsum(seen(start, end) for start, end in pieces)
        of_tokens = self.token_s * num_tokens + self.token_context_s * num_seen
        return self.step_s + of_tokens + self.context_token_s * num_read

    def prompt_seconds(self, num_tokens: int, chunk: int) -> float:
        """Of a prompt's steps, one after the other, of ``chunk`` tokens each but the last."""
        starts = range(0, num_tokens, chunk)
        return math.fsum(self.seconds([(start, min(start + chunk, num_tokens))]) for start in starts)


class DecodeCost(_Frozen):
    """Of a step that gives each of its sequences one token, at full depth.

    While weights are read, ``free_sequences`` are multiplied by them.
    """

    step_s: Seconds
    sequence_s: Seconds
    context_token_s: Seconds
    free_sequences: Annotated[int, Field(ge=0)] = 0

    def seconds(self, num_sequences: int, num_context_tokens: int) -> float:
        num_charged = max(0, num_sequences - self.free_sequences)
        return self.step_s + self.sequence_s * num_charged + self.context_token_s * num_context_tokens


class HandoffCost(_Frozen):
    """``latency_s`` is all that doesn't depend on the bytes: Serve's call, claim, seal, commit.

    ``bytes_per_s`` is that of each replica's way out, and of its way in. ``token_bytes``: K/V of a token in all layers.
    """

    latency_s: Seconds
    bytes_per_s: Annotated[float, Field(gt=0)]
    token_bytes: Annotated[int, Field(ge=1)]


class ServingCost(_Frozen):
    """What isn't the engines': client, gateway, event loops. Where cores are shared, it is one thread's work."""

    request_s: Seconds
    step_s: Seconds
    token_s: Seconds


class SharingCost(_Frozen):
    """A machine whose replicas share its cores: how many there are, and how many threads a replica's steps run.

    ``efficiency`` is what two stages that compute at once get done, over what one of them would in the same time.
    """

    cores: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    efficiency: Annotated[float, Field(gt=0, le=2)]


class FitQuality(_Frozen):
    """How far a formula is from the ``num`` times that it was fitted to, as shares of these."""

    num: Annotated[int, Field(ge=1)]
    median_error: Seconds
    max_error: Seconds


class StepCosts(_Frozen):
    """``pool_tokens`` is how many tokens' K/V a replica's memory holds, where its configuration doesn't say."""

    format: Literal[1]
    machine: str
    model: str
    num_layers: Annotated[int, Field(ge=1)]
    prefill: Annotated[tuple[PrefillCost, ...], Field(min_length=1)]
    decode: DecodeCost
    handoff: HandoffCost
    serving: ServingCost
    prefill_pool_tokens: Annotated[int, Field(ge=1)]
    decode_pool_tokens: Annotated[int, Field(ge=1)]
    sharing: SharingCost | None = None
    fits: dict[str, FitQuality] = {}
    samples: dict[str, list[dict[str, Any]]] = {}

    @model_validator(mode="after")
    def _skips_once(self) -> StepCosts:
        skips = self.skips
        if len(set(skips)) < len(skips):
            raise ValueError("prefill has one skip_layers twice")
        if max(skips) >= self.num_layers:
            raise ValueError(f"prefill skips {max(skips)} of {self.num_layers} layers: one must be left")
        return self

    @property
    def skips(self) -> tuple[int, ...]:
        return tuple(one.skip_layers for one in self.prefill)

    def of_skip(self, skip_layers: int) -> PrefillCost:
        """Raises ConfigError."""
        for one in self.prefill:
            if one.skip_layers == skip_layers:
                return one
        known = ", ".join(map(str, self.skips))
        raise ConfigError(f"the costs know nothing of {skip_layers} skipped layers, only of {known}: measure it, too")

    def to_json(self) -> str:
        return self.model_dump_json(indent=2, exclude_none=True) + "\n"


def read_costs(path: Path) -> StepCosts:
    """Raises ConfigError that names each wrong key."""
    try:
        return StepCosts.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"can't read the step costs {path} ({error}): measure them by tests/benchmarks/step_costs.py"
        ) from error
    except ValidationError as error:
        lines = (f"  {'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"the step costs {path} are refused:\n" + "\n".join(lines)) from error


def prefill_step_s(cost: PrefillCost, rows: Iterable[ScheduledRows]) -> float:
    """Of a step of prefill."""
    return cost.seconds((row.start, row.end) for row in rows)


def decode_step_s(cost: DecodeCost, local: PrefillCost, rows: Iterable[ScheduledRows]) -> float:
    """Of a step of decode, which may have pieces of prompts in it that nobody else computed. ``step_s`` counts once."""
    rows = list(rows)
    single = [row for row in rows if row.num_rows == 1]
    chunks = [row for row in rows if row.num_rows > 1]
    seconds = cost.seconds(len(single), sum(row.end for row in single)) if single else 0.0
    if chunks:
        seconds += local.seconds((row.start, row.end) for row in chunks)
    return seconds - (min(cost.step_s, local.step_s) if single and chunks else 0.0)


def seen(start: int, end: int) -> float:
    """Pairs of a token in ``[start, end)`` and a token that it sees, itself included."""
    return (end - start) * (start + end + 1) / 2
