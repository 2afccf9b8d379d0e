"""The gRPC server itself: who may connect, what it tells of itself, and what it refuses to start with."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
import trustme
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from inference_server import TIMEOUT_S, client_of, request, serving_inference, told

from shoal.api import grpc_edge, grpc_server, inference
from shoal.api.grpc_server import GrpcServer
from shoal.api.health import HealthService
from shoal.api.inference import SERVICE_NAME, InferenceService
from shoal.api.intake import Services
from shoal.config import TlsConfig
from shoal.errors import ConfigError
from shoal.v1 import inference_pb2 as pb
from shoal.v1.inference_pb2_grpc import InferenceServiceStub


def configured(services: Services, **changes: Any) -> Services:
    return replace(services, config=services.config.model_copy(update=changes))


# --- TLS ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA, tmp_path: Path) -> TlsConfig:
    """Files of a server at 127.0.0.1; a client needs a certificate of the same authority."""
    issued = authority.issue_cert("127.0.0.1")
    files = TlsConfig(cert_file=tmp_path / "cert", key_file=tmp_path / "key", client_ca_file=tmp_path / "ca")
    files.cert_file.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    files.key_file.write_bytes(issued.private_key_pem.bytes())
    (tmp_path / "ca").write_bytes(authority.cert_pem.bytes())
    return files


def trusting(authority: trustme.CA, issued_by: trustme.CA | None = None) -> grpc.ChannelCredentials:
    """Of a client that trusts ``authority`` and shows a certificate that ``issued_by`` has made for it."""
    root = authority.cert_pem.bytes()
    if issued_by is None:
        return grpc.ssl_channel_credentials(root)
    own = issued_by.issue_cert("client")
    return grpc.ssl_channel_credentials(root, own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())


def replace_content(path: Path, content: bytes | None) -> None:
    """``None`` takes the file away."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


async def code_of_a_call(services: Services, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    async with client_of(services, credentials=credentials) as inference:
        code: grpc.StatusCode = await inference.stub.Generate(request(), timeout=TIMEOUT_S).code()
        return code


async def test_tls_needs_no_certificate_of_the_client(
    services: Services, tls: TlsConfig, authority: trustme.CA
) -> None:
    secure = configured(services, tls=tls.model_copy(update={"client_ca_file": None}))
    assert await code_of_a_call(secure, trusting(authority)) == grpc.StatusCode.OK
    assert await code_of_a_call(secure, trusting(trustme.CA())) == grpc.StatusCode.UNAVAILABLE
    assert await code_of_a_call(secure, None) == grpc.StatusCode.UNAVAILABLE


async def test_a_client_authority_lets_its_own_clients_in_alone(
    services: Services, tls: TlsConfig, authority: trustme.CA
) -> None:
    secure = configured(services, tls=tls)
    assert await code_of_a_call(secure, trusting(authority, issued_by=authority)) == grpc.StatusCode.OK
    assert await code_of_a_call(secure, trusting(authority, issued_by=trustme.CA())) == grpc.StatusCode.UNAVAILABLE
    assert await code_of_a_call(secure, trusting(authority)) == grpc.StatusCode.UNAVAILABLE
    assert len(services.backend.requests) == 1  # type: ignore[attr-defined]


async def test_files_that_are_replaced_count_for_the_next_connection(services: Services, tls: TlsConfig) -> None:
    server = GrpcServer(configured(services, tls=tls))
    port = await server.start("127.0.0.1", 0)
    try:
        other = trustme.CA()
        issued = other.issue_cert("127.0.0.1")
        tls.cert_file.write_bytes(issued.cert_chain_pems[0].bytes())
        tls.key_file.write_bytes(issued.private_key_pem.bytes())
        assert tls.client_ca_file is not None
        tls.client_ca_file.write_bytes(other.cert_pem.bytes())
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusting(other, issued_by=other)) as channel:
            stub = InferenceServiceStub(channel)
            assert await stub.Generate(request(), timeout=TIMEOUT_S).code() == grpc.StatusCode.OK
    finally:
        await server.stop()


@pytest.mark.parametrize("content", [None, b"", b"no PEM", b"\xff\xfe"], ids=repr)
@pytest.mark.parametrize("name", ["cert_file", "key_file", "client_ca_file"])
async def test_a_file_that_is_wrong_is_named_at_the_start(
    services: Services, tls: TlsConfig, name: str, content: bytes | None
) -> None:
    path: Path = getattr(tls, name)
    replace_content(path, content)
    with pytest.raises(ConfigError, match=rf"tls\.{name} {path}"):
        await GrpcServer(configured(services, tls=tls)).start("127.0.0.1", 0)


