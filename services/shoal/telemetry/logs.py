"""Structured logs on stderr: JSON for machines, a coloured line for people.

Shoal's modules log through the standard ``logging`` or through structlog; both end in the same lines, with the
request's id in each. What clients write never gets into a log: fields are named in ``FIELDS``, and any other field
is replaced by ``(withheld)``. Messages are constant text; what varies is a field, or an argument without client text.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
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
        "num_segments",
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
) -> None:
    """Send all logs of this process to ``stream`` (stderr by default). Calling again replaces the former setting."""
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
                *_renderers(line_format, colors=out.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in _SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _renderers(line_format: Literal["console", "json"], *, colors: bool) -> list[Processor]:
    if line_format == "console":
        # Plain tracebacks: the pretty ones print the local variables, prompts among them.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def withhold_unknown_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace every field that ``FIELDS`` doesn't name."""
    return {key: value if key in FIELDS or key == "exc_info" else WITHHELD for key, value in event.items()}


@contextmanager
def bind_request(request_id: str) -> Iterator[None]:
    """Within the block, every log line of this task carries ``request_id``."""
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        yield
