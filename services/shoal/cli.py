"""The command line: parse, call, print."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shoal.errors import ShoalError

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
err = Console(stderr=True)


class DepthOption(StrEnum):
    AUTO = "auto"
    SHALLOW = "shallow"
    FULL = "full"


class DtypeOption(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Model = Annotated[
    str | None,
    typer.Option(
        help="A known name (smollm2), a folder with safetensors, or a .gguf file.", metavar="NAME|DIR|FILE.gguf"
    ),
]
SkipLayers = Annotated[
    int | None,
    typer.Option(min=0, help="How many of the last layers a shallow prompt skips. Default: a third. 0: none."),
]
Projector = Annotated[
    str | None,
    typer.Option(help="What shoal calibrate made. Default: the one beside the model, if any.", metavar="FILE|paper"),
]
Dtype = Annotated[DtypeOption | None, typer.Option(help="auto is bfloat16 where the machine computes it natively.")]


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
    prefill_replicas: Annotated[int | None, typer.Option(min=1, help="Default: 1.")] = None,
    decode_replicas: Annotated[int | None, typer.Option(min=1, help="Default: 1.")] = None,
    dtype: Dtype = None,
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
        model={"name": model, "skip_layers": skip_layers, "projector": projector, "dtype": dtype, "depth": depth},
        gateway={"host": host, "port": port, "grpc_port": grpc_port},
        prefill={"replicas": prefill_replicas},
        decode={"replicas": decode_replicas},
        ray={"address": address},
    )
    _serve(settings)


def _serve(settings: Any) -> None:
    from shoal.app.cluster import running

    try:
        with (
            progress_bars() as on_progress,
            running(
                settings, lambda step: on_progress(step.name, step.num_done, step.num_total), show_logs=True
            ) as cluster,
        ):
            on_progress("", 0, 0)
            gateway = settings.gateway
            grpc = f", gRPC on [bold]{gateway.host}:{gateway.grpc_port}[/bold]" if gateway.grpc_port else ""
            err.print(f"serving on [bold]{cluster.url}[/bold]{grpc}; stop with Ctrl-C. Try:")
            body = json.dumps({"model": settings.model.served_name or settings.model.name, "prompt": "Whales are"})
            err.print(
                f"  curl {cluster.url}/v1/completions -H 'content-type: application/json' -d '{body}'",
                markup=False, soft_wrap=True,
            )  # fmt: skip
            try:
                cluster.wait()
            except KeyboardInterrupt:
                err.print(f"stopping: open requests have {settings.handoff.drain_s:g} s to finish")
                raise
    except KeyboardInterrupt:
        err.print("stopped")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer. '-' reads standard input.")],
    model: Model = None,
    depth: Annotated[DepthOption, typer.Option(help="How deep the prompt is encoded.")] = DepthOption.AUTO,
    skip_layers: SkipLayers = None,
    projector: Projector = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    dtype: Dtype = None,
) -> None:
    """Answer once, in this process: both stages, joined by a channel in memory."""
    from shoal.config import load_config
    from shoal.telemetry import configure_logging

    settings = load_config(model={"name": model, "skip_layers": skip_layers, "projector": projector, "dtype": dtype})
    configure_logging("warning", "console")
    text = sys.stdin.read() if prompt == "-" else prompt
    asyncio.run(_generate(settings, text, str(depth), max_tokens, temperature, raw=raw))


async def _generate(settings: Any, text: str, depth: str, max_tokens: int, temperature: float, *, raw: bool) -> None:
    from shoal.errors import ContextLengthExceeded, InvalidRequest
    from shoal.local import open_local
    from shoal.messages import Depth, GenerateRequest, RequestContext, SamplingParams

    with progress_bars() as on_progress:
        async with open_local(settings, on_progress) as local:
            on_progress("", 0, 0)
            served = local.decode.served
            tokenizer = served.files.tokenizer()
            if raw or tokenizer.chat_template is None:
                ids = tokenizer.encode(text)
            else:
                ids = tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
                )
            if not ids:
                raise InvalidRequest("the prompt is empty: there is nothing to continue", param="prompt")
            room = served.max_context_tokens - len(ids)
            if room < 1:
                raise ContextLengthExceeded(
                    f"the prompt has {len(ids)} tokens, the model holds {served.max_context_tokens}"
                )
            request = GenerateRequest(
                RequestContext("generate", timeout_s=settings.gateway.deadline_s),
                served.name,
                tuple(ids),
                Depth.FULL if depth == "full" else Depth.SHALLOW,
                SamplingParams(max_tokens=min(max_tokens, room), temperature=temperature),
            )
            async for output in local.decode.worker.generate(request):
                sys.stdout.write(output.text)
                sys.stdout.flush()
            sys.stdout.write("\n")


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    output: Annotated[Path, typer.Option(help="Folder for the results, and for going on after a stop.")] = Path(
        "analysis"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Prompts: .txt, or .jsonl with prompt or messages. Default: Shoal's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses to draw and ask.")] = 200,
    response_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt; a .txt is cut to this.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same responses.")] = 0,
    candidates: Annotated[
        str | None, typer.Option(help="Numbers of layers to skip: 4,8,10. Default: up to half of them.")
    ] = None,
    max_loss: Annotated[float, typer.Option(min=0.0, help="Nats a token that the recommended number may lose.")] = 0.02,
    dtype: Dtype = DtypeOption.FLOAT32,
) -> None:
    """Which layers does a prompt need? Asks each layer with a virtual gate, and measures what skipping costs.

    Writes analysis.json, report.html and importance.svg. Stopped, the same command goes on where it was.
    """
    from shoal.quality.commands import run_analyze

    try:
        with progress_bars() as on_progress:
            said = run_analyze(
                model, on_progress, output=output, data=data, num_samples=samples, response_tokens=response_tokens,
                prompt_tokens=prompt_tokens, seed=seed, candidates=candidates, max_loss=max_loss,
                dtype=dtype or DtypeOption.FLOAT32,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    print(said)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation"),
    tasks: Annotated[str, typer.Option(help="Some of text,greedy,retrieval,instructions.")] = "text,greedy,retrieval",
    skip_layers: Annotated[
        str | None, typer.Option(help="Numbers of layers: 10,4,6. Controls come with the first. Default: a third.")
    ] = None,
    projector: Projector = None,
    data: Annotated[
        Path | None, typer.Option(help="Text: .txt, or .jsonl with prompt or messages. Default: four kinds of our own.")
    ] = None,
    passages: Annotated[
        int, typer.Option(min=2, help="Of each kind of text. Every eighth is also answered greedily.")
    ] = 200,
    cases: Annotated[int, typer.Option(min=2, help="Retrieval cases of each length and depth.")] = 25,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Length of each passage's prompt.")] = 512,
    continuation_tokens: Annotated[int, typer.Option(min=2, help="How much of what follows is scored.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the facts, and of the intervals.")] = 0,
    dtype: Dtype = DtypeOption.FLOAT32,
) -> None:
    """What does a shallow prompt cost? Side by side with full depth, a calibrated projection, and negative controls.

    Writes evaluation.json and report.html: perplexity and divergence on text, shared greedy output, facts found.
    """
    from shoal.quality.commands import run_eval

    with progress_bars() as on_progress:
        said = run_eval(
            model, on_progress, output=output, tasks=tasks, skip_layers=skip_layers, projector=projector or "auto",
            data=data, num_passages=passages, num_cases=cases, prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens, seed=seed, dtype=dtype or DtypeOption.FLOAT32,
        )  # fmt: skip
    print(said)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    skip_layers: Annotated[int, typer.Option(min=2, help="How many of the last layers a shallow prompt will skip.")],
    output: Annotated[
        Path | None, typer.Option(help="The file. Default: beside the model, where serve finds it.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Your own text, .txt or .jsonl; may be given again. Default: Shoal's.")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Of Shoal's own text: prose,technical,dialogue,code. Default: all.")
    ] = None,
    passages: Annotated[int, typer.Option(min=1, help="At most so many of 640 tokens from each text.")] = 200,
    steps: Annotated[int, typer.Option(min=0, help="Refinement, a passage a step; 0: the closed form alone.")] = 1200,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of the refinement.")] = 3e-4,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which passages come.")] = 0,
    dtype: Dtype = DtypeOption.FLOAT32,
) -> None:
    """Learn a K/V projection that loses less than the paper's, at the same cost of serving.

    Writes a projector, which serve takes by itself if it lies beside the model, or by --projector.
    """
    from shoal.quality.calibration import CalibrationOptions
    from shoal.quality.commands import run_calibrate

    options = CalibrationOptions(skip_layers, num_steps=steps, learning_rate=learning_rate, seed=seed)
    with progress_bars() as on_progress:
        said = run_calibrate(
            model, on_progress, output=output, data=data or (), kinds=kinds, num_passages=passages,
            dtype=dtype or DtypeOption.FLOAT32, options=options,
        )  # fmt: skip
    print(said)


@app.command()
def doctor() -> None:
    """Say what this machine can run: cores, bfloat16, compiler, GPU, NIXL, ports. Exits 1 if serving can't work."""
    from shoal.doctor import Level, examine, render, worst

    findings = examine()
    Console().print(render(findings))
    if worst(findings) is Level.FAIL:
        raise typer.Exit(1)


