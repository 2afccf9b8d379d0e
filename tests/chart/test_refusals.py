"""Values that make no sense are refused before anything is installed, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import charts
import pytest
from charts import Refused

TLS = {"gateway": {"tls": {"existingSecret": "tls"}}}

CONTRADICTIONS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "replicas twice": (
        {"config": {"prefill": {"replicas": 2}}},
        "config.prefill.replicas: set prefill.replicas instead",
    ),
    "TLS twice": (
        {"config": {"gateway": {"tls": {"cert_file": "a", "key_file": "b"}}}},
        "config.gateway.tls: set gateway.tls.existingSecret instead",
    ),
    "the gateway's address": ({"config": {"gateway": {"host": "::"}}}, "config.gateway.host: leave it out"),
    "autoscaling of prefill": (
        {"prefill": {"autoscaling": {"max": 4}}},
        "prefill.autoscaling: pools don't scale by themselves yet: set prefill.replicas",
    ),
    "GPUs as resources": (
        {"prefill": {"resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "prefill.resources.limits: set prefill.num_gpus instead of nvidia.com/gpu",
    ),
    "a claim without a path": (
        {"model": {"existingClaim": "weights"}},
        "model.name: with model.existingClaim it must be a path below /models",
    ),
    "client certificates without TLS": (
        {"gateway": {"tls": {"clientCa": True}}},
        "gateway.tls.clientCa: needs gateway.tls.existingSecret",
    ),
    "TLS without gRPC": (
        {**TLS, "config": {"gateway": {"grpc_port": 0}}},
        "gateway.tls.existingSecret: of no use while config.gateway.grpc_port is 0",
    ),
    "certificates twice": ({"config": {"tls": {"folder": "a"}}}, "config.tls: set tls.from instead"),
    "secrets of two roles": (
        {"tls": {"from": "secrets", "secrets": {"gateway": "a", "decode": "b"}}},
        "tls.secrets.prefill: name a Secret with ca.crt, tls.crt and tls.key, for prefill.shoal.internal",
    ),
    "a secret that nobody reads": (
        {"tls": {"secrets": {"decode": "b"}}},
        "tls.secrets.decode: of no use unless tls.from is secrets",
    ),
    "no issuer": ({"tls": {"from": "cert-manager"}}, "tls.issuer.name: name an issuer of cert-manager's"),
    "an issuer that nobody asks": (
        {"tls": {"issuer": {"name": "a"}}},
        "tls.issuer.name: of no use unless tls.from is cert-manager",
    ),
    "keys twice": ({"config": {"gateway": {"keys_file": "a"}}}, "config.gateway.keys_file: set apiKeys.existingSecret"),
    "keys that Prometheus hasn't": (
        {"apiKeys": {"existingSecret": "keys"}},
        "apiKeys.clientSecret: name a Secret with metrics-key and test-key",
    ),
    "a key that nobody asks for": (
        {"apiKeys": {"clientSecret": "key"}},
        "apiKeys.clientSecret: of no use without apiKeys.existingSecret",
    ),
    "a password without Redis": (
        {"gcsFaultTolerance": {"existingSecret": "redis"}},
        "gcsFaultTolerance.existingSecret: needs gcsFaultTolerance.redisAddress",
    ),
    "a Redis that nothing may reach": (
        {"gcsFaultTolerance": {"redisAddress": "redis://redis:6379"}},
        "gcsFaultTolerance.redisAddress: the network policy would keep the head from it",
    ),
    "clients from outside that nothing lets in": (
        {"gateway": {"service": {"type": "LoadBalancer"}}},
        "gateway.service.type: the network policy would keep out whom a LoadBalancer brings in: name them with",
    ),
    "clients from outside, by a node": (
        {"gateway": {"service": {"type": "NodePort"}}, "networkPolicy": {"clients": [{"podSelector": {}}]}},
        "the network policy would keep out whom a NodePort brings in",
    ),
    "any free port": ({"config": {"gateway": {"port": 0}}}, "config.gateway.port: must not be 0"),
    "HTTP and gRPC on one port": (
        {"config": {"gateway": {"grpc_port": 8000}}},
        "config.gateway.grpc_port: config.gateway.port listens on 8000 already",
    ),
    "HTTP on Ray's port": (
        {"config": {"gateway": {"port": 8265}}},
        "config.gateway.port: Ray's dashboard listens on 8265 already",
    ),
    "an empty range of hand-offs": (
        {"config": {"handoff": {"port_range": {"first": 23000, "last": 22000}}}},
        "config.handoff.port_range: last (22000) is below first (23000)",
    ),
    "too little shared memory of the head": ({"head": {"shmSize": 1e8}}, "head.shmSize: must be at least"),
    "too short a drain": (
        {"drain": {"deadline_s": 51}, "config": {"handoff": {"drain_s": 9.5}, "ray": {"stop_timeout_s": 40}}},
        "drain.deadline_s: must be at least 52",
    ),
}

MISTAKES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "an unknown value": ({"prefil": {}}, "additional properties 'prefil' not allowed"),
    "an unknown key": ({"config": {"handoff": {"ttl": 5}}}, "additional properties 'ttl' not allowed"),
    "certificates from nowhere": ({"tls": {"from": "vault"}}, "at '/tls/from'"),
    "root": ({"podSecurityContext": {"runAsUser": 0}}, "at '/podSecurityContext/runAsUser'"),
    "a Redis without a scheme": ({"gcsFaultTolerance": {"redisAddress": "redis:6379"}}, "redisAddress"),
    "no quantity": ({"prefill": {"shmSize": "half a gig"}}, "at '/prefill/shmSize'"),
}


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_say_what_to_set(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refusal:
        charts.rendered(values)
    assert message in str(refusal.value)


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_say_where_they_are(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(Refused) as refusal:
        charts.rendered(values)
    assert message in str(refusal.value)


FINE: Mapping[str, Mapping[str, Any]] = {
    "no gRPC": {"config": {"gateway": {"grpc_port": 0}}},
    "a Redis that may be reached": {
        "gcsFaultTolerance": {"redisAddress": "redis://redis:6379"},
        "networkPolicy": {"egress": [{"ports": [{"port": 6379}]}]},
    },
    "a Redis and no policy": {
        "gcsFaultTolerance": {"redisAddress": "redis://redis:6379"},
        "networkPolicy": {"enabled": False},
    },
    "clients from outside who are named": {
        "gateway": {"service": {"type": "LoadBalancer"}},
        "networkPolicy": {"clients": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]},
    },
    "just enough shared memory": {"head": {"shmSize": "128Mi"}, "decode": {"shmSize": "0.125Gi"}},
    "quantities of all kinds": {"head": {"resources": {"limits": {"cpu": "500m", "memory": "1e9"}}}},
    "plain text, as YAML reads off": {"tls": {"from": False}},
}


@pytest.mark.parametrize("values", FINE.values(), ids=FINE)
def test_what_goes_together_is_taken(values: Mapping[str, Any]) -> None:
    assert charts.rendered(values)


@pytest.mark.parametrize("path", ["config", "gateway.tls"])
def test_a_default_that_was_taken_away_is_named(path: str) -> None:
    section, _, key = path.partition(".")
    with pytest.raises(Refused, match=f"missing property '{key or section}'"):
        charts.rendered({section: {key: None} if key else None})
