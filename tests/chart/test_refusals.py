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
    "gpus twice": ({"config": {"decode": {"num_gpus": 1}}}, "config.decode.num_gpus: set decode.num_gpus instead"),
    "cpus twice": ({"config": {"decode": {"num_cpus": 1}}}, "config.decode.num_cpus: set decode.num_cpus instead"),
    "model twice": ({"config": {"model": {"name": "smollm2"}}}, "config.model.name: set model.name instead"),
    "TLS twice": (
        {"config": {"gateway": {"tls": {"cert_file": "a", "key_file": "b"}}}},
        "config.gateway.tls: set gateway.tls.existingSecret instead",
    ),
    "the gateway's address": ({"config": {"gateway": {"host": "::"}}}, "config.gateway.host: leave it out"),
    "the gateway's node": ({"config": {"gateway": {"resource": "x"}}}, "config.gateway.resource: leave it out"),
    "the gateway's CPUs": ({"config": {"gateway": {"num_cpus": 1}}}, "config.gateway.num_cpus: leave it out"),
    "hand-off's address": ({"config": {"handoff": {"host": "::"}}}, "config.handoff.host: leave it out"),
    "hand-off's other address": (
        {"config": {"handoff": {"advertised_host": "a"}}},
        "config.handoff.advertised_host: leave it out",
    ),
    "metrics' address": ({"config": {"metrics": {"host": "::"}}}, "config.metrics.host: leave it out"),
    "Ray's address": ({"config": {"ray": {"address": "a"}}}, "config.ray.address: leave it out"),
    "the application's name": ({"config": {"ray": {"app_name": "a"}}}, "config.ray.app_name: leave it out"),
    "waiting for nodes": ({"config": {"ray": {"join_timeout_s": 9}}}, "config.ray.join_timeout_s: leave it out"),
    "autoscaling of prefill": (
        {"prefill": {"autoscaling": {"max": 4}}},
        "prefill.autoscaling: pools don't scale by themselves yet: set prefill.replicas",
    ),
    "autoscaling of decode": (
        {"decode": {"autoscaling": {}}},
        "decode.autoscaling: pools don't scale by themselves yet: set decode.replicas",
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
    "plain text twice": ({"config": {"tls": "off"}}, "config.tls: set tls.from instead"),
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
    "clients from outside, and nobody let in": (
        {"gateway": {"service": {"type": "LoadBalancer"}}, "networkPolicy": {"clients": []}},
        "the network policy would keep out whom a LoadBalancer brings in",
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
    "gRPC on Ray's port": (
        {"config": {"gateway": {"grpc_port": 6379}}},
        "config.gateway.grpc_port: Ray's GCS listens on 6379 already",
    ),
    "gRPC on the agent's port": (
        {"config": {"gateway": {"grpc_port": 52365}}},
        "config.gateway.grpc_port: Ray's agent listens on 52365 already",
    ),
    "HTTP on the port of Ray's metrics": (
        {"config": {"gateway": {"port": 8080}}},
        "config.gateway.port: Ray, for its own metrics, listens on 8080 already",
    ),
    "gRPC on the port of Ray's metrics": (
        {"config": {"gateway": {"grpc_port": 8080}}},
        "config.gateway.grpc_port: Ray, for its own metrics, listens on 8080 already",
    ),
    "HTTP on the port of Ray's client": (
        {"config": {"gateway": {"port": 10001}}},
        "config.gateway.port: Ray's server for its client listens on 10001 already",
    ),
    "gRPC on the port of the autoscaler's metrics": (
        {"config": {"gateway": {"grpc_port": 44217}}},
        "config.gateway.grpc_port: Ray's autoscaler, for its metrics, listens on 44217 already",
    ),
    "HTTP on the port of the dashboard's metrics": (
        {"config": {"gateway": {"port": 44227}}},
        "config.gateway.port: Ray's dashboard, for its metrics, listens on 44227 already",
    ),
    "an empty range of metrics": (
        {"config": {"metrics": {"port_range": {"first": 23000, "last": 22000}}}},
        "config.metrics.port_range: last (22000) is below first (23000)",
    ),
    "an empty range of hand-offs": (
        {"config": {"handoff": {"port_range": {"first": 23000, "last": 22000}}}},
        "config.handoff.port_range: last (22000) is below first (23000)",
    ),
    "two plans": (
        {"config": {"prefill": {"skip_layers": 4}, "decode": {"skip_layers": 5}}},
        "config.prefill.skip_layers, config.decode.skip_layers: the pools must agree: set config.model.skip_layers",
    ),
    "a plan of one pool": (
        {"config": {"model": {"skip_layers": 4}, "prefill": {"skip_layers": 0}}},
        "the pools must agree: set config.model.skip_layers",
    ),
    "two kinds of K/V": (
        {"config": {"decode": {"kv_dtype": "float32"}}},
        "the pools must agree: set config.model.kv_dtype",
    ),
    "too little shared memory of a pool": (
        {"decode": {"shmSize": "127Mi"}},
        "decode.shmSize: must be at least 134217728 bytes",
    ),
    "too little shared memory of the head": ({"head": {"shmSize": 1e8}}, "head.shmSize: must be at least"),
    "too short a drain": (
        {"drain": {"deadline_s": 51}, "config": {"handoff": {"drain_s": 9.5}, "ray": {"stop_timeout_s": 40}}},
        "drain.deadline_s: must be at least 52",
    ),
}

MISTAKES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "an unknown value": ({"prefil": {}}, "additional properties 'prefil' not allowed"),
    "an unknown key of a pool": ({"decode": {"replica": 2}}, "additional properties 'replica' not allowed"),
    "an unknown section": ({"config": {"deocde": {}}}, "additional properties 'deocde' not allowed"),
    "an unknown key": ({"config": {"handoff": {"ttl": 5}}}, "additional properties 'ttl' not allowed"),
    "no replica": ({"prefill": {"replicas": 0}}, "at '/prefill/replicas'"),
    "half a GPU": ({"prefill": {"num_gpus": 0.5}}, "at '/prefill/num_gpus'"),
    "a level that isn't": ({"config": {"log": {"level": "loud"}}}, "at '/config/log/level'"),
    "certificates from nowhere": ({"tls": {"from": "vault"}}, "at '/tls/from'"),
    "half a role": ({"tls": {"secrets": {"decoder": "a"}}}, "additional properties 'decoder' not allowed"),
    "root": ({"podSecurityContext": {"runAsUser": 0}}, "at '/podSecurityContext/runAsUser'"),
    "a Redis without a scheme": ({"gcsFaultTolerance": {"redisAddress": "redis:6379"}}, "redisAddress"),
    "no quantity": ({"prefill": {"shmSize": "half a gig"}}, "at '/prefill/shmSize'"),
    "no quantity of memory": ({"head": {"resources": {"limits": {"memory": "4 GB"}}}}, "at '/head/resources/limits"),
    "an unknown upgrade": ({"upgrade": {"type": "Rolling"}}, "at '/upgrade/type'"),
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
    "clients from outside and no policy": {
        "gateway": {"service": {"type": "NodePort"}},
        "networkPolicy": {"enabled": False},
    },
    "one plan, said twice": {"config": {"prefill": {"skip_layers": 0}, "decode": {"skip_layers": 0}}},
    "one plan, said by the model and a pool": {"config": {"model": {"skip_layers": 4}, "decode": {"skip_layers": 4}}},
    "just enough shared memory": {"head": {"shmSize": "128Mi"}, "decode": {"shmSize": "0.125Gi"}},
    "sizes of all kinds": {"head": {"shmSize": 2e8}, "prefill": {"shmSize": "135M"}, "decode": {"shmSize": "1Ti"}},
    "quantities of all kinds": {"head": {"resources": {"limits": {"cpu": "500m", "memory": "1e9"}}}},
    "plain text, as YAML reads off": {"tls": {"from": False}},
    "plain text": {"tls": {"from": "off"}},
    "no limits": {"head": {"resources": {"limits": None}}},
}


@pytest.mark.parametrize("values", FINE.values(), ids=FINE)
def test_what_goes_together_is_taken(values: Mapping[str, Any]) -> None:
    assert charts.rendered(values)


@pytest.mark.parametrize("path", ["config", "prefill.resources", "head.labels", "gateway.tls", "drain.deadline_s"])
def test_a_default_that_was_taken_away_is_named(path: str) -> None:
    section, _, key = path.partition(".")
    with pytest.raises(Refused, match=f"missing property '{key or section}'"):
        charts.rendered({section: {key: None} if key else None})