@app.command()
def demo(
    skip_layers: SkipLayers = None,
    projector: Projector = None,
    dtype: Dtype = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=512, help="Longest answer.")] = 64,
    show_logs: Annotated[bool, typer.Option("--show-logs", help="Also print the replicas' logs.")] = False,
) -> None:
    """See it work once: both pools as processes, a real document, a question, and where the time went."""
    from shoal.config import load_config
    from shoal.demo import run_demo

    settings = load_config(
        model={"skip_layers": skip_layers, "projector": projector, "dtype": dtype}, gateway={"port": 0, "grpc_port": 0}
    )
    with progress_bars() as on_progress:
        run_demo(settings, on_progress, max_tokens=max_tokens, show_logs=show_logs)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr, one a name; the name '' takes them down."""
    bars = Progress(
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def on_progress(name: str, num_done: int, num_total: int) -> None:
        if not name:
            bars.stop()
            return
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=num_total)
        bars.update(tasks[name], completed=num_done, total=num_total)

    lines: set[str] = set()

    def on_progress_in_lines(name: str, num_done: int, num_total: int) -> None:
        """Where nothing can be redrawn: a line when a thing begins, and one when it is done."""
        line = f"{name}: {num_done} of {num_total}"
        if name and (num_done == num_total or not any(said.startswith(f"{name}:") for said in lines)):
            if line not in lines:
                err.print(line, highlight=False)
            lines.add(line)

    if not err.is_terminal:
        yield on_progress_in_lines
        return
    with bars:
        yield on_progress


def main() -> None:
    """Entry point. A ShoalError is a sentence for people, not a traceback."""
    try:
        app()
    except ShoalError as error:
        err.print(f"[red]error:[/red] {error.message}", soft_wrap=True)
        sys.exit(2)
