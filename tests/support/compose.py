"""The services of docker-compose.yml, started on hosts as Compose would start them in containers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from netns import Network
from nodes import ENVIRONMENT, ROOT


@dataclass(frozen=True)
class Service:
    """What a container would run. ``healthcheck`` is empty where there is none; ``volumes`` are names, by target."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: Mapping[str, Path]
    volumes: Mapping[str, str]
    healthcheck: tuple[str, ...]

    def start(self, network: Network, *, program: Path | None = None, folder: Path | None = None) -> None:
        """``program`` stands for the image's own, where the service names none. Volumes are in ``folder``, if given."""
        command = self.command if program is None else (str(program), *self.command)
        mounts = dict(self.mounts)
        if folder is not None:
            for target, volume in self.volumes.items():
                mounts[target] = folder / volume
                mounts[target].mkdir(mode=0o700, exist_ok=True)
        network.start(self.name, command, {**ENVIRONMENT, **self.environment}, mounts)


@cache
def services() -> Mapping[str, Service]:
    """As the real Compose reads them. Skips the test where it isn't."""
    compose = Path(sys.executable).with_name("docker-compose")
    if not compose.exists():
        pytest.skip("docker-compose isn't here: install the dev extra")
    done = subprocess.run(
        # Not the .env of whoever runs this.
        [
            *(str(compose), "--env-file", os.devnull, "--file", str(ROOT / "docker-compose.yml")),
            *("config", "--format", "json"),
        ],
        env=dict(ENVIRONMENT),
        capture_output=True,
        text=True,
        check=True,
    )
    return {name: _service(name, fields) for name, fields in json.loads(done.stdout)["services"].items()}


def _service(name: str, fields: Mapping[str, Any]) -> Service:
    volumes = fields.get("volumes") or []
    check = fields.get("healthcheck", {}).get("test", ["CMD"])
    assert check[0] == "CMD", check
    command = (*_words(fields.get("entrypoint")), *_words(fields.get("command")))
    for volume in volumes:
        if volume["type"] == "volume":
            # One of Docker's own, named by an option: a host has /run for what it writes.
            command = tuple(word.replace(f"={volume['target']}", f"=/run{volume['target']}") for word in command)
    mounts = {volume["target"]: Path(volume["source"]) for volume in volumes if volume["type"] == "bind"}
    own = {volume["target"]: volume["source"] for volume in volumes if volume["type"] == "volume"}
    return Service(name, command, fields.get("environment") or {}, mounts, own, _words(check[1:]))


def _words(command: str | list[str] | None) -> tuple[str, ...]:
    words = shlex.split(command) if isinstance(command, str) else command or []
    # What Compose prints is a Compose file again, in which a dollar sign is written twice.
    return tuple(word.replace("$$", "$") for word in words)
