"""The openai package's client, unchanged, against a running gateway."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from shoal.errors import Overloaded
from shoal.wire.messages import Depth

TEXT = "The pools hand the prompt over."
MESSAGES: list[Any] = [{"role": "user", "content": "Where does the prompt go?"}]


def test_a_completion_has_the_text_and_why_it_ended(gateway: Any) -> None:
    answer = gateway.openai.completions.create(model="smollm2", prompt="Where?", max_tokens=50)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("text_completion", "smollm2")
    assert answer.id.startswith("cmpl-")


def test_a_chat_answer_is_the_assistants_message(gateway: Any) -> None:
    answer = gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", TEXT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")


def test_an_answer_can_be_sent_back_as_part_of_the_conversation(gateway: Any) -> None:
    first = gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES)
    turns = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "And then?"}]
    gateway.openai.chat.completions.create(model="smollm2", messages=turns)
    prompt = gateway.backend.decode(gateway.backend.requests[-1].prompt_token_ids)
    assert TEXT in prompt and "And then?" in prompt


def test_usage_counts_prompt_and_answer(gateway: Any) -> None:
    usage = gateway.openai.completions.create(model="smollm2", prompt=[1, 2, 3], max_tokens=4, n=2).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 8, 11)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert usage.depth == "shallow"


def test_chunks_of_a_stream_join_to_the_answer(gateway: Any) -> None:
    chunks = list(gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert chunks[0].choices[0].delta.content


def test_a_stream_ends_with_its_usage_if_asked(gateway: Any) -> None:
    options = {"include_usage": True}
    *chunks, last = gateway.openai.chat.completions.create(
        model="smollm2", messages=MESSAGES, stream=True, stream_options=options, max_tokens=3
    )
    assert last.choices == []
    assert last.usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_can_come_with_every_chunk(gateway: Any) -> None:
    chunks = gateway.openai.completions.create(
        model="smollm2", prompt=[1], max_tokens=3, stream=True,
        stream_options={"include_usage": True}, extra_body={"stream_options": {"continuous_usage_stats": True}},
    )  # fmt: skip
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_several_prompts_are_numbered_by_prompt(gateway: Any, stream: bool) -> None:
    gateway.backend.text_of = lambda request, choice: f"prompt {request.prompt_token_ids} choice {choice}"
    answer = gateway.openai.completions.create(
        model="smollm2", prompt=[[7], [8], [9]], n=2, max_tokens=50, stream=stream
    )
    texts: dict[int, str] = {}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {
        0: "prompt (7,) choice 0",
        1: "prompt (7,) choice 1",
        2: "prompt (8,) choice 0",
        3: "prompt (8,) choice 1",
        4: "prompt (9,) choice 0",
        5: "prompt (9,) choice 1",
    }
    assert len({request.context.request_id for request in gateway.backend.requests}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_the_text_and_is_named(gateway: Any, stream: bool) -> None:
    answer = gateway.openai.completions.create(
        model="smollm2", prompt="Where?", stop=["never", "pt ov"], max_tokens=50, stream=stream
    )
    choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    assert "".join(choice.text for choice in choices) == "The pools hand the prom"
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", "pt ov")


def test_chat_logprobs_name_tokens_and_alternatives(gateway: Any) -> None:
    answer = gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(one.token for one in content) == TEXT
    assert all(one.logprob == -0.5 and len(one.top_logprobs) == 2 for one in content)
    assert bytes(content[0].bytes) == content[0].token.encode()
    assert content[0].top_logprobs[1].logprob == -1.5


def test_chat_logprobs_come_in_chunks_too(gateway: Any) -> None:
    chunks = gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES, logprobs=True, stream=True)
    tokens = [one for chunk in chunks for one in chunk.choices[0].logprobs.content]
    assert "".join(one.token for one in tokens) == TEXT
    assert not any(one.top_logprobs for one in tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "Where?",
        " two  spaces",
        "Größe 10 µm",
        "日本語のテスト",
        "a👩‍👩‍👧b",
        "<|im_start|>user\nHi<|im_end|>",
        "x<|endoftext|>é",
    ],
)
def test_an_echoed_prompt_and_the_answer_stand_where_their_offsets_say(
    gateway: Any, tokenizer: Any, text: str, stream: bool
) -> None:
    """Characters of several tokens, too, and special tokens, which are part of the text only where they're written."""
    gateway.backend.text = " 10 µm 日本語 👩‍👩‍👧 end"
    answer = gateway.openai.completions.create(
        model="smollm2", prompt=text, echo=True, logprobs=0, max_tokens=50, stream=stream
    )
    choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    whole = "".join(choice.text for choice in choices)
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
    assert whole == text + gateway.backend.text
    assert offsets[0] == 0 and offsets == sorted(offsets) and len(offsets) == len(tokens)
    for token, start, end in zip(tokens, offsets, [*offsets[1:], len(whole)], strict=True):
        if "\N{REPLACEMENT CHARACTER}" in token:
            assert end - start <= 1 + len(token)  # a piece of a character
        elif token:
            assert whole[start:end] == token


def test_token_ids_are_echoed_as_the_text_they_say(gateway: Any, smollm2: Any) -> None:
    ids = smollm2.encode("Größe 日本語", add_special_tokens=False)
    answer = gateway.openai.completions.create(model="smollm2", prompt=[ids, [1, 504]], echo=True, max_tokens=0, n=2)
    assert [choice.text for choice in answer.choices] == ["Größe 日本語"] * 2 + ["The"] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == len(ids) + 2
    assert answer.usage.depth == "full" and gateway.observer.deepened == ["echo"]


def test_an_answer_of_no_tokens_has_no_time_to_its_first(gateway: Any) -> None:
    gateway.openai.completions.create(model="smollm2", prompt="Where?", echo=True, max_tokens=0)
    gateway.observer.wait_finished()
    assert gateway.observer.first == []


def test_depth_can_be_asked_for_in_body_or_header(gateway: Any) -> None:
    create = gateway.openai.completions.create
    assert create(model="smollm2", prompt="a", extra_body={"depth": "full"}).usage.depth == "full"
    assert create(model="smollm2", prompt="a", extra_headers={"x-shoal-depth": "full"}).usage.depth == "full"
    assert create(model="smollm2", prompt="a", extra_body={"depth": "auto"}).usage.depth == "shallow"
    assert [request.depth for request in gateway.backend.requests] == [Depth.FULL, Depth.FULL, Depth.SHALLOW]


def test_models_are_listed(gateway: Any) -> None:
    assert [model.id for model in gateway.openai.models.list()] == ["smollm2"]
    assert gateway.openai.models.retrieve("smollm2").owned_by == "shoal"


def test_errors_come_as_the_clients_own_classes(gateway: Any) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        gateway.openai.completions.create(model="gpt-5", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=3.0)
    assert (wrong.value.code, wrong.value.param) == ("invalid_value", "temperature")


def test_an_error_in_a_stream_reaches_the_client_after_what_was_sent(gateway: Any) -> None:
    gateway.backend.fail_after, gateway.backend.error = 3, Overloaded("out of blocks")
    stream = iter(gateway.openai.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True))
    assert TEXT.startswith("".join(next(stream).choices[0].delta.content for _ in range(3)))
    with pytest.raises(openai.APIError, match="out of blocks"):
        next(stream)
