"""Ray nodes as hosts of a private network, and what a client there sees of Shoal on them.

The hosts are called gateway, prefill and decode, as the services of docker-compose.yml.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from clusters import Look, Scraped
from netns import Network

ROOT = Path(__file__).parents[2]
HOSTS = ("gateway", "prefill", "decode", "client")
URL = "http://gateway:8000"
GRPC_TARGET = "gateway:9000"
T = TypeVar("T")

# One token for all nodes. The programs of this virtual environment stand where an image has its own.
ENVIRONMENT: Mapping[str, str] = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "SHOAL_HANDOFF__MIN_TOKENS": "2",  # as for all tests
    # Of this very checkout, even if another one is installed.
    "PYTHONPATH": str(ROOT / "services"),
}
START_WITHIN_S = 180
_PAUSE_S = 0.5

# What a client runs. Questions come in as JSON lines, and answers go out so.
_ASK = """
import json, sys, urllib.error, urllib.request
for line in sys.stdin:
    url, method, headers, body = json.loads(line)
    request = urllib.request.Request(url, body and body.encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(json.dumps([answer.status, answer.read().decode()]))
    except urllib.error.HTTPError as error:
        print(json.dumps([error.code, error.read().decode()]))
    except OSError as error:
        print(json.dumps([0, str(error)]))
"""

_HEALTH = """
import sys, grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
with grpc.insecure_channel(sys.argv[1]) as channel:
    answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=20, wait_for_ready=True)
print(HealthCheckResponse.ServingStatus.Name(answer.status))
"""


@dataclass(frozen=True)
class Question:
    """One HTTP request. A body is sent as JSON."""

    url: str
    body: Any = None
    method: str | None = None
    headers: Mapping[str, str] | None = None

    def line(self) -> str:
        headers, body = dict(self.headers or {}), None
        if self.body is not None:
            headers["content-type"], body = "application/json", json.dumps(self.body)
        return json.dumps([self.url, self.method, headers, body])


@dataclass(frozen=True)
class Answer:
    """``status`` is 0 where nobody listens."""

    status: int
    body: str

    def json(self) -> Any:
        assert self.status == 200, f"{self.status}: {self.body}"
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """The host that only asks."""

    network: Network

    def ask(self, *questions: Question) -> list[Answer]:
        """One after the other, all by one process."""
        lines = self._python(_ASK, stdin="".join(f"{question.line()}\n" for question in questions)).splitlines()
        return [Answer(*json.loads(line)) for line in lines]

    def get(self, url: str) -> Answer:
        [answer] = self.ask(Question(url))
        return answer

    def until(self, look: Callable[[], T], is_right: Callable[[T], bool] = bool, within_s: float = START_WITHIN_S) -> T:
        """What ``look`` sees as soon as that is right. Fails with the hosts' logs if it's late, or if a host ends."""
        deadline_s = time.monotonic() + within_s
        while not is_right(seen := look()):
            self.network.require_alive()
            if time.monotonic() > deadline_s:
                pytest.fail(f"after {within_s:g} s still {seen!r}\n{self.network.logs()}")
            # Other processes don't tell what happens in them; they have to be asked.
            threading.Event().wait(_PAUSE_S)
        return seen

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer to one completion."""
        body = {"model": "smollm2", "prompt": "Whales are the largest animals, and", "max_tokens": 4, "temperature": 0}
        [answer] = self.ask(Question(f"{URL}/v1/completions", body | fields))
        completion: dict[str, Any] = answer.json()
        return completion

    def grpc_health(self) -> str:
        """What the gRPC server says of itself, such as SERVING."""
        return self._python(_HEALTH, GRPC_TARGET).strip()

    def look(self) -> Look:
        """The metrics of every process that the gateway lists, found and read as Prometheus would."""
        groups = [(group["labels"], target) for group in self._targets() for target in group["targets"]]
        answers = self.ask(*(Question(f"http://{target}/metrics") for _, target in groups))
        assert all(answer.status == 200 for answer in answers), answers
        return Look(
            tuple(
                Scraped.of(labels["role"], labels["replica"], answer.body)
                for (labels, _), answer in zip(groups, answers, strict=True)
            )
        )

    def replicas(self) -> set[tuple[str, str]]:
        """Role and id of each process that the gateway lists."""
        return {(group["labels"]["role"], group["labels"]["replica"]) for group in self._targets()}

    def addresses_by_role(self) -> list[tuple[str, str]]:
        """On which host each replica serves its metrics."""
        return sorted(
            (group["labels"]["role"], target.rpartition(":")[0])
            for group in self._targets()
            for target in group["targets"]
        )

    def _targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(f"{URL}/metrics/targets").json()
        return found

    def _python(self, program: str, *arguments: str, stdin: str = "") -> str:
        done = self.network.run("client", [sys.executable, "-c", program, *arguments], ENVIRONMENT, stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout


def assert_hands_off(client: Client) -> None:
    """A completion is answered, and its K/V went from prefill to decode once, without a detour."""
    before = client.look()
    completion = client.complete()
    after = client.look()
    assert completion["usage"]["completion_tokens"] == 4 and completion["choices"][0]["text"]
    assert after.metric("shoal_kv_transfer_seconds_count") - before.metric("shoal_kv_transfer_seconds_count") == 1
    assert after.metric("shoal_kv_fallback_total") == 0


def assert_each_role_has_its_node(client: Client) -> None:
    expected = [(role, client.network.addresses[role]) for role in ("decode", "gateway", "prefill")]
    assert client.addresses_by_role() == expected
