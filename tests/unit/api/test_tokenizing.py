"""The tokenizer as an endpoint gives the very ids that a request is answered by, and refuses what can't be."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from shoal.api.tokenizer import Tokenizer
from shoal.model.files import locate

CONTEXT = 400
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wo liegt Köln? 🐟"}]


def post(gateway: Any, path: str, **body: Any) -> Any:
    answer = gateway.post(path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_text_has_the_tokens_that_it_is_answered_by(gateway: Any) -> None:
    told = post(gateway, "/tokenize", model="smollm2", prompt="The sea is")
    post(gateway, "/v1/completions", model="smollm2", prompt="The sea is", max_tokens=1)
    assert tuple(told["tokens"]) == gateway.backend.requests[0].prompt_token_ids
    assert told == {"count": 3, "max_model_len": CONTEXT, "tokens": told["tokens"], "token_strs": None}


def test_so_has_a_conversation(gateway: Any, smollm2: Any) -> None:
    told = post(gateway, "/tokenize", messages=TURNS)
    post(gateway, "/v1/chat/completions", model="smollm2", messages=TURNS, max_tokens=1)
    assert tuple(told["tokens"]) == gateway.backend.requests[0].prompt_token_ids
    closed = post(gateway, "/tokenize", messages=TURNS, add_generation_prompt=False)
    opening = smollm2.encode("<|im_start|>assistant\n", add_special_tokens=False)
    assert told["tokens"] == closed["tokens"] + opening


@pytest.mark.parametrize("text", ["", "a", "Köln 🐟", "<|im_start|>user", " x" * 300])
def test_what_has_become_tokens_becomes_the_text_again(gateway: Any, text: str) -> None:
    told = post(gateway, "/tokenize", prompt=text, add_special_tokens=False, return_token_strs=True)
    assert len(told["token_strs"]) == told["count"] == len(told["tokens"])
    assert post(gateway, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
    if text == " x" * 300:
        assert set(told["token_strs"]) == {"Ġx"}


def test_special_tokens_are_put_around_a_text_as_the_tokenizer_does() -> None:
    own = locate("smollm2").tokenizer()  # one of its own, which is changed
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", own.convert_tokens_to_ids("<|im_start|>"))]
    )
    ours = Tokenizer(own)
    try:
        with_special, without = (ours._encode("The sea", add_special_tokens=wanted) for wanted in (True, False))
    finally:
        ours.close()
    assert with_special[1:] == without and len(with_special) == 3


def test_who_renders_conversations_learns_how(gateway: Any, smollm2: Any) -> None:
    told = gateway.http.get("/tokenizer_info").json()
    assert told["chat_template"] == smollm2.chat_template
    assert told["eos_token"] == smollm2.eos_token == "<|im_end|>"
    assert told["tokenizer_class"] and told.keys() >= {"bos_token", "pad_token", "unk_token"}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/tokenize", {}, "missing_field", "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TURNS}, "invalid_value", "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "invalid_value", "add_generation_prompt"),
        ("/tokenize", {"messages": TURNS, "add_special_tokens": True}, "invalid_value", "add_special_tokens"),
        ("/tokenize", {"messages": []}, "missing_field", "prompt"),
        ("/tokenize", {"messages": TURNS * CONTEXT}, "invalid_value", "messages"),
        ("/tokenize", {"prompt": "x" * 190_000}, "context_length_exceeded", "prompt"),
        ("/tokenize", {"prompt": "a " * CONTEXT}, "context_length_exceeded", "prompt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a " * CONTEXT}]},
            "context_length_exceeded",
            "messages",
        ),
        ("/tokenize", {"prompt": "a", "temperature": 0}, "unknown_field", "temperature"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model_not_found", "model"),
        ("/detokenize", {}, "missing_field", "tokens"),
        ("/detokenize", {"tokens": [-1] * 2000}, "invalid_value", "tokens[0]"),
        ("/detokenize", {"tokens": [49152]}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": [1] * (CONTEXT + 1)}, "invalid_value", "tokens"),
        ("/detokenize", {"tokens": "1"}, "invalid_value", "tokens"),
    ],
)
def test_what_can_not_be_is_refused(gateway: Any, path: str, body: Any, code: str, param: str) -> None:
    error = gateway.post(path, body).json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    gateway.observer.wait_finished()
    [(_, endpoint, status, _)] = gateway.observer.finished
    assert (endpoint, status) == (path[1:], 404 if code == "model_not_found" else 400)
    assert not gateway.backend.requests
