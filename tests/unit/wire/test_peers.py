"""Who gets through to decode's server, and whom its clients believe: over real connections on loopback."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import grpc
import grpc.aio
import pytest
from cryptography import x509
from role_certificates import YESTERDAY, Roles
from token_streams import joined, output

from shoal.errors import PeerGone, ShoalError, UntrustedPeer
from shoal.handoff.base import Channel
from shoal.handoff.channels.grpc import add_handoff_service, dial
from shoal.v1 import worker_pb2
from shoal.v1.handoff_pb2_grpc import HandoffServiceStub
from shoal.v1.worker_pb2_grpc import WorkerServiceStub
from shoal.wire import peers
from shoal.wire.certificates import CHAIN_FILE, Certificate, name_of, read_certificate
from shoal.wire.handoff_messages import Envelope, Hello
from shoal.wire.messages import Role
from shoal.wire.options import HANDOFF_CHANNEL_OPTIONS, HANDOFF_SERVER_OPTIONS, TOKEN_CHANNEL_OPTIONS
from shoal.wire.peers import PeerTls, RoleGate
from shoal.wire.ports import bind_first_free, join_address
from shoal.wire.statuses import from_rpc_error
from shoal.wire.token_server import TokenServer

HEARD = "another process listens here now"
"""What decode answers to a gateway that asks for another one."""
NO_ID = worker_pb2.FollowRequest(gateway_id=bytes(16), server_id=bytes(16))


@pytest.fixture
def roles(tmp_path: Path) -> Roles:
    return Roles(tmp_path / "certs")


async def error_of(call: Any) -> ShoalError:
    """What a call ends with, as our own code reads it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return from_rpc_error(caught.value)


@asynccontextmanager
async def another_channel(address: str, credentials: grpc.ChannelCredentials) -> AsyncIterator[grpc.aio.Channel]:
    """A client that isn't ours, but knows where to look."""
    options = (*HANDOFF_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name_of("decode")))
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        yield channel


def hand_off(channel: grpc.aio.Channel) -> Any:
    return HandoffServiceStub(channel).Session()  # type: ignore[call-arg]


def follow(channel: grpc.aio.Channel) -> Any:
    return WorkerServiceStub(channel).Follow(NO_ID)


@asynccontextmanager
async def decode_server(roles: Roles) -> AsyncIterator[str]:
    """Both services on one server, as a decode replica has them, with nothing behind the hand-off's."""

    async def serve(channel: Channel) -> None:
        raise AssertionError("a caller got through")  # which gRPC tells the caller, in a status that isn't ours

    server = grpc.aio.server(interceptors=(RoleGate(),), options=HANDOFF_SERVER_OPTIONS)
    add_handoff_service(server, serve)
    TokenServer(Mock()).add_to(server)
    credentials = PeerTls(roles.folder, "decode").server_credentials()
    port = bind_first_free(server, "127.0.0.1", 0, 0, credentials)
    await server.start()
    try:
        yield join_address("127.0.0.1", port)
    finally:
        await server.stop(None)


# --- at decode's server ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "call"), [("gateway", hand_off), ("decode", hand_off), ("prefill", follow)])
async def test_another_role_is_refused_by_name(roles: Roles, role: str, call: Any, caplog: pytest.LogCaptureFixture):
    credentials = roles.channel_credentials(f"{role}.shoal.internal")
    async with decode_server(roles) as address, another_channel(address, credentials) as channel:
        error = await error_of(call(channel))
    assert isinstance(error, UntrustedPeer)
    assert f"is for {'prefill' if call is hand_off else 'gateway'} alone" in error.message
    assert f"who shows {role}.shoal.internal" in caplog.text


@pytest.mark.parametrize(
    ("names", "common_name"),
    [
        ([x509.RFC822Name(name_of("prefill"))], ""),
        ([x509.UniformResourceIdentifier(name_of("prefill"))], ""),
        ([], name_of("prefill")),
        ([x509.DNSName("a.shoal.internal"), x509.UniformResourceIdentifier(name_of("prefill"))], name_of("prefill")),
    ],
    ids=["an e-mail address", "a URI", "its subject", "a URI and its subject, beside another DNS name"],
)
async def test_a_name_that_is_no_dns_name_is_no_role(roles: Roles, names: list[x509.GeneralName], common_name: str):
    credentials = roles.credentials_of(names, common_name)
    async with decode_server(roles) as address, another_channel(address, credentials) as channel:
        error = await error_of(hand_off(channel))
    assert isinstance(error, UntrustedPeer) and "is for prefill alone" in error.message


async def test_the_dns_name_of_a_role_is_all_that_it_takes(roles: Roles):
    credentials = roles.credentials_of([x509.DNSName(name_of("gateway"))], "another subject")
    async with decode_server(roles) as address, another_channel(address, credentials) as channel:
        assert (await error_of(follow(channel))).message == HEARD


