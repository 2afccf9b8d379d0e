"""The gateway's certificate over HTTP, and its files that are replaced while it serves."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509
from starlette.responses import PlainTextResponse

from shoal.api.http_server import HttpServer
from shoal.api.tls import expiry, server_context
from shoal.config import TlsConfig


class Files:
    """Of a server at 127.0.0.1, and what its clients need; ``issue`` replaces all of them by another authority's."""

    def __init__(self, folder: Path, *, asks_clients: bool) -> None:
        self.tls = TlsConfig(
            cert_file=folder / "cert", key_file=folder / "key", client_ca_file=folder / "ca" if asks_clients else None
        )
        self.issue()

    def issue(self, not_after: dt.datetime | None = None) -> None:
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("127.0.0.1", not_after=not_after)
        for path, content in (
            (self.tls.cert_file, issued.cert_chain_pems[0].bytes()),
            (self.tls.key_file, issued.private_key_pem.bytes()),
            (self.tls.client_ca_file, self.authority.cert_pem.bytes()),
        ):
            if path is not None:
                path.with_suffix(".new").write_bytes(content)
                path.with_suffix(".new").replace(path)

    def client(self, *, shows: bool = False) -> ssl.SSLContext:
        """Of a client that trusts the newest authority, and may show a certificate of it."""
        context = ssl.create_default_context(cadata=self.authority.cert_pem.bytes().decode())
        if shows:
            self.authority.issue_cert("client").configure_cert(context)
        return context


@asynccontextmanager
async def serving(tls: TlsConfig) -> AsyncIterator[str]:
    server = HttpServer(PlainTextResponse("hello"), server_context(tls))
    port = await server.start("127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop()


async def said(url: str, verify: ssl.SSLContext | bool = True) -> str:
    async with httpx.AsyncClient(verify=verify) as client:
        return (await client.get(url)).text


async def test_https_alone_is_answered(tmp_path: Path) -> None:
    files = Files(tmp_path, asks_clients=False)
    async with serving(files.tls) as place:
        assert await said(f"https://{place}", files.client()) == "hello"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await said(f"https://{place}")
        with pytest.raises(httpx.TransportError):
            await said(f"http://{place}")


async def test_clients_need_a_certificate_where_one_is_asked_for(tmp_path: Path) -> None:
    files = Files(tmp_path, asks_clients=True)
    async with serving(files.tls) as place:
        assert await said(f"https://{place}", files.client(shows=True)) == "hello"
        with pytest.raises(httpx.TransportError):
            await said(f"https://{place}", files.client())


@pytest.mark.parametrize("asks_clients", [False, True])
async def test_files_that_are_replaced_count_for_the_next_connection(tmp_path: Path, asks_clients: bool) -> None:
    files = Files(tmp_path, asks_clients=asks_clients)
    async with serving(files.tls) as place:
        before = files.client(shows=asks_clients)
        assert await said(f"https://{place}", before) == "hello"
        files.issue()
        after = files.client(shows=asks_clients)
        assert await said(f"https://{place}", after) == "hello"
        with pytest.raises(httpx.TransportError):
            await said(f"https://{place}", before)


REFUSED = (ssl.SSLError, ConnectionError)


def spoken(place: str, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
    """The session of a connection that was answered. Raises one of REFUSED if it's turned away."""
    host, port = place.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        client.wrap_socket(plain, server_hostname=host, session=session) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        if not answer.endswith(b"hello"):
            raise ConnectionResetError
        return connection.session


async def test_whose_authority_is_taken_out_is_turned_away_also_with_a_session_of_before(tmp_path: Path) -> None:
    files = Files(tmp_path, asks_clients=True)
    assert files.tls.client_ca_file is not None
    async with serving(files.tls) as place:
        client = files.client(shows=True)
        session = await asyncio.to_thread(spoken, place, client)
        files.tls.client_ca_file.write_bytes(trustme.CA().cert_pem.bytes())
        for one in (None, session):
            with pytest.raises(REFUSED):
                await asyncio.to_thread(spoken, place, client, one)


async def test_who_shows_a_certificate_speaks_tls_1_3(tmp_path: Path) -> None:
    """An older session could be taken up again without a look at the certificate."""
    files = Files(tmp_path, asks_clients=True)
    async with serving(files.tls) as place:
        client = files.client(shows=True)
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(REFUSED):
            await asyncio.to_thread(spoken, place, client)


LATER = dt.datetime(2100, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def test_its_end_is_that_of_the_files_that_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path, asks_clients=False)
    tell = expiry(files.tls)
    first = x509.load_pem_x509_certificate(files.tls.cert_file.read_bytes())
    assert tell() == first.not_valid_after_utc.timestamp() != LATER.timestamp()
    files.issue(not_after=LATER)
    assert tell() == LATER.timestamp()
    key = files.tls.key_file.read_bytes()
    with caplog.at_level(logging.ERROR):
        files.issue()
        files.tls.key_file.write_bytes(key)  # of the one before: no server takes the two
        assert tell() == tell() == LATER.timestamp()
    assert len([line for line in caplog.messages if "the certificate stays as it was" in line]) == 1


async def test_files_that_are_wrong_later_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Files(tmp_path, asks_clients=False)
    async with serving(files.tls) as place:
        client = files.client()
        files.tls.cert_file.write_text("half a certif")
        with caplog.at_level(logging.ERROR):
            assert await said(f"https://{place}", client) == "hello"
            assert await said(f"https://{place}", client) == "hello"
    assert len([line for line in caplog.messages if "the certificate stays as it was" in line]) == 1
