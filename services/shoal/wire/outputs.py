"""What decode generates to protobuf and back (proto/shoal/v1/worker.proto); what comes in is checked here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace

from google.protobuf.message import Message

from shoal.errors import ProtocolViolation
from shoal.v1 import inference_pb2, worker_pb2
from shoal.wire.messages import Depth, FinishReason, HandoffReport, TokenLogprob, TokenOutput, TtftStages
from shoal.wire.values import value_of

MAX_TOLD_TOKENS = 8192
"""Of a prompt's tokens and their alternatives, in one output: far below what a message may have."""

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
DEPTHS = {
    Depth.AUTO: inference_pb2.DEPTH_AUTO,
    Depth.SHALLOW: inference_pb2.DEPTH_SHALLOW,
    Depth.FULL: inference_pb2.DEPTH_FULL,
}
_FINISH_REASONS_BACK = {value: reason for reason, value in FINISH_REASONS.items()}
DEPTHS_BACK = {value: depth for depth, value in DEPTHS.items()}


def to_outputs(key: int, index: int, output: TokenOutput) -> Iterator[worker_pb2.Output]:
    """One message, or several where much is told of the prompt. ``index`` is the first one's."""
    told = output.prompt_logprobs
    size = max(1, MAX_TOLD_TOKENS // (1 + max((len(one.top) for one in told), default=0)))
    while len(told) > size:
        part, told = told[:size], told[size:]
        yield worker_pb2.Output(
            key=key, index=index, choice=output.choice, prompt_logprobs=to_logprobs(part), is_partial=True
        )
        index += 1
    is_text = isinstance(output.stop_reason, str)
    yield worker_pb2.Output(
        key=key,
        index=index,
        choice=output.choice,
        token_ids=output.token_ids,
        text=output.text,
        logprobs=to_logprobs(output.logprobs),
        finish_reason=to_finish_reason(output.finish_reason),
        stop=output.stop_reason if is_text else None,  # type: ignore[arg-type]
        stop_token_id=None if is_text else output.stop_reason,  # type: ignore[arg-type]
        stages=worker_pb2.TtftStages(**asdict(output.stages)) if output.stages else None,
        handoff=_to_report(output.handoff) if output.handoff else None,
        prompt_logprobs=to_logprobs(told),
    )


def to_finish_reason(reason: FinishReason | None) -> inference_pb2.FinishReason.ValueType:
    return inference_pb2.FINISH_REASON_UNSPECIFIED if reason is None else FINISH_REASONS[reason]


def to_logprobs(tokens: Iterable[TokenLogprob]) -> list[inference_pb2.TokenLogprob]:
    return [
        inference_pb2.TokenLogprob(
            token_id=one.token_id,
            token=one.token,
            logprob=one.logprob,
            top=[inference_pb2.TopToken(token_id=id_, token=token, logprob=logprob) for id_, token, logprob in one.top],
        )
        for one in tokens
    ]


class OutputReader:
    """Reads one request's messages in their order."""

    def __init__(self) -> None:
        self._num_read = 0
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.is_complete = False

    @property
    def has_begun(self) -> bool:
        return self._num_read > 0

    def read(self, message: worker_pb2.Output) -> TokenOutput | None:
        """``None`` for a part of what comes next, and for the end. Raises ProtocolViolation if one is missing or it
        isn't well formed."""
        if message.index != self._num_read or self.is_complete:
            raise ProtocolViolation(f"output {message.index} of a request came as its number {self._num_read}")
        self._num_read += 1
        if message.is_end:
            self.is_complete = True
            return None
        self._prompt_logprobs += _from_logprobs(message.prompt_logprobs)
        if message.is_partial:
            return None
        told, self._prompt_logprobs = self._prompt_logprobs, ()
        return _from_output(message, told)


def _from_output(message: worker_pb2.Output, prompt_logprobs: tuple[TokenLogprob, ...]) -> TokenOutput:
    which = message.WhichOneof("stop_reason")
    return TokenOutput(
        choice=value_of(message, "choice"),
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_from_logprobs(message.logprobs),
        finish_reason=_from_finish_reason(message.finish_reason),
        stop_reason=None if which is None else getattr(message, which),
        stages=_from_stages(message.stages) if message.HasField("stages") else None,
        handoff=_from_report(message.handoff) if message.HasField("handoff") else None,
        prompt_logprobs=prompt_logprobs,
    )


def _from_logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            one.token_id, one.token, _logprob(one), tuple((top.token_id, top.token, _logprob(top)) for top in one.top)
        )
        for one in messages
    )


def _from_finish_reason(value: inference_pb2.FinishReason.ValueType) -> FinishReason | None:
    if value and value not in _FINISH_REASONS_BACK:
        raise ProtocolViolation(f"output.finish_reason is {value}, which this version doesn't know")
    return _FINISH_REASONS_BACK.get(value)


def _from_stages(message: worker_pb2.TtftStages) -> TtftStages:
    return TtftStages(**{field.name: _seconds(message, field.name) for field in fields(TtftStages)})


def _to_report(report: HandoffReport) -> worker_pb2.HandoffReport:
    return worker_pb2.HandoffReport(**asdict(replace(report, depth=DEPTHS[report.depth])))  # type: ignore[arg-type]


def _from_report(message: worker_pb2.HandoffReport) -> HandoffReport:
    depth = DEPTHS_BACK.get(message.depth)
    if depth is None:
        raise ProtocolViolation(f"output.handoff.depth is {message.depth}, which this version doesn't know")
    counts = ("num_prefill_layers", "shallow_bytes", "deep_bytes", "boundary_bytes", "num_cached_tokens")
    return HandoffReport(
        depth,
        message.transferred,
        message.fallback if message.HasField("fallback") else None,
        **{name: value_of(message, name) for name in counts},
        # A decode replica of an earlier release doesn't know these.
        hidden_bytes=message.hidden_bytes,
        plan_hash=message.plan_hash,
    )


# --- one value ------------------------------------------------------------------------------------------


def _seconds(message: Message, name: str) -> float:
    value: float = value_of(message, name)
    # Differences of two clocks' readings may be a little below 0; what isn't a number is a defect.
    if not math.isfinite(value):
        raise ProtocolViolation(f"{message.DESCRIPTOR.name}.{name} is {value}: not a duration")
    return value


def _logprob(message: inference_pb2.TokenLogprob | inference_pb2.TopToken) -> float:
    value: float = value_of(message, "logprob")
    if math.isnan(value) or value > 0:
        raise ProtocolViolation(f"{message.DESCRIPTOR.name}.logprob is {value}: not the logarithm of a probability")
    return value
