"""HTTP and gRPC have one validator: what is wrong at one door is wrong at the other, and is told alike."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from inference_server import Inference, told

from shoal.v1 import inference_pb2 as pb

VOCAB, CONTEXT = 49152, 400
USER = {"role": "user", "content": "Hi"}


@dataclass(frozen=True)
class Case:
    """A request at both doors; ``http_param`` only where the field has another name there."""

    param: str
    code: str = "invalid_value"
    http_param: str | None = None
    status: int = 400
    text: str | None = None
    ids: list[int] | None = None
    chat: list[dict[str, str]] | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def http(self) -> tuple[str, dict[str, Any]]:
        fields = {"model": "smollm2", "stream": False, **self.fields}
        if self.chat is not None:
            if "logprobs" in fields:
                fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
            return "/v1/chat/completions", {**fields, "messages": self.chat}
        # The default that gRPC has.
        fields.setdefault("max_tokens", None if self.ids is None else 1)
        return "/v1/completions", {**fields, "prompt": self.text if self.ids is None else self.ids}

    @property
    def grpc(self) -> dict[str, Any]:
        fields = dict(self.fields)
        if "depth" in fields:
            fields["depth"] = 99
        if self.chat is not None:
            return {**fields, "chat": pb.Chat(messages=[pb.ChatMessage(**turn) for turn in self.chat])}
        if self.ids is not None:
            return {**fields, "token_ids": pb.TokenIds(ids=self.ids)}
        return {**fields, "text": self.text}


def text(param: str, code: str = "invalid_value", **fields: Any) -> Case:
    return Case(param, code, text="Hello", fields=fields)


def chat(param: str, code: str = "invalid_value", http_param: str | None = None, **fields: Any) -> Case:
    return Case(param, code, http_param, chat=[USER], fields=fields)


CASES = [
    # --- prompts
    Case("text", text="", http_param="prompt"),
    Case("text", "context_length_exceeded", text="word " * 500, http_param="prompt"),
    Case("token_ids", ids=[], http_param="prompt"),
    Case("token_ids", ids=[-1], http_param="prompt"),
    Case("token_ids", ids=[1, VOCAB], http_param="prompt"),
    Case("token_ids", "context_length_exceeded", ids=[1] * CONTEXT, http_param="prompt"),
    Case("token_ids", "context_length_exceeded", ids=[1] * 390, fields={"max_tokens": 11}, http_param="prompt"),
    Case("chat.messages", chat=[], http_param="messages"),
    Case("chat.messages", chat=[USER] * (CONTEXT + 1), http_param="messages"),
    Case("chat.messages[1].role", chat=[USER, {"role": "tool", "content": ""}], http_param="messages[1].role"),
    Case("chat.messages[0].role", chat=[{"role": "", "content": ""}], http_param="messages[0].role"),
    Case(
        "chat.messages",
        "context_length_exceeded",
        chat=[{"role": "user", "content": "word " * 500}],
        http_param="messages",
    ),
    # --- the model
    Case("model", "model_not_found", status=404, text="Hello", fields={"model": "gpt-5"}),
    Case("model", "model_not_found", status=404, chat=[USER], fields={"model": "gpt-5"}),
    # --- numbers
    *(
        text(name, **{name: value})
        for name, value in [
            ("n", 0), ("n", -1), ("n", 17), ("n", 2**31 - 1),
            ("max_tokens", 0), ("max_tokens", -1),
            ("min_tokens", -1),
            ("temperature", -0.1), ("temperature", 2.1),
            ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", float("-inf")),
            ("top_p", 0.0), ("top_p", 1.01), ("top_p", float("nan")),
            ("top_k", -2),
            ("logprobs", -1), ("logprobs", 21),
            ("depth", "abyss"),
        ]
    ),
    text("min_tokens", min_tokens=5, max_tokens=4),
    Case("text", "context_length_exceeded", "prompt", text="Hello", fields={"max_tokens": 2**31 - 1}),
    chat("chat.messages", "context_length_exceeded", "messages", max_tokens=CONTEXT),
    chat("n", n=17),
    chat("logprobs", http_param="top_logprobs", logprobs=21),
    chat("logprobs", http_param="top_logprobs", logprobs=-1),
    chat("depth", depth="abyss"),
    # --- what is told of the prompt
    text("prompt_logprobs", prompt_logprobs=-1),
    text("prompt_logprobs", prompt_logprobs=21),
    text("max_tokens", max_tokens=0, logprobs=1),
    chat("max_tokens", max_tokens=0),
    chat("echo", "unknown_field", echo=True),
    Case("token_ids", "context_length_exceeded", "prompt", ids=[1] * 401, fields={"max_tokens": 0, "echo": True}),
    # --- stop
    text("stop", stop=["a"] * 5),
    text("stop", stop=["a" * 257]),
    text("stop", stop=["a", ""]),
    chat("stop", stop=[""]),
]  # fmt: skip


def name_of(case: Case) -> str:
    return f"{case.param}-{case.fields or case.text or case.ids or case.chat}"[:60]


@pytest.mark.parametrize("case", CASES, ids=name_of)
async def test_what_is_wrong_by_http_is_refused_in_the_same_way(gateway: Any, case: Case) -> None:
    path, body = case.http
    response = await asyncio.to_thread(gateway.http.post, path, content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        case.status,
        case.code,
        case.http_param or case.param,
    )
    assert gateway.backend.requests == []


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
async def test_what_is_wrong_by_grpc_is_refused_in_the_same_way(inference: Inference, case: Case, method: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(inference, method)(**case.grpc)
    assert told(refused.value) == (case.status, case.code, case.param)
    assert inference.backend.requests == []