async def test_a_key_of_another_certificate_is_named_at_the_start(
    services: Services, tls: TlsConfig, authority: trustme.CA
) -> None:
    tls.key_file.write_bytes(authority.issue_cert("elsewhere").private_key_pem.bytes())
    with pytest.raises(ConfigError, match=rf"tls\.key_file {tls.key_file}"):
        await GrpcServer(configured(services, tls=tls)).start("127.0.0.1", 0)


# --- the port -------------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_named_at_the_start(services: Services) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--grpc-port"):
            await GrpcServer(services).start("127.0.0.1", port)


async def test_it_listens_on_its_address_alone(services: Services) -> None:
    async with serving_inference(services) as address:
        port = int(address.removeprefix("127.0.0.1:"))
        with socket.create_connection(("127.0.0.1", port)), pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))


async def test_a_port_is_free_again_once_the_server_has_stopped(services: Services) -> None:
    server = GrpcServer(services)
    port = await server.start("127.0.0.1", 0)
    await server.stop()
    await server.stop()
    again = GrpcServer(services)
    assert await again.start("127.0.0.1", port) == port
    await again.stop()


# --- reflection -----------------------------------------------------------------------------------------


def described(address: str) -> tuple[set[str], set[str]]:
    """What a client without any .proto learns: the services, and the methods of inference."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        service = DescriptorPool(database).FindServiceByName(SERVICE_NAME)
        return set(database.get_services()), {method.name for method in service.methods}


async def test_reflection_tells_the_services_and_their_methods(services: Services) -> None:
    async with serving_inference(configured(services, reflection=True)) as address:
        names, methods = await asyncio.to_thread(described, address)
    assert names == {SERVICE_NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert methods == {method.name for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods}


async def test_without_reflection_nothing_is_told(services: Services) -> None:
    async with serving_inference(configured(services, reflection=False)) as address:
        with pytest.raises(grpc.RpcError) as refused:
            await asyncio.to_thread(described, address)
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


# --- what it tells of errors ----------------------------------------------------------------------------

ONE_MESSAGE = ["grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch", f"{SERVICE_NAME}/Generate"]
REFLECT = f"{reflection.SERVICE_NAME}/ServerReflectionInfo"


async def assert_tells_nothing(call: Any, code: grpc.StatusCode) -> None:
    assert await call.code() == code
    told = f"{await call.details()}{await call.trailing_metadata()}"
    assert not any(secret in told for secret in ("Unexpected", "DecodeError", "ZeroDivision", "secret")), told


@pytest.mark.parametrize("method", [*ONE_MESSAGE, REFLECT])
async def test_bytes_that_no_method_can_read_are_refused_without_internals(services: Services, method: str) -> None:
    async with client_of(configured(services, reflection=True)) as inference:
        if method == REFLECT:
            call = inference.channel.stream_stream(f"/{method}")(iter([b"\xff"]), timeout=TIMEOUT_S)
        else:
            call = inference.channel.unary_stream(f"/{method}")(b"\xff", timeout=TIMEOUT_S)
        await assert_tells_nothing(call, grpc.StatusCode.INVALID_ARGUMENT)


async def fails(*_: object) -> None:
    raise ZeroDivisionError("secret detail")


@pytest.mark.parametrize(
    ("owner", "name", "method"),
    [
        (HealthService, "Check", "grpc.health.v1.Health/Check"),
        (HealthService, "Watch", "grpc.health.v1.Health/Watch"),
        (InferenceService, "_list_models", f"{SERVICE_NAME}/ListModels"),
        (InferenceService, "_generate", f"{SERVICE_NAME}/Generate"),
        (InferenceService, "_generate_stream", f"{SERVICE_NAME}/GenerateStream"),
    ],
)
async def test_a_defect_of_any_method_keeps_its_text_to_itself(
    services: Services, owner: type, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, fails)
    async with client_of(services) as inference:
        call = inference.channel.unary_stream(f"/{method}")(b"", timeout=TIMEOUT_S)
        await assert_tells_nothing(call, grpc.StatusCode.INTERNAL)


@pytest.mark.parametrize(
    ("method", "raw"),
    [("grpc.health.v1.Health/Check", b"\xff"), (f"{SERVICE_NAME}/ListModels", b""), (REFLECT, b"\xff")],
)
async def test_what_is_refused_or_fails_tells_the_calls_id(
    services: Services, method: str, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[object] = []

    async def failing(*_: object) -> None:
        bound.append(structlog.contextvars.get_contextvars().get("request_id"))
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(InferenceService, "_list_models", failing)
    async with client_of(configured(services, reflection=True)) as inference:
        open_call = inference.channel.stream_stream(f"/{method}")
        call = open_call(iter([raw]), timeout=TIMEOUT_S, metadata=(("x-request-id", "order-66"),))
        assert await call.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
        assert dict(await call.trailing_metadata())["x-request-id"] == "order-66"
    assert bound == (["order-66"] if method.endswith("ListModels") else [])


async def test_a_method_that_isnt_there_is_unimplemented(services: Services) -> None:
    async with client_of(services) as inference:
        call = inference.channel.unary_unary(f"/{SERVICE_NAME}/Guess")(b"", timeout=TIMEOUT_S)
        assert await call.code() == grpc.StatusCode.UNIMPLEMENTED


# --- messages that don't come ---------------------------------------------------------------------------

CHECK = "grpc.health.v1.Health/Check"
METHODS = [CHECK, *(f"{SERVICE_NAME}/{name}" for name in ("Generate", "GenerateStream", "ListModels"))]


async def begun(channel: grpc.aio.Channel, method: str, reading: asyncio.Event) -> Any:
    """A call that sends no message, which is being waited for."""
    call = channel.stream_stream(f"/{method}")(timeout=TIMEOUT_S)
    await asyncio.wait_for(reading.wait(), TIMEOUT_S)
    return call


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a message is waited for."""
    is_waited_for, read = asyncio.Event(), grpc_edge.read_message

    async def noted(context: Any, within_s: float | None = None) -> Any:
        is_waited_for.set()
        return await read(context, within_s)

    monkeypatch.setattr(grpc_edge, "read_message", noted)
    monkeypatch.setattr(inference, "read_message", noted)
    return is_waited_for


