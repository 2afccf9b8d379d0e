"""The command line: parse, call, print."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import shoal
from shoal.cli.bench import bench
from shoal.cli.certs import certs
from shoal.cli.chaos import chaos
from shoal.cli.keys import keys
from shoal.cli.options import (
    Anchors,
    BoundaryTokens,
    DecodeWeights,
    DepthOption,
    Dtype,
    Model,
    Plan,
    PrefillWeights,
    Projector,
    ReuseOption,
    SkipLayers,
)
from shoal.cli.progress import err, progress_bars
from shoal.cli.quality import analyze, calibrate, evaluate
from shoal.errors import ModelError, ShoalError

app = typer.Typer(
    help="""Serve language models with a shallow prefill pool and a deep decode pool.

    Prefill workers run only the first layers of a prompt and project the K/V of the others; decode workers run every
    token from the last prompt token on at full depth.

    Start with [bold]shoal doctor[/bold] (what can this machine run?), then [bold]shoal demo[/bold] (see it work once),
    then [bold]shoal serve[/bold] (OpenAI-compatible HTTP on 127.0.0.1:8000).
    """,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


_MAX_SEED = 2**63 - 1


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"shoal {shoal.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; options win over it.", metavar="[CONFIG.yaml]")
    ] = None,
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="HTTP. Default: 8000; 0: any free one.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="gRPC (shoal.v1.InferenceService). Default: 9000; 0: none.")
    ] = None,
    depth: Annotated[DepthOption | None, typer.Option(help="What a request gets that asks for none.")] = None,
    skip_layers: SkipLayers = None,
    projector: Projector = None,
    plan: Plan = None,
    anchors: Anchors = None,
    boundary_tokens: BoundaryTokens = None,
    prefill_replicas: Annotated[int | None, typer.Option(min=1, help="Default: 1.")] = None,
    decode_replicas: Annotated[int | None, typer.Option(min=1, help="Default: 1.")] = None,
    reuse: Annotated[
        ReuseOption | None,
        typer.Option(help="Whether prompts that begin alike share K/V, in both pools. any: true K/V of answers, too."),
    ] = None,
    dtype: Dtype = None,
    prefill_weights: PrefillWeights = None,
    decode_weights: DecodeWeights = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="Who may ask, as shoal keys writes it. Default: anybody.", metavar="FILE")
    ] = None,
    tls: Annotated[
        str | None,
        typer.Option(
            help="Where shoal certs put the certificates that the processes know one another by; or off.",
            metavar="DIR|off",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="auto joins the running Ray cluster. Default: a private one.")
    ] = None,
) -> None:
    """Serve a model until Ctrl-C: OpenAI-compatible HTTP, and gRPC, in front of the two pools.

    Each replica is a process of its own. Ctrl-C gives open requests a moment (handoff.drain_s) to finish, then takes
    everything down; a second Ctrl-C doesn't wait for them.
    """
    from shoal.config import load_config

    settings = load_config(
        config,
        model={
            "name": model,
            "skip_layers": skip_layers,
            "projector": projector,
            "dtype": dtype,
            "depth": depth,
            "plan": plan,
            "anchors": anchors,
            "boundary_tokens": boundary_tokens,
        },
        gateway={
            "host": host,
            "port": port,
            "grpc_port": grpc_port,
            "keys_file": None if keys_file is None else keys_file.absolute(),
        },
        prefill={"replicas": prefill_replicas, "reuse": reuse, "weights": prefill_weights},
        decode={"replicas": decode_replicas, "reuse": reuse, "weights": decode_weights},
        ray={"address": address},
        tls=tls if tls in {None, "off"} else {"folder": Path(tls).absolute()},
    )
    _serve(settings)


def _serve(settings: Any) -> None:
    from shoal.cluster.start import running

    _check_files(settings)
    try:
        with (
            progress_bars() as on_progress,
            running(
                settings, lambda step: on_progress(step.name, step.num_done, step.num_total), show_logs=True
            ) as cluster,
        ):
            on_progress("", 0, 0)
            err.print(f"{where(settings.gateway, cluster.url)}; stop with Ctrl-C. Try:")
            err.print(f"  {_example(settings, cluster.url)}", markup=False, soft_wrap=True)
            try:
                cluster.wait()
            except KeyboardInterrupt:
                with suppress(OSError):  # the terminal may be gone
                    err.print(f"stopping: open requests have {settings.handoff.drain_s:g} s to finish")
                raise
    except KeyboardInterrupt:
        with suppress(OSError):
            err.print("stopped")


def where(gateway: Any, url: str) -> str:
    """At which doors it serves, as markup: an IPv6 address in brackets would be taken for some."""
    from shoal.process.machine import EVERY_INTERFACE
    from shoal.wire.ports import join_address

    everywhere = " (and on every interface)" if gateway.host in EVERY_INTERFACE else ""
    told = f"serving on [bold]{escape(url)}[/bold]{everywhere}"
    if gateway.grpc_port:
        told += f", gRPC on [bold]{escape(join_address(gateway.host, gateway.grpc_port))}[/bold]"
    return told


def _check_files(settings: Any) -> None:
    """What is wrong in files is said before anything starts. Of a cluster, each host has those of its own roles."""
    from shoal.api.keys import read_keys
    from shoal.api.tls import expiry, server_context
    from shoal.cluster.certificates import ROLES
    from shoal.model.files import locate
    from shoal.wire.certificates import read_certificate, require_trust

    is_gateway_here = settings.ray.address is None or settings.gateway.resource is None
    keys_file = settings.gateway.keys_file
    if keys_file is not None and (is_gateway_here or keys_file.exists()):
        read_keys(keys_file)
    if settings.gateway.tls is not None and is_gateway_here:
        server_context(settings.gateway.tls)
        expiry(settings.gateway.tls)
    if settings.ray.address is not None:
        return
    locate(settings.model.name)
    if settings.has_peer_tls:
        for role in ROLES:
            read_certificate(settings.tls.folder, role)
        require_trust(settings.tls.folder, ("gateway", "prefill"))


def _example(settings: Any, url: str) -> str:
    """A first request, in words of a shell."""
    tls = settings.gateway.tls
    options = [
        *(() if tls is None else ("--cacert CA.crt",)),
        *(() if tls is None or tls.client_ca_file is None else ("--cert CLIENT.crt --key CLIENT.key",)),
        *(() if settings.gateway.keys_file is None else ("-H 'authorization: Bearer KEY'",)),
    ]
    body = json.dumps({"model": _public_name(settings.model), "prompt": "Whales are"})
    return " ".join(["curl", *options, f"{url}/v1/completions", "-H 'content-type: application/json'", f"-d '{body}'"])


def _public_name(model: Any) -> str:
    from shoal.model.files import locate

    try:
        return model.served_name or locate(model.name).model_id
    except ModelError:  # it's on the replicas' machines
        return str(model.name)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer. '-' reads standard input.")],
    model: Model = None,
    depth: Annotated[DepthOption | None, typer.Option(help="How deep the prompt is encoded.")] = None,
    skip_layers: SkipLayers = None,
    projector: Projector = None,
    plan: Plan = None,
    anchors: Anchors = None,
    boundary_tokens: BoundaryTokens = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=_MAX_SEED, help="Makes a temperature's answer repeatable. Default: any.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    dtype: Dtype = None,
    prefill_weights: PrefillWeights = None,
    decode_weights: DecodeWeights = None,
) -> None:
    """Answer once, in this process: both stages, joined by a channel in memory."""
    from shoal.config import load_config
    from shoal.telemetry import configure_logging

    settings = load_config(
        model={
            "name": model,
            "depth": depth,
            "skip_layers": skip_layers,
            "projector": projector,
            "dtype": dtype,
            "plan": plan,
            "anchors": anchors,
            "boundary_tokens": boundary_tokens,
        },
        prefill={"weights": prefill_weights},
        decode={"weights": decode_weights},
    )
    configure_logging("warning", "console", error_text=True)  # of prompts of one's own
    text = sys.stdin.read() if prompt == "-" else prompt
    seed = secrets.randbelow(_MAX_SEED + 1) if seed is None else seed
    asyncio.run(_generate(settings, text, max_tokens, temperature, seed, raw=raw))


async def _generate(settings: Any, text: str, max_tokens: int, temperature: float, seed: int, *, raw: bool) -> None:
    from shoal.api.schema import Message
    from shoal.api.tokenizer import Tokenizer
    from shoal.cluster.local import open_local
    from shoal.errors import ContextLengthExceeded, InvalidRequest
    from shoal.model.files import locate
    from shoal.wire.messages import Depth, GenerateRequest, PromptOutline, RequestContext, SamplingParams

    raw_tokenizer = locate(settings.model.name).tokenizer()
    tokenizer, outline = Tokenizer(raw_tokenizer), PromptOutline()
    if raw or raw_tokenizer.chat_template is None:
        ids = await tokenizer.encode(text)
    else:
        messages = [Message(role="user", content=text)]
        ids = await tokenizer.encode_chat(messages)
        outline = await tokenizer.outline_chat(messages, ids)
    tokenizer.close()
    if not ids:  # before anything is loaded
        raise InvalidRequest("the prompt is empty: there is nothing to continue", param="prompt")
    with progress_bars() as on_progress:
        async with open_local(settings, on_progress) as local:
            on_progress("", 0, 0)
            served = local.decode.served
            room = served.max_context_tokens - len(ids)
            if room < 1:
                raise ContextLengthExceeded(
                    f"the prompt has {len(ids)} tokens, the model holds {served.max_context_tokens}"
                )
            request = GenerateRequest(
                RequestContext("generate", timeout_s=settings.gateway.deadline_s),
                served.name,
                ids,
                Depth.FULL if settings.model.depth == "full" else Depth.SHALLOW,
                SamplingParams(max_tokens=min(max_tokens, room), temperature=temperature, seed=seed),
                outline=outline,
            )
            async for output in local.decode.worker.generate(request):
                sys.stdout.write(output.text)
                sys.stdout.flush()
            sys.stdout.write("\n")


app.command()(analyze)
app.command()(calibrate)
app.command(name="eval")(evaluate)
app.command()(bench)
app.command()(certs)
app.command()(chaos)
app.add_typer(keys, name="keys")


@app.command()
def doctor() -> None:
    """Say what this machine can run: cores, bfloat16, compiler, GPU, NIXL, ports. Exits 1 if serving can't work."""
    from shoal.cli.doctor import Level, examine, render, worst

    findings = examine()
    Console().print(render(findings))
    if worst(findings) is Level.FAIL:
        raise typer.Exit(1)


@app.command()
def demo(
    skip_layers: SkipLayers = None,
    projector: Projector = None,
    plan: Plan = None,
    anchors: Anchors = None,
    boundary_tokens: BoundaryTokens = None,
    dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer.")] = 64,
    show_logs: Annotated[bool, typer.Option("--show-logs", help="Also print the replicas' logs.")] = False,
) -> None:
    """See it work once: both pools as processes, a real document, a question, and where the time went."""
    from shoal.cli.demo import run_demo
    from shoal.config import load_config

    settings = load_config(
        model={
            "skip_layers": skip_layers,
            "projector": projector,
            "dtype": dtype,
            "plan": plan,
            "anchors": anchors,
            "boundary_tokens": boundary_tokens,
        },
        gateway={"port": 0, "grpc_port": 0},
    )
    with progress_bars() as on_progress:
        run_demo(settings, on_progress, max_tokens=max_tokens, show_logs=show_logs)


def main() -> None:
    """Entry point. A ShoalError is a sentence for people, not a traceback."""
    try:
        app()
    except ShoalError as error:
        err.print(f"[red]error:[/red] {escape(error.message)}", soft_wrap=True)
        sys.exit(2)
