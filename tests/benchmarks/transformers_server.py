"""transformers behind OpenAI's completions: what a plain batched greedy loop over its K/V cache does, and no more.

    python tests/benchmarks/transformers_server.py FOLDER --port 8100 [--threads 2]

A request says in ``batch`` how many come together; they start as one batch when all are there, and end together. So
their prompts and answers must be equally long. There is no continuous batching, since transformers' models have none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM


class Body(BaseModel):
    prompt: list[int]
    max_tokens: int
    batch: int = 1


@dataclass
class Waiting:
    """A request and where its tokens go; ``None`` ends them."""

    body: Body
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)


class Batcher:
    """Gathers requests into batches, and runs one batch at a time in a thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._gathered: list[Waiting] = []
        # One thread for all batches: each thread that runs torch has OpenMP threads of its own.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._runs: set[asyncio.Task[None]] = set()

    def add(self, waiting: Waiting) -> None:
        self._gathered.append(waiting)
        if len(self._gathered) == waiting.body.batch:
            run = asyncio.create_task(self._run(self._gathered))
            self._runs.add(run)
            run.add_done_callback(self._runs.discard)
            self._gathered = []

    async def _run(self, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()

        def tell(tokens: list[int]) -> None:
            for waiting, token in zip(batch, tokens, strict=True):
                waiting.tokens.put_nowait(token)

        try:
            prompts = torch.tensor([waiting.body.prompt for waiting in batch])
            await loop.run_in_executor(
                self._thread, self._generate, prompts, batch[0].body.max_tokens,
                lambda tokens: loop.call_soon_threadsafe(tell, tokens),
            )  # fmt: skip
        finally:
            for waiting in batch:
                loop.call_soon_threadsafe(waiting.tokens.put_nowait, None)

    def _generate(self, ids: torch.Tensor, max_tokens: int, tell: Callable[[list[int]], object]) -> None:
        """Greedy, whatever ends an answer; ``tell`` gets each step's tokens."""
        cache = None
        with torch.inference_mode():
            for _ in range(max_tokens):
                output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                tell(ids[:, 0].tolist())


def application(model: Any) -> FastAPI:
    app = FastAPI()
    batcher = Batcher(model)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def completions(body: Body) -> StreamingResponse:
        waiting = Waiting(body)
        batcher.add(waiting)
        return StreamingResponse(_events(waiting), media_type="text/event-stream")

    return app


async def _events(waiting: Waiting) -> AsyncIterator[str]:
    num_tokens = 0
    while (token := await waiting.tokens.get()) is not None:
        num_tokens += 1
        yield _event({"choices": [{"index": 0, "text": f"{token} ", "finish_reason": None}]})
    usage = {"prompt_tokens": len(waiting.body.prompt), "completion_tokens": num_tokens}
    yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Loaded models are in evaluation mode.
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    uvicorn.run(application(model), host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
