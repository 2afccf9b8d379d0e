"""The Helm chart, rendered by the real helm."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import tools
import yaml

from shoal.wire.messages import Role

CHART = Path(__file__).parents[2] / "helm" / "shoal"
RELEASE = "fish"
NAMESPACE = "reef"
# In a tenth of the time, where the library in C is there.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Object = dict[str, Any]


class Refused(Exception):
    """Helm refused the values; the message is what a user sees."""


def run(*arguments: str, values: Mapping[str, Any] | None = None) -> str:
    """What ``helm`` prints, with ``values`` over the chart's own. Raises Refused; skips the test without helm."""
    # JSON is YAML, and helm reads its values from standard input.
    done = subprocess.run(
        [str(tools.helm()), *arguments, "--values", "-"],
        input=json.dumps(values or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise Refused(done.stderr + done.stdout)
    return done.stdout


def text_of(values: Mapping[str, Any] | None = None, *, apis: Sequence[str] = ()) -> str:
    """All manifests as helm writes them. ``apis`` are what the cluster has besides Kubernetes' own."""
    return _text_of(json.dumps(values or {}), tuple(apis))


@cache  # helm takes half a second to make certificates
def _text_of(values: str, apis: tuple[str, ...]) -> str:
    asked = ("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *(f"-a={api}" for api in apis))
    return run(*asked, values=json.loads(values))


def rendered(values: Mapping[str, Any] | None = None, *, apis: Sequence[str] = ()) -> list[Object]:
    """All objects that the chart makes of ``values``."""
    return [found for found in yaml.load_all(text_of(values, apis=apis), _LOADER) if found is not None]


def notes(values: Mapping[str, Any] | None = None) -> str:
    """What a user reads after the installation."""
    installed = run("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client", values=values)
    return installed.partition("\nNOTES:\n")[2]


def only(objects: Sequence[Object], kind: str) -> Object:
    """The one object of that kind."""
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def serve_config(ray_service: Object) -> Object:
    """``serveConfigV2``, parsed: a Ray Serve config file."""
    parsed: Object = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    return parsed


def shoal_config(ray_service: Object) -> Object:
    """The tree that ``shoal.cluster:build`` gets."""
    (application,) = serve_config(ray_service)["applications"]
    arguments: Object = application["args"]
    return arguments


def certificates(objects: Sequence[Object], folder: Path) -> dict[Role, Path]:
    """Below ``folder`` by role, the files that the pods of a role find in its Secret."""
    homes: dict[Role, Path] = {}
    for role in get_args(Role):
        (secret,) = (each for each in objects if each["kind"] == "Secret" and f"-{role}-" in each["metadata"]["name"])
        homes[role] = folder / role
        homes[role].mkdir()
        for name, content in secret["data"].items():
            (homes[role] / name).write_bytes(base64.b64decode(content))
    return homes


def head(ray_service: Object) -> Object:
    """The head's group: ``rayStartParams`` and ``template``."""
    group: Object = ray_service["spec"]["rayClusterConfig"]["headGroupSpec"]
    return group


def worker_groups(ray_service: Object) -> dict[str, Object]:
    """The worker groups by their name."""
    return {group["groupName"]: group for group in ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def node_resources(group: Object) -> dict[str, float]:
    """The custom resources that each node of a group offers, as ``ray start --resources`` takes them."""
    # KubeRay puts the text into a shell command as it is, so it brings its own quotes.
    resources: dict[str, float] = json.loads(json.loads(group["rayStartParams"]["resources"]))
    return resources


def container(group: Object) -> Object:
    """The one container of a group's pods."""
    found: Object
    (found,) = group["template"]["spec"]["containers"]
    return found


# What a Prometheus operator brings.
MONITORING = ("monitoring.coreos.com/v1/PrometheusRule", "monitoring.coreos.com/v1alpha1/ScrapeConfig")

# Every option at once: what a production system might set.
PRODUCTION: Mapping[str, Any] = {
    "image": {"repository": "registry.example.com/shoal", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
    "model": {"name": "/models/llama/8b", "existingClaim": "weights"},
    "prefill": {
        "replicas": 2,
        "num_gpus": 1,
        "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "32Gi"}},
        "nodeSelector": {"gpu": "compute"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "priorityClassName": "serving",
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
    },
    "decode": {"replicas": 4, "num_gpus": 2, "nodeSelector": {"gpu": "memory"}},
    "gateway": {
        "tls": {"existingSecret": "tls", "clientCa": True},
        "service": {"type": "LoadBalancer", "annotations": {"cloud": "c"}},
    },
    "tls": {"from": "cert-manager", "issuer": {"name": "shoal", "kind": "ClusterIssuer"}},
    "apiKeys": {"existingSecret": "keys", "clientSecret": "key"},
    "config": {"decode": {"kv_pool_bytes": 34359738368}, "handoff": {"drain_s": 5}, "log": {"level": "warning"}},
    "auth": {"existingSecret": "token"},
    "gcsFaultTolerance": {"redisAddress": "redis://redis:6379", "existingSecret": "redis"},
    "rdma": {"enabled": True},
    "serviceAccount": {"annotations": {"role": "d"}},
    "networkPolicy": {
        "clients": [{"ipBlock": {"cidr": "203.0.113.0/24"}}],
        "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "redis"}}}]}],
    },
    "monitoring": {"scrapeConfig": {"labels": {"prometheus": "main"}}, "prometheusRule": {"labels": {"e": "f"}}},
}
