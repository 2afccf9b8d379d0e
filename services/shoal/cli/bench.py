"""How an endpoint bears load: the command of shoal_lab.bench."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.progress import err, progress_bars


class PromptsOption(StrEnum):
    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


def bench(
    url: Annotated[str, typer.Argument(help="An OpenAI endpoint: http://127.0.0.1:8000. /v1 is added if missing.")],
    model: Annotated[str | None, typer.Option(help="Default: the first of GET /v1/models.")] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Open loop: requests a second that arrive at random, whatever the endpoint does. sweep doubles the "
            "rate from 1, or from START, to saturation, then looks in between. Default: 1.",
            metavar="2,4,8|sweep|sweep:START",
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop instead: so many requests at a time.", metavar="1,8,32")
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option(min=0.1, help="How long requests that count are sent, at each load. Default: 30.")
    ] = None,
    num_requests: Annotated[int | None, typer.Option(min=1, help="Or how many, at each load.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="The first requests of each load, which don't count.")] = 8,
    mix: Annotated[
        str,
        typer.Option(
            help="Classes of requests: lengths in tokens, shares, and SLOs in ms of their own. "
            " 1500-2000:64:0.3,100:64:0.7 is three long prompts to seven short ones.",
            metavar="PROMPT:OUTPUT[:SHARE[:TTFT:TPOT]],...",
        ),
    ] = "512:64",
    slo_ttft_ms: Annotated[float, typer.Option(help="Of classes that name none in --mix.")] = 1000.0,
    slo_tpot_ms: Annotated[float, typer.Option(help="Of classes that name none in --mix.")] = 100.0,
    prompts: Annotated[
        PromptsOption,
        typer.Option(
            help="ids: random token ids of exact length to /v1/completions. text: English of 4 characters a token. "
            "chat: that as a message to /v1/chat/completions."
        ),
    ] = PromptsOption.IDS,
    token_ids: Annotated[
        str, typer.Option(help="Lowest and highest id of --prompts ids; the model must know all.", metavar="LOW-HIGH")
    ] = "1000-30000",
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of full length; OpenAI's own servers don't know the field.")
    ] = True,
    extra_body: Annotated[
        str | None, typer.Option(help="""More fields of each request: '{"depth": "full"}'.""", metavar="JSON")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds the endpoint's key.", metavar="NAME")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="What one request has, first byte to last.")] = 120.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives every endpoint the same requests.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench-results"),
) -> None:
    """How fast does an OpenAI endpoint answer, and how much does it bear? Ours, or a peer's.

    Writes bench.json (every request's timings) and report.html: percentiles of TTFT, TPOT, ITL and E2E, failures, and
    goodput, the highest rate at which at least 90 % of requests meet both SLOs. Both files of a run before are removed
    first. Stopped, it leaves the loads it has. Exits 1 if no request of any load was answered.
    """
    from shoal_lab.report import require_packages

    require_packages("shoal bench", "bench", "aiohttp", "matplotlib")
    from shoal_lab.bench.commands import run_bench

    measured: list[object] = []
    try:
        with progress_bars() as on_progress:
            said, is_answered = run_bench(
                url, on_progress, measured.append, output=output, model=model, rate=rate, concurrency=concurrency,
                duration_s=duration_s, num_requests=num_requests, warm_up=warm_up, mix=mix, slo_ttft_ms=slo_ttft_ms,
                slo_tpot_ms=slo_tpot_ms, prompts=prompts, token_ids=token_ids, ignore_eos=ignore_eos,
                extra_body=extra_body, api_key_env=api_key_env, timeout_s=timeout_s, seed=seed,
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"loads that were measured by then are in {output}" if measured else "no load was measured by then"
        err.print(f"stopped; {kept}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    print(said)
    if not is_answered:
        raise typer.Exit(1)
