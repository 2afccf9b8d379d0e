"""What both clients send, and what they make of the answer."""

from __future__ import annotations

import math

from callers import Caller
from fake_inference import MODEL, TEXT, WORDS, FakeInference

from shoal.client import Choice, Client, Delta, Depth, FinishReason, Message, TokenLogprob, Usage
from shoal.v1 import inference_pb2 as pb

USAGE = Usage(num_prompt_tokens=7, num_output_tokens=3, num_cached_tokens=2, depth=Depth.SHALLOW)

OPTIONS = {
    "model": MODEL, "max_tokens": 3, "n": 2, "seed": 5, "stop": ["!", "?"], "temperature": 0.5, "top_p": 0.25,
    "top_k": 9, "min_tokens": 1, "ignore_eos": True, "logprobs": 2,
    "echo": True, "prompt_logprobs": 3,
}  # fmt: skip


def test_every_option_reaches_the_server(caller: Caller, service: FakeInference) -> None:
    caller.generate("The sea is", depth="full", **OPTIONS)
    assert service.requests == [pb.GenerateRequest(text="The sea is", depth=pb.DEPTH_FULL, **OPTIONS)]
    assert {field.name for field, _ in service.requests[0].ListFields()} == {"text", "depth", *OPTIONS}


def test_what_is_left_out_is_left_to_the_server(caller: Caller, service: FakeInference) -> None:
    caller.stream("The sea is", max_tokens=None, depth=None)
    assert service.requests == [pb.GenerateRequest(text="The sea is")]


def test_a_prompt_is_text_or_token_ids_or_a_conversation(caller: Caller, service: FakeInference) -> None:
    for prompt in ("The sea is", range(3), [{"role": "user", "content": "Hi"}, Message("assistant", "Ahoy")]):
        caller.generate(prompt)
    turns = [pb.ChatMessage(role="user", content="Hi"), pb.ChatMessage(role="assistant", content="Ahoy")]
    assert service.requests == [
        pb.GenerateRequest(text="The sea is"),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, 1, 2])),
        pb.GenerateRequest(chat=pb.Chat(messages=turns)),
    ]


def test_the_whole_answer(caller: Caller) -> None:
    completion = caller.generate(n=2, request_id="mine-1")
    choice = Choice(0, TEXT, (0, 1, 2), FinishReason.LENGTH, None, ())
    assert completion.choices[0] == choice
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert (completion.text, completion.usage) == (TEXT, USAGE)
    assert (completion.model, completion.request_id) == (MODEL, "mine-1")


def test_the_stop_string_and_log_probabilities_come_back(caller: Caller) -> None:
    choice = caller.generate(stop="!", logprobs=2).choices[0]
    assert (choice.finish_reason, choice.stop) == (FinishReason.STOP, "!")
    assert choice.logprobs == (TokenLogprob(0, "Ships ", -0.5, ((8, "Boats ", -1.5), (9, "Cars ", -math.inf))),)


def test_a_prompts_log_probabilities_come_beside_the_choices(caller: Caller, service: FakeInference) -> None:
    told = (TokenLogprob(7, " sea", -0.25), TokenLogprob(6, " is", -math.inf))
    assert caller.generate(prompt_logprobs=0).prompt_logprobs == told
    assert caller.generate().prompt_logprobs == ()
    with Client(caller.target, **caller.settings) as client, client.stream("The sea is", prompt_logprobs=0) as stream:
        next(stream)
        assert stream.prompt_logprobs == told


def test_a_stream_brings_the_same_as_the_whole_answer(caller: Caller) -> None:
    deltas: list[Delta] = []
    usage = caller.stream(into=deltas)
    whole = caller.generate()
    assert tuple(delta.text for delta in deltas) == WORDS
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum((delta.token_ids for delta in deltas), ()) == whole.choices[0].token_ids
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.STOP]
    assert usage == whole.usage == USAGE


def test_each_request_has_an_id_of_its_own(caller: Caller, service: FakeInference) -> None:
    caller.generate()
    caller.generate()
    ids = [metadata["x-request-id"] for metadata in service.metadata]
    assert len(set(ids)) == 2 and all(len(one) == 32 for one in ids)
