"""Which settings of the demo's model answer questions about the demo's document as full depth does.

    python tests/benchmarks/demo_settings.py [--skip 2,4,6,8,10] [--boundary 1,16,64,128] [--reuse none] [--json FILE]

Each setting answers demo_questions.jsonl greedily, both stages in one process. An answer is right if it holds one of
the question's facts, and agrees with full depth's if both are right or both wrong. With ``--reuse exact`` the document
is encoded once a setting and depth, which is much faster; prompts that are timed begin differently and share nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import suppress
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.api.schema import Message
from shoal.api.tokenizer import Tokenizer
from shoal.cluster.local import LocalShoal, open_local
from shoal.config import load_config
from shoal.errors import ModelError
from shoal.model.files import locate
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

_QUESTIONS = Path(__file__).with_name("demo_questions.jsonl")


def main() -> None:
    options = _options()
    questions = [json.loads(line) for line in _QUESTIONS.read_text(encoding="utf-8").splitlines()]
    console, found = Console(soft_wrap=True, highlight=False), []
    full: dict[str, dict[str, Any]] = {}
    for skip, boundary, projector in product(options.skip, options.boundary, options.projector):
        model = {"skip_layers": skip, "boundary_tokens": boundary, "projector": projector}
        with suppress(ModelError):  # a projector of another depth, or none
            answers = asyncio.run(_answers(model, questions, options, full))
            found.append(model | _summary(*answers) | {"answers": answers[0]})
            _print_answers(console, model, answers[0])
            if options.json:
                document = {"questions": questions, "max_tokens": options.max_tokens, "settings": found}
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print_table(console, found, len(questions))


async def _answers(
    model: dict[str, Any],
    questions: list[dict[str, Any]],
    options: argparse.Namespace,
    full: dict[str, dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[float]]:
    """Both depths' answers to each question; and how often a shallow first token's time fits in full depth's.

    ``full`` keeps full depth's answers, which are the same with all settings: decode alone computes them.
    """
    document = (resources.files("shoal") / "data" / "shallow-prefill.md").read_text()
    tokenizer = Tokenizer(locate("smollm2").tokenizer())
    reuse = {"reuse": options.reuse}
    answers, speed_ups = [], []

    async with open_local(load_config(model=model, prefill=reuse, decode=reuse)) as local:

        async def ask(prompt: str, depth: Depth, max_tokens: int) -> dict[str, Any]:
            ids = await tokenizer.encode_chat([Message(role="user", content=prompt)])
            return await _answer(local, ids, depth, max_tokens)

        for one in questions:
            prompt = f"{document}\n\n{one['question']}"
            if prompt not in full:
                full[prompt] = await ask(prompt, Depth.FULL, options.max_tokens)
            found = {"full": full[prompt], "shallow": await ask(prompt, Depth.SHALLOW, options.max_tokens)}
            for answer in found.values():
                answer["is_right"] = any(fact.lower() in answer["text"].lower() for fact in one["facts"])
            answers.append(found)
        for number in range(options.rounds):
            prompt = f"{number}\n{document}\n\n{questions[0]['question']}"
            taken = [(await ask(prompt, depth, 1))["ttft_s"] for depth in (Depth.FULL, Depth.SHALLOW)]
            speed_ups.append(taken[0] / taken[1])
    tokenizer.close()
    return answers, speed_ups


async def _answer(local: LocalShoal, ids: tuple[int, ...], depth: Depth, max_tokens: int) -> dict[str, Any]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=0)
    request = GenerateRequest(RequestContext("demo", timeout_s=300), local.decode.served.name, ids, depth, sampling)
    started_s, first_s, text = time.perf_counter(), 0.0, ""
    async for output in local.decode.worker.generate(request):
        first_s = first_s or time.perf_counter()
        text += output.text
    return {"text": text.strip(), "ttft_s": first_s - started_s}


def _summary(answers: list[dict[str, Any]], speed_ups: list[float]) -> dict[str, Any]:
    return {
        "num_right": sum(one["shallow"]["is_right"] for one in answers),
        "num_right_full": sum(one["full"]["is_right"] for one in answers),
        "num_agreeing": sum(one["shallow"]["is_right"] == one["full"]["is_right"] for one in answers),
        "num_equal": sum(one["shallow"]["text"] == one["full"]["text"] for one in answers),
        "speed_up": statistics.median(speed_ups),
        "speed_ups": speed_ups,
    }


def _print_answers(console: Console, model: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    console.print(f"\n{model}", markup=False)
    for number, one in enumerate(answers, start=1):
        for depth, answer in one.items():
            console.print(f"{number:2} {depth:7} {'+' if answer['is_right'] else '-'} {answer['text']!r}", markup=False)


def _print_table(console: Console, found: list[dict[str, Any]], num_questions: int) -> None:
    table = Table("skipped", "boundary tokens", "projector", "agree", "right", "equal", "full / shallow first token")
    for one in found:
        counts = (one["num_agreeing"], one["num_right"], one["num_equal"])
        table.add_row(
            str(one["skip_layers"]), str(one["boundary_tokens"]), Path(one["projector"]).name,
            *(f"{count} of {num_questions}" for count in counts), f"{one['speed_up']:.2f}",
        )  # fmt: skip
    console.print(table)


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", type=numbers, default=[2, 4, 6, 8, 10], help="layers skipped")
    parser.add_argument("--boundary", type=numbers, default=[1, 16, 64, 128], help="boundary tokens")
    parser.add_argument("--projector", nargs="+", default=["paper", "auto"], help="paper, auto, or files")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of prompts that are timed")
    parser.add_argument("--reuse", choices=("none", "exact"), default="none", help="as serve's")
    parser.add_argument("--json", type=Path, help="write the raw figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
