"""One real prompt through both pools, at three depths: the answers, and where time and bytes went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import httpx
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shoal.cluster.start import running
from shoal.config import ShoalConfig
from shoal.errors import InternalError

QUESTION = "Which part of the prompt runs through all layers?"
NUM_TURNS = 3
DEEPEST = {"skip_layers": 10, "boundary_tokens": 1, "projector": "auto"}
_STAGES = ("gateway", "queue", "reserve", "prefill", "transfer_exposed", "boundary_step")


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One streamed answer. ``ttft_ms`` is the client's; ``timing`` is what the gateway tells of it."""

    text: str
    ttft_ms: float
    usage: dict[str, Any]
    timing: dict[str, Any]


def run_demo(
    config: ShoalConfig, on_progress: Callable[[str, int, int], None], *, max_tokens: int, show_logs: bool
) -> None:
    """Ask one question at full depth, at ``config``'s and at the deepest, and print what was measured."""
    console = Console()
    if config.model.plan == "speed":
        console.print("[yellow]warning:[/yellow] --plan speed is for checkpoints tuned for it; others lose much")
    console.print(Panel(QUESTION, title="question about shallow-prefill.md", title_align="left"))

    def measure(config: ShoalConfig, depths: tuple[str, ...]) -> tuple[dict[str, Any], list[DemoAnswer]]:
        with running(
            config, lambda step: on_progress(step.name, step.num_done, step.num_total), show_logs=show_logs
        ) as cluster:
            on_progress("", 0, 0)
            return cluster.describe(), _answers(cluster.url, depths, max_tokens)

    deepest_model = config.model.model_copy(update=DEEPEST)
    pools, (default, full) = measure(config, ("shallow", "full"))
    deepest_pools, (deepest,) = measure(config.model_copy(update={"model": deepest_model}), ("shallow",))
    _print_pools(console, pools, default)
    _print_waterfall(console, default)
    _print_dial(console, [("full", None, full), ("default", pools, default), ("deepest", deepest_pools, deepest)])


def _answers(url: str, depths: tuple[str, ...], max_tokens: int) -> list[DemoAnswer]:
    """Of each depth the answer whose time to first token is the median."""
    document = (resources.files("shoal") / "data" / "shallow-prefill.md").read_text()
    with httpx.Client(base_url=url, timeout=120) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        # The first request of a connection pays for things that are not the method's: handles, imports.
        for depth in depths:
            _ask(client, model, "Hello", depth, 2)
        prompt = f"{document}\n\n{QUESTION}"
        # In turn, so that a drift of the machine meets all depths alike.
        asked = [[_ask(client, model, prompt, depth, max_tokens) for depth in depths] for _ in range(NUM_TURNS)]
    return [sorted(turns, key=lambda answer: answer.ttft_ms)[NUM_TURNS // 2] for turns in zip(*asked, strict=True)]


def _ask(client: httpx.Client, model: str, prompt: str, depth: str, max_tokens: int) -> DemoAnswer:
    """Stream an answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "depth": depth,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s, text, last = 0.0, "", {}
    with client.stream("POST", "/v1/chat/completions", json=body, headers={"x-shoal-timing": "1"}) as response:
        if response.status_code != httpx.codes.OK:
            raise InternalError(f"the gateway answered {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            last = json.loads(line.removeprefix("data: "))
            if "error" in last:
                raise InternalError(f"the answer broke off: {last['error']['message']}")
            for choice in last["choices"]:
                first_s = first_s or time.perf_counter()
                text += choice["delta"]["content"]
    return DemoAnswer(text.strip(), (first_s - started_s) * 1e3, last["usage"], last["shoal"])


def _print_pools(console: Console, pools: dict[str, Any], answer: DemoAnswer) -> None:
    handoff = answer.timing["prompts"][0]["handoff"]
    deep = f"projected deep K/V {_mib(handoff['deep_bytes'])}" if handoff["deep_bytes"] else "no deep K/V"
    prefill, full_bytes = pools["prefill"], pools["prefill"]["full_model_bytes"]
    table = Table(title="the two pools", title_justify="left")
    table.add_column("pool")
    table.add_column("process", justify="right")
    table.add_column("layers run", justify="right")
    table.add_column("weights held", justify="right")
    table.add_column("of the model", justify="right")
    for name, pool in (("prefill", prefill), ("decode", pools)):
        first, last = pool["layers"]
        table.add_row(
            name,
            str(pool["pid"]),
            f"{last - first} of {pool['num_layers']}",
            _mib(pool["parameter_bytes"]),
            f"{pool['parameter_bytes'] / full_bytes:.0%}",
        )
    console.print(table)
    console.print(
        f"shipped from prefill to decode: shallow K/V {_mib(handoff['shallow_bytes'])}, "
        f"{deep}, boundary token {handoff['boundary_bytes']} bytes"
        + ("" if handoff["transferred"] else f" (NOT transferred: {handoff['fallback']})"),
        highlight=False,
    )


def _print_waterfall(console: Console, answer: DemoAnswer) -> None:
    """A bar a stage, each beginning where the one before ended; what no stage measured is the residue."""
    stages = answer.timing["prompts"][0]["stages_ms"]
    rows = [(name, float(stages[name])) for name in _STAGES]
    rows.append(("residue", answer.ttft_ms - sum(value for _, value in rows)))
    table = Table(
        title=f"time to first token: {answer.ttft_ms:.0f} ms as the client saw it, the median of {NUM_TURNS}",
        title_justify="left",
    )
    table.add_column("stage")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("", min_width=40)
    at = 0.0
    for name, value in rows:
        start, width = round(40 * at / answer.ttft_ms), max(1, round(40 * value / answer.ttft_ms))
        table.add_row(name, f"{value:.1f}", f"{value / answer.ttft_ms:.1%}", " " * min(start, 39) + "█" * width)
        at += value
    console.print(table)


def _print_dial(console: Console, answers: list[tuple[str, dict[str, Any] | None, DemoAnswer]]) -> None:
    """A line a setting, with the pools that served it, if it skipped anything."""
    table = Table(title=f"the same {answers[0][2].usage['prompt_tokens']} tokens at three depths", title_justify="left")
    table.add_column("")
    table.add_column("layers skipped")
    table.add_column("first token", justify="right")
    table.add_column("answer")
    for name, pools, answer in answers:
        skipped = "none"
        if pools is not None:
            first, last = pools["prefill"]["layers"]
            skipped = f"{pools['num_layers'] - (last - first)} of {pools['num_layers']}"
        table.add_row(name, skipped, f"{answer.ttft_ms:.0f} ms", Text(answer.text))
    console.print(table)
    console.print(
        "Here both pools share one machine's cores, and what the hand-off costs is paid by them, too: "
        "`make bench` shows what prefill alone wins.",
        highlight=False,
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
