"""What a body means to the decode pool."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from shoal.api import validation
from shoal.api.schema import ChatBody, CompletionBody, parse
from shoal.api.validation import ServedModel, check_limits, depth_of, generate_requests
from shoal.config import GatewayConfig
from shoal.errors import ContextLengthExceeded, InvalidRequest
from shoal.wire.messages import Depth, GenerateRequest, RequestContext, SamplingParams

MODEL = ServedModel("tiny", max_context_tokens=100, vocab_size=50)
CONTEXT = RequestContext("id", timeout_s=60)


def completion(**fields: object) -> CompletionBody:
    return parse(CompletionBody, json.dumps({"model": "tiny", "prompt": "a", **fields}).encode())


def chat(**fields: object) -> ChatBody:
    return parse(
        ChatBody, json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}], **fields}).encode()
    )


def request_of(body: CompletionBody | ChatBody, num_prompt_tokens: int = 10) -> GenerateRequest:
    [request] = generate_requests(body, [[1] * num_prompt_tokens], MODEL, CONTEXT)
    return request


def test_a_bare_completion_has_openais_defaults() -> None:
    request = request_of(completion(seed=3))
    assert request.sampling == SamplingParams(max_tokens=16, seed=3)
    assert (request.model, request.depth, request.context) == ("tiny", Depth.SHALLOW, CONTEXT)
    assert request.prompt_token_ids == (1,) * 10


def test_every_sampling_field_arrives() -> None:
    body = completion(
        max_tokens=9, temperature=0, top_p=0.5, top_k=7, seed=11, n=3, logprobs=2, stop=["x", "y"], min_tokens=4,
        ignore_eos=True,
    )  # fmt: skip
    assert request_of(body).sampling == SamplingParams(
        max_tokens=9, temperature=0, top_p=0.5, top_k=7, seed=11, num_choices=3, num_logprobs=2, stop=("x", "y"),
        min_tokens=4, ignore_eos=True,
    )  # fmt: skip


@pytest.mark.parametrize(("fields", "num_logprobs"), [({"logprobs": False}, None), ({"logprobs": True}, 0)], ids=str)
def test_chat_asks_for_logprobs_in_two_fields(fields: dict[str, object], num_logprobs: int | None) -> None:
    assert request_of(chat(**fields)).sampling.num_logprobs == num_logprobs


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert request_of(chat(max_tokens=5, max_completion_tokens=6)).sampling.max_tokens == 6
    assert request_of(chat(max_tokens=5)).sampling.max_tokens == 5


@pytest.mark.parametrize("top_k", [-1, 0, None])
def test_no_top_k_is_no_restriction(top_k: int | None) -> None:
    assert request_of(completion(top_k=top_k)).sampling.top_k == 0


def test_a_seed_is_fixed_for_each_request_that_has_none() -> None:
    seeds = {request_of(completion()).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_of_one_request_have_ids_and_seeds_of_their_own() -> None:
    requests = generate_requests(completion(), [[1], [2, 3]], MODEL, CONTEXT)
    assert [request.prompt_token_ids for request in requests] == [(1,), (2, 3)]
    assert [request.context.request_id for request in requests] == ["id-0", "id-1"]
    assert requests[0].sampling.seed != requests[1].sampling.seed


@pytest.mark.parametrize(
    ("asked", "default", "depth"),
    [
        (None, Depth.AUTO, Depth.SHALLOW),
        (None, Depth.FULL, Depth.FULL),
        ("auto", Depth.FULL, Depth.SHALLOW),
        ("full", Depth.AUTO, Depth.FULL),
        ("shallow", Depth.FULL, Depth.SHALLOW),
    ],
)
def test_the_clients_depth_wins_over_the_models(asked: str | None, default: Depth, depth: Depth) -> None:
    assert depth_of(completion(depth=asked), replace(MODEL, default_depth=default)) is depth


@pytest.mark.parametrize("asked", [None, "auto", "full"])
@pytest.mark.parametrize("field", [{"echo": True}, {"prompt_logprobs": 0}])
@pytest.mark.parametrize("default", Depth)
def test_what_is_told_of_a_prompt_needs_full_depth(asked: str | None, field: dict[str, object], default: Depth) -> None:
    body = completion(depth=asked, **field)
    check_limits(body, MODEL, GatewayConfig())
    assert depth_of(body, replace(MODEL, default_depth=default)) is Depth.FULL


@pytest.mark.parametrize(
    ("fields", "num_prompt_logprobs"),
    [
        ({}, None), ({"logprobs": 3}, None), ({"echo": True}, None), ({"echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0), ({"prompt_logprobs": 2, "logprobs": 5}, 2),
        ({"prompt_logprobs": 2, "logprobs": 5, "echo": True}, 5),
    ],
)  # fmt: skip
def test_a_prompts_log_probabilities_are_asked_for_in_two_ways(
    fields: dict[str, object], num_prompt_logprobs: int | None
) -> None:
    assert request_of(completion(**fields)).sampling.num_prompt_logprobs == num_prompt_logprobs


@pytest.mark.parametrize(
    ("body", "num_told"),
    [
        (completion(prompt_logprobs=4, max_tokens=1, n=2), 2 * 2 * 10 * 5),
        (completion(echo=True, logprobs=1, max_tokens=0, n=3), 2 * 3 * 10 * 2),
        (completion(echo=True, logprobs=1, prompt_logprobs=4, max_tokens=0), 2 * 10 * 5 * 2),  # told twice
        (chat(prompt_logprobs=4, max_tokens=1, n=2), 2 * 10 * 5),  # told once
    ],
)
def test_an_answer_has_no_more_log_probabilities_of_prompts_than_the_gateway_can_hold(
    body: CompletionBody | ChatBody, num_told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MAX_TOLD", num_told)
    assert len(generate_requests(body, [[1] * 10] * 2, MODEL, CONTEXT)) == 2
    monkeypatch.setattr(validation, "MAX_TOLD", num_told - 1)
    with pytest.raises(InvalidRequest, match=f"would have {num_told}: ask for fewer") as refused:
        generate_requests(body, [[1] * 10] * 2, MODEL, CONTEXT)
    assert refused.value.param == body.needs_full_depth


def test_a_prompt_that_is_only_scored_may_fill_the_context() -> None:
    body = completion(echo=True, max_tokens=0)
    assert request_of(body, num_prompt_tokens=100).sampling.max_tokens == 0
    with pytest.raises(ContextLengthExceeded):
        request_of(body, num_prompt_tokens=101)


def test_prompt_and_answer_may_fill_the_context_and_no_more() -> None:
    assert request_of(completion(max_tokens=90)).sampling.max_tokens == 90
    with pytest.raises(ContextLengthExceeded, match="10 tokens and an answer of up to 91 are more than"):
        request_of(completion(max_tokens=91))


def test_text_parts_of_a_message_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "one\ntwo"


def test_of_many_wrong_turns_one_error_is_built() -> None:
    raw = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}, *[1] * 1000]}).encode()
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate_json(raw)
    assert [error["loc"] for error in caught.value.errors()] == [("messages", 1)]
    with pytest.raises(InvalidRequest) as refused:
        parse(ChatBody, raw)
    assert refused.value.param == "messages[1]"
