"""A run: the right answers first, then a cluster for each carrier, and its scenarios one after the other."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from tempfile import TemporaryDirectory

from shoal.cluster import running
from shoal.cluster.certificates import make_certificates
from shoal.cluster.ports import free_port, require_free
from shoal.config import ShoalConfig, load_config
from shoal.errors import ConfigError
from shoal_lab.chaos.play import Limits, Play, Progress
from shoal_lab.chaos.proxy import DECODE_HOST, PROXY_HOST
from shoal_lab.chaos.result import Report, Result
from shoal_lab.chaos.scenario import Scenario
from shoal_lab.chaos.switchboard import switching
from shoal_lab.chaos.truth import Script, write_script

_NUM_REPLICAS = 2
# Old and new replicas of a pool may be there together.
_NUM_PORTS = 4 * _NUM_REPLICAS
_PORTS = range(24000, 31000, _NUM_PORTS)
_MINUTES_A_DAY = 24 * 60
Tls = str | dict[str, str]


@dataclass(frozen=True, slots=True)
class ChaosOptions:
    """A run of several ``minutes`` begins again with the first scenario until they have passed. ``ttl_s`` is
    handoff.ttl_s. With ``tls`` the processes show one another certificates, made for the run."""

    model: str
    scenarios: tuple[Scenario, ...]
    limits: Limits
    minutes: float = 0.0
    num_cases: int = 32
    num_burst: int = 16
    ttl_s: float = 5.0
    seed: int = 0
    show_logs: bool = False
    tls: bool = False


def run(options: ChaosOptions, on_progress: Progress, on_result: Callable[[Result], None]) -> Report:
    """Enter it in the main thread. Raises ConfigError where this host can't have it."""
    began_s = time.monotonic()
    script = asyncio.run(_write(options, on_progress))
    results: list[Result] = []

    def ended(result: Result) -> None:
        results.append(result)
        on_result(result)

    with _certificates(options) as tls:
        while not results or time.monotonic() - began_s < 60 * options.minutes:
            for carrier, scenarios in groupby(sorted(options.scenarios, key=_carrier), _carrier):
                _play(options, chaos_config(options, carrier, tls), script, tuple(scenarios), on_progress, ended)
    return Report(options.model, tuple(results))


@contextmanager
def _certificates(options: ChaosOptions) -> Iterator[Tls]:
    """What the configuration says of them; they are there for as long as the block lasts."""
    if not options.tls:
        yield "off"
        return
    with TemporaryDirectory(prefix="shoal-chaos-") as folder:
        make_certificates(Path(folder), days=1 + math.ceil(options.minutes / _MINUTES_A_DAY))
        yield {"folder": folder}


def _play(
    options: ChaosOptions,
    config: ShoalConfig,
    script: Script,
    scenarios: tuple[Scenario, ...],
    on_progress: Progress,
    on_result: Callable[[Result], None],
) -> None:
    with switching() as switchboard:
        from shoal.cluster.ray_settings import set_environment

        set_environment(config)
        from shoal_lab.chaos.replicas import REPLICAS  # it imports Ray, which reads its environment then

        with running(
            config,
            lambda step: on_progress(step.name, step.num_done, step.num_total),
            replicas=REPLICAS,
            show_logs=options.show_logs,
        ) as cluster:
            play = Play(cluster, config, switchboard, script, options.limits, on_progress)
            asyncio.run(play.run(scenarios, on_result))


def chaos_config(options: ChaosOptions, carrier: str, tls: Tls = "off") -> ShoalConfig:
    """Two replicas of each pool, both of which get work though they share cores, and such limits that short prompts are
    handed over and a burst of long ones is too much."""
    ports = _free_ports()
    return load_config(
        model={"name": options.model, "dtype": "float32", "projector": "paper"},
        prefill={"replicas": _NUM_REPLICAS, "pack_up_to": 0, "num_blocks": 256},
        decode={"replicas": _NUM_REPLICAS, "pack_up_to": 0, "num_blocks": 192, "max_queued": 40},
        handoff={
            "host": DECODE_HOST,
            "port_range": {"first": ports[0], "last": ports[-1]},
            "min_tokens": 16,
            "carrier": carrier,
            "ttl_s": options.ttl_s,
        },
        gateway=_gateway_ports(ports),
        tls=tls,
    )


async def _write(options: ChaosOptions, on_progress: Progress) -> Script:
    return await write_script(
        chaos_config(options, "inline"),
        num_cases=options.num_cases,
        num_burst=options.num_burst,
        seed=options.seed,
        for_both_plans=any(scenario.changes_plan for scenario in options.scenarios),
        on_progress=on_progress,
    )


def _carrier(scenario: Scenario) -> str:
    return scenario.carrier


def _gateway_ports(taken: range) -> dict[str, int]:
    """Two that are free, none of ``taken``."""
    found: set[int] = set()
    while len(found) < 2:
        found |= {free_port(DECODE_HOST)} - set(taken)
    return dict(zip(("port", "grpc_port"), found, strict=True))


def _free_ports() -> range:
    """Where decode may listen, and the proxy in front of it. Raises ConfigError if there are none."""
    for first in random.sample(_PORTS, len(_PORTS)):
        ports = range(first, first + _NUM_PORTS)
        with suppress(ConfigError):
            for host, port in product((DECODE_HOST, PROXY_HOST), ports):
                require_free(host, port)
            return ports
    raise ConfigError(f"chaos needs {_NUM_PORTS} ports that are free on both {DECODE_HOST} and {PROXY_HOST}")
