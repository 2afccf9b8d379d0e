"""The gateway's gRPC server in the test's own event loop, and clients that reach it by the wire."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from fake_backend import FakeBackend
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from shoal.api.grpc_server import GrpcServer
from shoal.api.intake import Services
from shoal.v1 import inference_pb2 as pb
from shoal.v1.inference_pb2_grpc import InferenceServiceStub
from shoal.wire.statuses import DETAILS_KEY, from_rpc_error

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Inference:
    """A server's client, and what stands behind the server."""

    address: str
    channel: grpc.aio.Channel
    stub: Any
    backend: FakeBackend
    observer: Any

    async def generate(self, **fields: Any) -> pb.GenerateResponse:
        """Generate, with a prompt if ``fields`` has none."""
        response: pb.GenerateResponse = await self.stub.Generate(request(**fields), timeout=TIMEOUT_S)
        return response

    async def stream(self, **fields: Any) -> list[pb.GenerateStreamResponse]:
        return [one async for one in self.stub.GenerateStream(request(**fields), timeout=TIMEOUT_S)]


def request(**fields: Any) -> pb.GenerateRequest:
    if not fields.keys() & {"text", "token_ids", "chat"}:
        fields["text"] = "Hello"
    return pb.GenerateRequest(**fields)


@asynccontextmanager
async def serving_inference(services: Services) -> AsyncIterator[str]:
    """The address of a server on a free port of the loopback."""
    server = GrpcServer(services)
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


@asynccontextmanager
async def client_of(
    services: Services, *, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[Inference]:
    """A server and a client of it."""
    options = [("grpc.enable_retries", 0)]
    async with serving_inference(services) as address:
        channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        async with channel:
            backend: Any = services.backend
            yield Inference(address, channel, InferenceServiceStub(channel), backend, services.observer)


def told(error: grpc.aio.AioRpcError) -> tuple[int, str, str | None]:
    """The HTTP status that the error's class has, its code, and the field at fault, as the wire tells them."""
    info = ErrorInfo()
    [raw] = [value for key, value in error.trailing_metadata() if key == DETAILS_KEY]
    [detail] = [one for one in Status.FromString(raw).details if one.Is(info.DESCRIPTOR)]
    detail.Unpack(info)
    known = from_rpc_error(error)
    return known.http_status, info.reason.lower(), known.param
