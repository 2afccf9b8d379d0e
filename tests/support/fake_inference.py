"""An ``InferenceService`` that does as it's told, on a real port: what the client SDK is tested against.

It continues any prompt with the same words. It can fail first, or after some messages, or hold a call open until the
client ends it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from shoal.errors import ShoalError
from shoal.v1 import inference_pb2 as pb
from shoal.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from shoal.wire.options import server_options
from shoal.wire.statuses import DETAILS_KEY, to_status

WORDS = ("Ships ", "find ", "home.")
TEXT = "".join(WORDS)
USAGE = pb.Usage(num_prompt_tokens=7, num_output_tokens=3, num_cached_tokens=2, depth=pb.DEPTH_SHALLOW)
MODEL = "smollm2"
PATIENCE_S = 20.0
"""How long a test waits for what must come; only a broken one waits so long."""

Failure = ShoalError | grpc.StatusCode


@dataclass
class FakeInference(InferenceServiceServicer):
    """``failures`` meet one attempt each. Streams send ``num_words`` words, and then fail with ``last_failure``."""

    failures: list[Failure] = field(default_factory=list)
    last_failure: Failure | None = None
    num_words: int = len(WORDS)
    holds: bool = False
    """Whether a call, after its words, waits until the client ends it."""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    """Set once a held call has been ended by its client."""

    @property
    def num_attempts(self) -> int:
        return len(self.metadata)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:  # noqa: N802
        ended = self._begin(request, context)
        if self.holds:
            self._hold(ended)
        return pb.GenerateResponse(
            request_id=self._request_id,
            model=MODEL,
            choices=_choices(request),
            usage=USAGE,
            prompt_logprobs=_prompt_logprobs(request),
        )

    def GenerateStream(  # noqa: N802
        self, request: pb.GenerateRequest, context: Any
    ) -> Iterator[pb.GenerateStreamResponse]:
        ended = self._begin(request, context)
        for at, word in enumerate(WORDS[: self.num_words]):
            is_last = at == len(WORDS) - 1
            yield pb.GenerateStreamResponse(
                request_id=self._request_id,
                model=MODEL,
                text=word,
                token_ids=[at],
                finish_reason=pb.FINISH_REASON_STOP if is_last else None,
                usage=USAGE if is_last else None,
                prompt_logprobs=() if at else _prompt_logprobs(request),
            )
        if self.holds:
            self._hold(ended)
        if self.last_failure is not None:
            self._fail(self.last_failure, context)

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        self._begin(None, context)
        return pb.ListModelsResponse(models=[pb.Model(name=MODEL, max_context_tokens=8192, created_s=1_700_000_000)])

    @property
    def _request_id(self) -> str:
        value: str = self.metadata[-1]["x-request-id"]
        return value

    def _begin(self, request: pb.GenerateRequest | None, context: Any) -> threading.Event:
        """Note the call, and fail if told so. The event is set when the call ends."""
        self.metadata.append(dict(context.invocation_metadata()))
        if request is not None:
            self.requests.append(request)
        if self.failures:
            self._fail(self.failures.pop(0), context)
        ended = threading.Event()
        if not context.add_callback(ended.set):
            ended.set()
        if self.holds:
            context.add_callback(self.left.set)
        return ended

    def _hold(self, ended: threading.Event) -> None:
        self.held.set()
        ended.wait()  # at the latest, the server's end is the call's

    def _fail(self, failure: Failure, context: Any) -> NoReturn:
        if isinstance(failure, grpc.StatusCode):
            context.abort(failure, "as told")
        status = to_status(failure)
        context.set_trailing_metadata([(DETAILS_KEY, status.SerializeToString())])
        context.abort(next(code for code in grpc.StatusCode if code.value[0] == status.code), status.message)
        raise AssertionError("abort raises")


@contextmanager
def serving(service: FakeInference, credentials: grpc.ServerCredentials | None = None, port: int = 0) -> Iterator[str]:
    """The address (``localhost:port``) at which ``service`` answers, and calls itself healthy."""
    server = grpc.server(ThreadPoolExecutor(8), options=server_options(16 << 20))
    add_InferenceServiceServicer_to_server(service, server)
    healthy = health.HealthServicer()
    healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    if credentials is None:
        port = server.add_insecure_port(f"127.0.0.1:{port}")
    else:
        port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()


def _prompt_logprobs(request: pb.GenerateRequest) -> list[pb.TokenLogprob]:
    if not request.HasField("prompt_logprobs"):
        return []
    return [pb.TokenLogprob(token_id=7, token=" sea", logprob=-0.25), pb.TokenLogprob(token_id=6, token=" is")]


def _choices(request: pb.GenerateRequest) -> list[pb.Choice]:
    logprobs = []
    if request.HasField("logprobs"):
        top = [pb.TopToken(token_id=8, token="Boats ", logprob=-1.5), pb.TopToken(token_id=9, token="Cars ")]
        logprobs = [pb.TokenLogprob(token_id=0, token="Ships ", logprob=-0.5, top=top)]
    return [
        pb.Choice(
            index=index,
            text=TEXT,
            token_ids=range(len(WORDS)),
            finish_reason=pb.FINISH_REASON_STOP if request.stop else pb.FINISH_REASON_LENGTH,
            stop=request.stop[0] if request.stop else None,
            logprobs=logprobs,
        )
        for index in range(request.n or 1)
    ]