async def test_a_service_without_a_role_is_closed(roles: Roles):
    async def answer(request: bytes, context: Any) -> bytes:
        return b"open"

    server = grpc.aio.server(interceptors=(RoleGate(),), options=HANDOFF_SERVER_OPTIONS)
    method = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("another.Service", {"Ask": method}),))
    tls = PeerTls(roles.folder, "decode")
    port = bind_first_free(server, "127.0.0.1", 0, 0, tls.server_credentials())
    await server.start()
    try:
        async with PeerTls(roles.folder, "prefill").channel(f"127.0.0.1:{port}", HANDOFF_CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/another.Service/Ask")(b"")
            assert "is for nobody alone" in from_rpc_error(caught.value).message
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/another.Service/Tell")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(None)


@pytest.mark.parametrize("shows", ["no certificate", "another authority's", "an expired one", "plain text"])
async def test_without_a_certificate_of_ours_nobody_is_even_heard(roles: Roles, tmp_path: Path, shows: str):
    other = Roles(tmp_path / "other")
    believed = roles.channel_credentials(None)
    stranger = grpc.ssl_channel_credentials(
        (roles.folder / "prefill" / "ca.crt").read_bytes(),
        (other.folder / "prefill" / "tls.key").read_bytes(),
        (other.folder / "prefill" / "tls.crt").read_bytes(),
    )
    expired = roles.channel_credentials(name_of("prefill"), not_after=YESTERDAY)
    async with joined(tls=roles.folder) as both:
        if shows == "plain text":
            async with grpc.aio.insecure_channel(both.decode.address, options=HANDOFF_CHANNEL_OPTIONS) as channel:
                assert isinstance(await error_of(hand_off(channel)), PeerGone)
        else:
            credentials = {
                "no certificate": believed, "another authority's": stranger, "an expired one": expired,
            }[shows]  # fmt: skip
            async with another_channel(both.decode.address, credentials) as channel:
                assert isinstance(await error_of(hand_off(channel)), PeerGone)
        # And yet it serves who may come.
        assert await both.running()


async def test_a_handshake_may_take_a_while(roles: Roles, monkeypatch: pytest.MonkeyPatch):
    def late(folder: Path, role: Role) -> Certificate:
        threading.Event().wait(0.3)  # a decode process that is busy: longer than gRPC gives a connection by itself
        return read_certificate(folder, role)

    async with decode_server(roles) as address:
        gateway = PeerTls(roles.folder, "gateway")
        monkeypatch.setattr(peers, "read_certificate", late)
        async with gateway.channel(address, TOKEN_CHANNEL_OPTIONS) as channel:
            assert (await error_of(follow(channel))).message == HEARD


# --- at its clients -------------------------------------------------------------------------------------


@asynccontextmanager
async def impostor(credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    """Somebody listens at the address that Ray says is decode's."""
    server = grpc.aio.server(options=HANDOFF_SERVER_OPTIONS)
    port = bind_first_free(server, "127.0.0.1", 0, 0, credentials)
    await server.start()
    try:
        yield join_address("127.0.0.1", port)
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("prefill", "its certificate isn't decode's"),
        ("localhost", "its certificate isn't decode's"),
        ("another authority's", "isn't of an authority in our ca.crt"),
        ("expired", "has expired"),
        ("plain text", "it speaks plain text"),
    ],
)
async def test_a_server_that_is_not_decode_gets_nothing(
    roles: Roles, tmp_path: Path, who: str, said: str, caplog: pytest.LogCaptureFixture
):
    credentials = {
        "prefill": lambda: roles.server_credentials(name_of("prefill")),
        "localhost": lambda: roles.server_credentials("localhost"),
        "another authority's": lambda: Roles(tmp_path / "other").server_credentials(name_of("decode")),
        "expired": lambda: roles.server_credentials(name_of("decode"), YESTERDAY),
        "plain text": lambda: None,
    }[who]()
    async with impostor(credentials) as address:
        channel = await dial(address, PeerTls(roles.folder, "prefill"))
        with pytest.raises(UntrustedPeer, match=f"decode at {address} can't be trusted: .*{said}"):
            await channel.receive()
        # Also to who writes first: memory may take longer to offer than a handshake to fail.
        with pytest.raises(UntrustedPeer, match=said):
            await channel.send(Envelope(1, Hello(1, ("plan",))))
        await channel.close()


# --- files that change ----------------------------------------------------------------------------------


async def test_new_files_are_for_new_connections_and_old_ones_go_on(roles: Roles, tmp_path: Path):
    before, other = roles.channel_credentials(name_of("gateway")), Roles(tmp_path / "other")
    async with joined(tls=roles.folder) as both:
        request = await both.running()
        roles.renew(other)
        # The one that is there knows nothing of it.
        request.outlet.send(output(1))
        assert await request.first() == output(1)
        # A new one believes, and is believed by, the new authority alone; our own client has read its files anew.
        async with another_channel(both.decode.address, before) as channel:
            assert (await error_of(follow(channel))).message != HEARD
        gateway = PeerTls(roles.folder, "gateway")
        async with gateway.channel(both.decode.address, HANDOFF_CHANNEL_OPTIONS) as channel:
            assert (await error_of(follow(channel))).message == HEARD


def test_files_that_are_wrong_later_change_nothing_and_are_told_once(roles: Roles, caplog: pytest.LogCaptureFixture):
    tls = PeerTls(roles.folder, "decode")
    good = tls.current()
    (roles.folder / "decode" / CHAIN_FILE).write_bytes(b"half a certif")
    with caplog.at_level(logging.ERROR):
        assert tls.current() is good and tls.current() is good
    assert caplog.text.count("the certificate stays as it was") == 1
    roles.write("decode")
    assert tls.current() != good
    roles.write("decode", not_after=YESTERDAY)
    assert tls.current().expires_s > 0
    assert caplog.text.count("the certificate stays as it was") == 2
