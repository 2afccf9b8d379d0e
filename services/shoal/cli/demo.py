"""One real prompt through both pools, as processes of their own, and where its time and bytes went."""

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

from shoal.cluster.start import running
from shoal.config import ShoalConfig
from shoal.errors import InternalError

QUESTION = "Which part of the prompt runs through all layers?"
NUM_TURNS = 3
_STAGES = ("gateway", "queue", "reserve", "prefill", "transfer_exposed", "boundary_step")


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    """One streamed answer. ``ttft_ms`` is the client's; ``timing`` is what the gateway tells of it."""

    text: str
    ttft_ms: float
    total_ms: float
    usage: dict[str, Any]
    timing: dict[str, Any]

    @property
    def token_ids(self) -> list[int]:
        ids: list[int] = self.timing["choices"][0]["token_ids"]
        return ids

    @property
    def ms_per_token(self) -> float:
        """Mean after the first token."""
        return (self.total_ms - self.ttft_ms) / max(1, len(self.token_ids) - 1)


def run_demo(
    config: ShoalConfig, on_progress: Callable[[str, int, int], None], *, max_tokens: int, show_logs: bool
) -> None:
    """Start the pools, ask one question shallow and at full depth, print what was measured, take all down."""
    console = Console()
    if config.model.plan == "speed":
        console.print("[yellow]warning:[/yellow] --plan speed is for checkpoints tuned for it; others lose much")
    document = (resources.files("shoal") / "data" / "shallow-prefill.md").read_text()
    with running(
        config, lambda step: on_progress(step.name, step.num_done, step.num_total), show_logs=show_logs
    ) as cluster:
        on_progress("", 0, 0)
        pools = cluster.describe()
        console.print(Panel(QUESTION, title="question about shallow-prefill.md", title_align="left"))
        with httpx.Client(base_url=cluster.url, timeout=120) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            # The first request of a connection pays for things that are not the method's: handles, imports.
            for depth in ("shallow", "full"):
                _ask(client, model, "Hello", depth, 2, None)
            prompt = f"{document}\n\n{QUESTION}"
            # In turn, so that a drift of the machine meets both alike; the first answer is shown as it comes.
            asked = [
                (_ask(client, model, prompt, "shallow", max_tokens, None if turn else console),
                 _ask(client, model, prompt, "full", max_tokens, None))
                for turn in range(NUM_TURNS)
            ]  # fmt: skip
    shallow, full = (_median([pair[which] for pair in asked]) for which in (0, 1))
    _print_pools(console, pools, shallow)
    _print_waterfall(console, shallow)
    _print_comparison(console, shallow, full)


def _ask(
    client: httpx.Client, model: str, prompt: str, depth: str, max_tokens: int, console: Console | None
) -> DemoAnswer:
    """Stream an answer, printing it as it comes where there is a console."""
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
                if console is not None:
                    console.print(choice["delta"]["content"], end="", markup=False, highlight=False, soft_wrap=True)
    if console is not None:
        console.print("\n")
    ended_s = time.perf_counter()
    return DemoAnswer(text, (first_s - started_s) * 1e3, (ended_s - started_s) * 1e3, last["usage"], last["shoal"])


def _median(answers: list[DemoAnswer]) -> DemoAnswer:
    """The answer whose time to first token is the middle one."""
    return sorted(answers, key=lambda answer: answer.ttft_ms)[len(answers) // 2]


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


def _print_comparison(console: Console, shallow: DemoAnswer, full: DemoAnswer) -> None:
    agreed = sum(a == b for a, b in zip(shallow.token_ids, full.token_ids, strict=False))
    prefix = next(
        (i for i, (a, b) in enumerate(zip(shallow.token_ids, full.token_ids, strict=False)) if a != b),
        len(shallow.token_ids),
    )
    table = Table(title="the same question at full depth", title_justify="left")
    table.add_column("")
    table.add_column("shallow", justify="right")
    table.add_column("full", justify="right")
    table.add_row("prompt tokens", str(shallow.usage["prompt_tokens"]), str(full.usage["prompt_tokens"]))
    table.add_row("depth", shallow.usage["depth"], full.usage["depth"])
    table.add_row("time to first token", f"{shallow.ttft_ms:.0f} ms", f"{full.ttft_ms:.0f} ms")
    table.add_row("time per output token", f"{shallow.ms_per_token:.1f} ms", f"{full.ms_per_token:.1f} ms")
    console.print(table)
    console.print(
        f"full / shallow time to first token: {full.ttft_ms / shallow.ttft_ms:.2f}    "
        f"tokens agreed: {agreed} of {len(full.token_ids)}, the first {prefix} in a row",
        highlight=False,
    )
    console.print(
        "Here both pools share one machine's cores, and what the hand-off costs is paid by them, too: "
        "`make bench` shows what prefill alone wins.",
        highlight=False,
    )
    console.print("\nanswer at full depth:")
    console.print(full.text, markup=False, highlight=False)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
