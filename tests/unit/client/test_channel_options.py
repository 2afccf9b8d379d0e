"""Options of the SDK's channel that no call shows at once."""

from __future__ import annotations

import json

from shoal.wire.options import MAX_ATTEMPTS, client_options, server_options


def test_the_servers_tolerate_the_clients_pings() -> None:
    client, server = dict(client_options("a.Service", 4)), dict(server_options(4 << 20))
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < client["grpc.keepalive_time_ms"]
    assert server["grpc.keepalive_permit_without_calls"] == client["grpc.keepalive_permit_without_calls"] == 1


def test_no_proxy_and_no_name_server_interfere() -> None:
    client = dict(client_options("a.Service", 4))
    assert client["grpc.enable_http_proxy"] == 0
    assert client["grpc.service_config_disable_resolution"] == 1


def test_retries_are_throttled_and_for_one_service() -> None:
    config = json.loads(str(dict(client_options("a.Service", MAX_ATTEMPTS))["grpc.service_config"]))
    [method] = config["methodConfig"]
    assert method["name"] == [{"service": "a.Service"}]
    assert method["retryPolicy"]["maxAttempts"] == MAX_ATTEMPTS
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    assert 0 < config["retryThrottling"]["tokenRatio"] < 1


def test_one_attempt_is_no_retry() -> None:
    client = dict(client_options("a.Service", 1))
    assert client["grpc.enable_retries"] == 0
    assert "grpc.service_config" not in client
