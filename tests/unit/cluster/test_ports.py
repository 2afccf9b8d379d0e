from __future__ import annotations

import socket

import pytest

from shoal.cluster.ports import free_port, require_free, url_of
from shoal.errors import ConfigError


def test_a_taken_port_is_refused_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is taken: .*--port"):
            require_free("127.0.0.1", port)
        with pytest.raises(ConfigError, match=r"--grpc-port, gateway\.grpc_port"):
            require_free("127.0.0.1", port, "grpc_port")


def test_a_port_that_was_just_closed_is_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()  # this end goes first, so that its address lingers
            assert client.recv(1) == b""
    require_free("127.0.0.1", port)


def test_a_free_port_can_be_taken():
    port = free_port("127.0.0.1")
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("host", ["203.0.113.9", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_refused_with_what_to_do(host: str):
    with pytest.raises(ConfigError, match=rf"can't listen on {host}:8000: .*gateway.host"):
        require_free(host, 8000)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("node.example", "http://node.example:80"),
    ],
)
def test_the_url_is_one_that_a_client_of_this_machine_can_reach(host: str, url: str):
    assert url_of(host, 80) == url
    assert url_of(host, 80, is_tls=True) == url.replace("http", "https")
