"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class DepthOption(StrEnum):
    AUTO = "auto"
    SHALLOW = "shallow"
    FULL = "full"


class DtypeOption(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class ReuseOption(StrEnum):
    NONE = "none"
    EXACT = "exact"
    ANY = "any"


Model = Annotated[
    str | None,
    typer.Option(
        help="A known name (smollm2), a folder with safetensors, or a .gguf file.", metavar="NAME|DIR|FILE.gguf"
    ),
]
SkipLayers = Annotated[
    int | None,
    typer.Option(min=0, help="How many of the last layers a prompt skips. Default: a third, of smollm2 6. 0: none."),
]
Projector = Annotated[
    str | None,
    typer.Option(help="What shoal calibrate made. Default: the one beside the model, if any.", metavar="FILE|paper"),
]


class PlanOption(StrEnum):
    POP = "pop"
    SPEED = "speed"


Plan = Annotated[
    PlanOption | None,
    typer.Option(help="pop projects K/V for the skipped layers; speed leaves them out, for checkpoints tuned for it."),
]
Anchors = Annotated[
    str | None,
    typer.Option(
        help="Of --plan speed: deep layers see of the prompt bos, its first token (default); system, all before "
        "the user's first words; or its first N tokens.",
        metavar="bos|system|N",
    ),
]
BoundaryTokens = Annotated[
    int | None, typer.Option(min=1, help="How many tokens at a prompt's end are full depth. Default: 1.")
]


class WeightsOption(StrEnum):
    AUTO = "auto"
    INT8 = "int8"


PrefillWeights = Annotated[
    WeightsOption | None,
    typer.Option(help="int8: prompts in less time (with AMX in more), encoded about as well. Default: as --dtype."),
]
DecodeWeights = Annotated[
    WeightsOption | None,
    typer.Option(help="int8: tokens in less time and memory, for about the same answers. Default: as --dtype."),
]
Dtype = Annotated[DtypeOption | None, typer.Option(help="auto is bfloat16 where it's quicker than float32.")]