async def all_places_are_free(services: Services) -> None:
    """A moment after the client heard."""
    async with asyncio.timeout(TIMEOUT_S):
        while services.places.num_taken:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("method", METHODS)
async def test_a_message_that_doesnt_come_is_waited_for_no_longer_than_a_while(
    services: Services, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(grpc_edge, "MESSAGE_S", 0.1)
    monkeypatch.setattr(grpc_edge, "PROBE_S", 0.1)
    async with client_of(services) as client:
        call = client.channel.stream_stream(f"/{method}")()
        assert await asyncio.wait_for(call.code(), TIMEOUT_S) == grpc.StatusCode.DEADLINE_EXCEEDED
        await all_places_are_free(services)
        monkeypatch.undo()
        assert (await client.generate()).choices


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_ends_without_a_message_is_answered(services: Services, method: str) -> None:
    async with client_of(services) as client:
        call = client.channel.stream_stream(f"/{method}")(timeout=TIMEOUT_S)
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.CANCELLED
        await all_places_are_free(services)


async def test_a_message_that_comes_has_a_place(services: Services, reading: asyncio.Event) -> None:
    async with client_of(configured(services, max_running=1)) as client:
        call = await begun(client.channel, f"{SERVICE_NAME}/Generate", reading)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generate()
        assert told(refused.value)[:2] == (429, "overloaded")
        await call.write(request().SerializeToString())
        assert pb.GenerateResponse.FromString(await call.read()).choices


async def test_messages_that_come_without_a_place_are_few_at_once(
    services: Services, monkeypatch: pytest.MonkeyPatch, reading: asyncio.Event
) -> None:
    monkeypatch.setattr(grpc_edge, "_MAX_PROBES", 1)
    async with client_of(services) as client:
        call = await begun(client.channel, CHECK, reading)
        another = client.channel.unary_unary(f"/{CHECK}")
        assert await another(b"", timeout=TIMEOUT_S).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert client.observer.refusals == ["overloaded"]
        models = client.channel.unary_unary(f"/{SERVICE_NAME}/ListModels")
        assert await models(b"", timeout=TIMEOUT_S).code() == grpc.StatusCode.OK  # probes are in nobody else's way
        assert (await client.generate()).choices
        await call.write(b"")
        assert await call.read() == health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
        assert await another(b"", timeout=TIMEOUT_S).code() == grpc.StatusCode.OK


async def test_a_message_stays_with_its_client_until_it_is_read(services: Services) -> None:
    """The window of a stream as the server's first frame announces it: frame type 4, setting 4 (RFC 9113)."""
    async with serving_inference(services) as address:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
        head = await asyncio.wait_for(reader.readexactly(9), TIMEOUT_S)
        settings = await asyncio.wait_for(reader.readexactly(int.from_bytes(head[:3])), TIMEOUT_S)
        writer.close()
    pairs = (settings[at : at + 6] for at in range(0, len(settings), 6))
    told = {int.from_bytes(pair[:2]): int.from_bytes(pair[2:]) for pair in pairs}
    assert (head[3], told[4]) == (4, 1024)
    assert dict(grpc_server._options(services.config))["grpc.http2.bdp_probe"] == 0  # or the window would grow


def test_a_connection_may_bring_all_that_may_run_and_not_much_more(services: Services) -> None:
    options = dict(grpc_server._options(services.config))
    assert services.config.max_running < options["grpc.max_concurrent_streams"] < 2 * services.config.max_running
