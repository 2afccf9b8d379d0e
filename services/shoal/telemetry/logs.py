"""Structured logs on stderr: JSON for machines, a coloured line for people.

Shoal's modules log through the standard ``logging`` or through structlog; both end in the same lines, with the
request's id in each. What clients write never gets into a log: fields are named in ``FIELDS``, and any other field
is replaced by ``(withheld)``. Messages are constant text; what varies is a field, or an argument without client text.
Of an exception, its class is told and where it came from, whoever logs it: its own text may quote a prompt.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# Every field a log line can carry. No field holds prompt text, output text or token ids.
FIELDS = frozenset(
    {
        "event", "level", "logger", "timestamp", "exception", "stack",
        "request_id", "lease_id", "traceparent", "tenant", "model", "endpoint", "depth", "attempt",
        "role", "replica_id", "peer", "address", "port", "plan_hash", "incarnation",
        "status", "code", "param", "reason", "carrier", "wire_mode", "check", "rung", "state", "signal",
        "num_prompt_tokens", "num_output_tokens", "num_choices", "num_layers", "num_blocks", "num_replicas",
        "num_segments", "num_gpus", "device", "dtype", "weights",
        "duration_s", "ttft_s", "queue_s", "prefill_s", "transfer_s", "timeout_s", "num_bytes",
    }
)  # fmt: skip
WITHHELD = "(withheld)"

# Libraries that talk at INFO about every request or file.
_NOISY = (
    "asyncio", "filelock", "grpc", "h11", "hpack", "httpcore", "httpx", "ray", "transformers", "urllib3",
    "uvicorn.access",
)  # fmt: skip

# It tells of clients that speak no HTTP, and of answers that were cut at the end, as of errors; its own end is raised.
_SILENT = ("uvicorn.error",)


def configure_logging(
    level: Literal["debug", "info", "warning", "error"] = "info",
    line_format: Literal["console", "json"] = "json",
    stream: TextIO | None = None,
    *,
    error_text: bool = False,
) -> None:
    """Send all logs of this process to ``stream`` (stderr by default). Calling again replaces the former setting.

    With ``error_text``, exceptions are told with their own text.
    """
    out = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                withhold_unknown_fields,
                *(() if error_text else (withhold_objects,)),
                *_renderers(line_format, told if error_text else outline, colors=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    threading.excepthook = _log_ended_thread
    sys.unraisablehook = _log_ignored
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _log_ended_thread(ended: threading.ExceptHookArgs) -> None:
    logging.getLogger(__name__).error("a thread ended", exc_info=ended.exc_value)


def _log_ignored(ignored: sys.UnraisableHookArgs) -> None:
    logging.getLogger(__name__).error("an exception that nobody could be told", exc_info=ignored.exc_value)


def _renderers(
    line_format: Literal["console", "json"], text_of: Callable[[BaseException], str], *, colors: bool
) -> list[Processor]:
    if line_format == "console":

        def write(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
            stream.write("\n" + text_of(exc_info[1]))

        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=write)]
    render = structlog.processors.ExceptionRenderer(lambda exc_info: text_of(exc_info[1]))
    return [render, structlog.processors.JSONRenderer()]


def withhold_unknown_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace every field that ``FIELDS`` doesn't name."""
    return {key: value if key in FIELDS or key == "exc_info" else WITHHELD for key, value in event.items()}


def withhold_objects(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Of what asyncio itself says of a task or a callback that failed: how it is written holds its exception's text."""
    if event.get("logger") == "asyncio":
        event["event"] = str(event["event"]).partition("\n")[0].partition("(")[0]
    return event


def told(error: BaseException) -> str:
    """As Python prints it."""
    return "".join(traceback.format_exception(error)).rstrip()


def outline(error: BaseException) -> str:
    """The same without any exception's own text. It has no local variables either, as the pretty tracebacks do."""
    return "\n".join(_outlined(error, set()))


def _outlined(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None and id(before) not in seen:
        yield from _outlined(before, seen)
        yield "\nand then:\n"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip()
    yield f"{type(error).__module__}.{type(error).__qualname__}"
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield "\nof which one is:\n"
            yield from _outlined(one, seen)


@contextmanager
def bind_request(request_id: str, traceparent: str | None = None) -> Iterator[None]:
    """Within the block, every log line of this task carries ``request_id``, and the trace that a client named."""
    trace = {} if traceparent is None else {"traceparent": traceparent}
    with structlog.contextvars.bound_contextvars(request_id=request_id, **trace):
        yield
