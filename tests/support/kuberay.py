"""What KubeRay does with a RayService, on hosts: it starts the nodes of its groups, and deploys its Serve config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from netns import Network
from nodes import ENVIRONMENT, Client, Question

_URL = "http://gateway:8265/api/serve/applications/"
_HEADERS = {"x-ray-authorization": f"Bearer {ENVIRONMENT['RAY_AUTH_TOKEN']}"}


def start_head(
    network: Network,
    params: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[str, Path] | None = None,
) -> None:
    """The head, on the host gateway. ``params`` are ``rayStartParams``."""
    params = {"head": "", "port": "6379", "dashboard-host": "0.0.0.0", **params}
    _start(network, "gateway", params, environment, mounts)


def start_worker(
    network: Network,
    name: str,
    params: Mapping[str, str],
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[str, Path] | None = None,
) -> None:
    _start(network, name, {"address": "gateway:6379", **params}, environment, mounts)


def deploy(client: Client, config: Mapping[str, Any]) -> None:
    """Returns when all applications of a Serve config run."""
    client.until(lambda: client.ask(Question(_URL, config, "PUT", _HEADERS))[0].status == 200)
    client.until(lambda: _all_run(client))


def warnings(network: Network) -> str:
    """What the replicas on the hosts that still run have logged as worth a warning."""
    find = 'grep -hE \'"level": "(warning|error)"\' /run/ray/session_*/logs/worker-*.err'
    return "\n\n".join(f"--- {name} ---\n{network.execute(name, ['sh', '-c', find]).stdout}" for name in network.names)


def _start(
    network: Network,
    name: str,
    params: Mapping[str, str],
    environment: Mapping[str, str] | None,
    mounts: Mapping[str, Path] | None,
) -> None:
    # Values are words of a shell, and bring their own quotes where they need any.
    options = " ".join(f"--{key}={value}" if value else f"--{key}" for key, value in params.items())
    network.start(
        name, ["sh", "-c", f"exec ray start --block {options}"], {**ENVIRONMENT, **(environment or {})}, mounts
    )


def _all_run(client: Client) -> bool:
    [answer] = client.ask(Question(_URL, headers=_HEADERS))
    applications = answer.json()["applications"].values()
    for application in applications:
        if application["status"] in {"DEPLOY_FAILED", "UNHEALTHY"}:
            messages = [one["message"] for one in application["deployments"].values()]
            pytest.fail("\n".join([application["message"], *messages]))
    return bool(applications) and all(application["status"] == "RUNNING" for application in applications)
