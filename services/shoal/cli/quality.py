"""What a shallow prompt costs, and how to make it cost less: the commands of shoal_lab.quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.options import Dtype, DtypeOption, Projector
from shoal.cli.progress import err, progress_bars
from shoal_lab.quality.limits import MIN_PASSAGES, MIN_SAMPLES

Data = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Your own text, .txt or .jsonl; may be given again. Default: Shoal's."),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        metavar="KIND,…",
        help="Of Shoal's own text some, with commas between them: prose, technical, dialogue, code. Default: all.",
    ),
]


def analyze(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("analysis"),
    data: Annotated[
        Path | None, typer.Option(help="Prompts: .txt, or .jsonl with prompt or messages. Default: Shoal's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=MIN_SAMPLES, help="Responses to draw and ask.")] = 200,
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

    Writes analysis.json, report.html and importance.svg. Stopped, it keeps nothing, and begins anew the next time.
    """
    from shoal_lab.quality.commands import run_analyze

    try:
        with progress_bars() as on_progress:
            said = run_analyze(
                model, on_progress, output=output, data=data, num_samples=samples, response_tokens=response_tokens,
                prompt_tokens=prompt_tokens, seed=seed, candidates=candidates, max_loss=max_loss,
                dtype=dtype or DtypeOption.FLOAT32,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped: nothing is kept, the same command begins anew")
        raise typer.Exit(130) from None
    print(said)


def evaluate(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation"),
    tasks: Annotated[
        str,
        typer.Option(
            metavar="TASK,…",
            help="Some, with commas between them: text, greedy, retrieval.",
        ),
    ] = "text,greedy,retrieval",
    skip_layers: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="Numbers of layers: 10,4,6. Controls come with the first. Default: a third."),
    ] = None,
    projector: Projector = None,
    boundary_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,…", help="More full-depth tokens at the prompt's end, too: 16,64. With the first number."
        ),
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Also measure SPEED, and what goes wrong without parts of the method.")
    ] = True,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also measure weights in int8: decode's, and both pools'.")
    ] = False,
    data: Data = None,
    kinds: Kinds = None,
    passages: Annotated[
        int,
        typer.Option(metavar="N", min=2, help="Of each kind of text. Every eighth is also answered greedily."),
    ] = 200,
    cases: Annotated[int, typer.Option(metavar="N", min=2, help="Retrieval cases of each length and depth.")] = 25,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Length of each passage's prompt.")] = 512,
    continuation_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, help="How much of what follows is scored.")
    ] = 128,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the facts, and of the intervals.")] = 0,
    dtype: Dtype = DtypeOption.FLOAT32,
) -> None:
    """What does a shallow prompt cost? Side by side with full depth, a calibrated projection, and negative controls.

    Writes evaluation.json and report.html: perplexity and divergence on text, shared greedy output, facts found.
    Stopped, it keeps nothing, and begins anew the next time.
    """
    from shoal_lab.quality.commands import run_eval

    try:
        with progress_bars() as on_progress:
            said = run_eval(
                model, on_progress, output=output, tasks=tasks, skip_layers=skip_layers,
                boundary_tokens=boundary_tokens, controls=controls, int8=int8, projector=projector or "auto",
                data=tuple(data or ()), kinds=kinds, num_passages=passages, num_cases=cases,
                prompt_tokens=prompt_tokens, continuation_tokens=continuation_tokens, seed=seed,
                dtype=dtype or DtypeOption.FLOAT32,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped: nothing is kept, the same command begins anew")
        raise typer.Exit(130) from None
    print(said)


def calibrate(
    model: Annotated[str, typer.Argument(help="As for serve's --model.", metavar="NAME|DIR|FILE.gguf")],
    skip_layers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=2,
            help="How many of the last layers a shallow prompt will skip: 2 to one less than the model has.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file. Default: beside the model, where serve finds it; for smollm2, here.")
    ] = None,
    data: Data = None,
    kinds: Kinds = None,
    passages: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=MIN_PASSAGES,
            help=f"At most so many of 640 tokens from each text, which must hold {MIN_PASSAGES} at least.",
        ),
    ] = 200,
    steps: Annotated[
        int, typer.Option(metavar="N", min=0, help="Refinement, a passage a step; 0: the closed form alone.")
    ] = 1200,
    sinks_apart: Annotated[
        bool,
        typer.Option(
            "--sinks-apart",
            help="The first four positions keep the paper's matrix: better with little text, worse after many steps.",
        ),
    ] = False,
    learning_rate: Annotated[float, typer.Option(metavar="X", min=0.0, help="Of the refinement.")] = 3e-4,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the order in which passages come.")] = 0,
    dtype: Dtype = DtypeOption.FLOAT32,
) -> None:
    """Learn a K/V projection that loses less than the paper's, at the same cost of serving.

    Writes a projector, which serve takes by itself if it lies beside the model, or by --projector.
    Stopped, it keeps nothing, and begins anew the next time.
    """
    from shoal_lab.quality.calibration import RIDGES, RIDGES_SINKS_APART, CalibrationOptions
    from shoal_lab.quality.commands import run_calibrate

    options = CalibrationOptions(
        skip_layers,
        ridges=RIDGES_SINKS_APART if sinks_apart else RIDGES,
        sinks_apart=sinks_apart,
        num_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    try:
        with progress_bars() as on_progress:
            said = run_calibrate(
                model, on_progress, output=output, data=data or (), kinds=kinds, num_passages=passages,
                dtype=dtype or DtypeOption.FLOAT32, options=options,
            )  # fmt: skip
    except KeyboardInterrupt:
        err.print("stopped: nothing is kept, the same command begins anew")
        raise typer.Exit(130) from None
    print(said)
