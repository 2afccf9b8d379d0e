"""Whatever a client sends gets a clear answer, reaches no pool, and leaves the server as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from shoal.api import endpoint, tokenizing
from shoal.api.schema import IGNORED_FIELDS, Body, ChatBody, Ignored, Message, parse

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
VOCAB = 49152


Post = tuple[str, dict[str, object]]


def completion(**fields: object) -> Post:
    return COMPLETIONS, {"model": "smollm2", "prompt": "Hello", **fields}


def chat(**fields: object) -> Post:
    return CHAT, {"model": "smollm2", "messages": [USER], **fields}


def assert_refused(gateway: Any, response: Any, status: int, param: str | None, code: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert response.headers["x-request-id"]
    assert gateway.backend.requests == []
    assert gateway.post(*completion()).status_code == 200


BODIES = [
    # --- prompts
    (completion(prompt=""), "prompt", "invalid_value"),
    (completion(prompt=[]), "prompt", "invalid_value"),
    (completion(prompt=[""]), "prompt", "invalid_value"),
    (completion(prompt=[[]]), "prompt", "invalid_value"),
    (completion(prompt=[[1], []]), "prompt", "invalid_value"),
    (completion(prompt=None), "prompt", "invalid_value"),
    (completion(prompt=7), "prompt", "invalid_value"),
    (completion(prompt={"text": "a"}), "prompt", "invalid_value"),
    (completion(prompt=["a", 1]), "prompt", "invalid_value"),
    (completion(prompt=[1, True]), "prompt", "invalid_value"),
    (completion(prompt=[1, 2.0]), "prompt", "invalid_value"),
    (completion(prompt=[[1, "a"]]), "prompt", "invalid_value"),
    (completion(prompt=[[[1]]]), "prompt", "invalid_value"),
    (completion(prompt=[-1]), "prompt", "invalid_value"),
    (completion(prompt=[VOCAB]), "prompt", "invalid_value"),
    (completion(prompt=[10**30]), "prompt", "invalid_value"),
    (completion(prompt=["a"] * 5), "prompt", "invalid_value"),
    (completion(prompt=[1] * 400), "prompt", "context_length_exceeded"),
    (completion(prompt=[1] * 390, max_tokens=11), "prompt", "context_length_exceeded"),
    (completion(prompt="word " * 500), "prompt", "context_length_exceeded"),
    (completion(prompt=[[1], [1] * 400]), "prompt", "context_length_exceeded"),
    ((COMPLETIONS, {"model": "smollm2"}), "prompt", "missing_field"),
    ((COMPLETIONS, {"prompt": "a"}), "model", "missing_field"),
    (completion(model=None), "model", "invalid_value"),
    (completion(model=["smollm2"]), "model", "invalid_value"),
    # --- numbers
    (completion(n=0), "n", "invalid_value"),
    (completion(n=17), "n", "invalid_value"),
    (completion(n=10**9), "n", "invalid_value"),
    (completion(n=10**40), "n", "invalid_value"),
    (completion(n=1.5), "n", "invalid_value"),
    (completion(n="2"), "n", "invalid_value"),
    (completion(n=True), "n", "invalid_value"),
    (completion(max_tokens=0), "max_tokens", "invalid_value"),
    (completion(max_tokens=-1), "max_tokens", "invalid_value"),
    (completion(max_tokens=10**12), "prompt", "context_length_exceeded"),
    (completion(min_tokens=17), "min_tokens", "invalid_value"),
    (completion(min_tokens=-1), "min_tokens", "invalid_value"),
    (completion(temperature=-0.1), "temperature", "invalid_value"),
    (completion(temperature=2.1), "temperature", "invalid_value"),
    (completion(temperature="hot"), "temperature", "invalid_value"),
    (completion(temperature=True), "temperature", "invalid_value"),
    (completion(top_p=0), "top_p", "invalid_value"),
    (completion(top_p=1.01), "top_p", "invalid_value"),
    (completion(top_k=-2), "top_k", "invalid_value"),
    (completion(top_k=0.5), "top_k", "invalid_value"),
    (completion(seed=2**63), "seed", "invalid_value"),
    (completion(seed="lucky"), "seed", "invalid_value"),
    (completion(logprobs=21), "logprobs", "invalid_value"),
    (completion(logprobs=True), "logprobs", "invalid_value"),
    (chat(logprobs=1), "logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(top_logprobs=3), "top_logprobs", "invalid_value"),
    # --- stop, stream, depth
    (completion(stop=["a"] * 5), "stop", "invalid_value"),
    (completion(stop="a" * 257), "stop", "invalid_value"),
    (completion(stop=""), "stop", "invalid_value"),
    (completion(stop=["a", ""]), "stop", "invalid_value"),
    (completion(stop=[1]), "stop", "invalid_value"),
    (completion(stop=1), "stop", "invalid_value"),
    (completion(stream="yes"), "stream", "invalid_value"),
    (completion(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    (completion(stream=True, stream_options=[]), "stream_options", "invalid_value"),
    (completion(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "invalid_value"),
    (completion(stream=True, stream_options={"speed": 1}), "stream_options.speed", "unknown_field"),
    (completion(depth="deep"), "depth", "invalid_value"),
    (completion(depth=3), "depth", "invalid_value"),
    # --- what is told of the prompt
    (completion(echo=1), "echo", "invalid_value"),
    (completion(echo=True, depth="shallow"), "depth", "invalid_value"),
    (completion(prompt_logprobs=0, depth="shallow"), "depth", "invalid_value"),
    (chat(prompt_logprobs=0, depth="shallow"), "depth", "invalid_value"),
    (completion(echo=True, logprobs=21), "logprobs", "invalid_value"),
    (completion(echo=True, max_tokens=-1), "max_tokens", "invalid_value"),
    (completion(echo=False, logprobs=1, max_tokens=0), "max_tokens", "invalid_value"),
    (completion(prompt_logprobs=-1), "prompt_logprobs", "invalid_value"),
    (completion(prompt_logprobs=True), "prompt_logprobs", "invalid_value"),
    (completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "invalid_value"),
    (chat(prompt_logprobs=21), "prompt_logprobs", "invalid_value"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(prompt_logprobs=1, max_completion_tokens=0), "max_completion_tokens", "invalid_value"),
    (completion(prompt=[1] * 401, echo=True, max_tokens=0), "prompt", "context_length_exceeded"),
    (completion(ignore_eos="no"), "ignore_eos", "invalid_value"),
    # --- messages
    ((CHAT, {"model": "smollm2"}), "messages", "missing_field"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages="Hi"), "messages", "invalid_value"),
    (chat(messages=["Hi"]), "messages[0]", "invalid_value"),
    (chat(messages=[USER, {"role": "user"}]), "messages[1].content", "missing_field"),
    (chat(messages=[{"content": "Hi"}]), "messages[0].role", "missing_field"),
    (chat(messages=[{"role": "tool", "content": "Hi"}]), "messages[0].role", "invalid_value"),
    (chat(messages=[{"role": "user", "content": None}]), "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": []}]), "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": ["Hi"]}]), "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content", "invalid_value"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
     "messages[0].content", "unsupported_value"),
    (chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{}]}]),
     "messages[0].tool_calls", "unsupported_value"),
    (chat(messages=[{**USER, "mood": "good"}]), "messages[0].mood", "unknown_field"),
    (chat(messages=[{"role": "user", "content": "word " * 500}]), "messages", "context_length_exceeded"),
    (chat(max_completion_tokens=400), "messages", "context_length_exceeded"),
    # --- what we don't do
    (completion(best_of=2), "best_of", "unsupported_value"),
    (completion(suffix="."), "suffix", "unsupported_value"),
    (completion(cache_salt="x"), "cache_salt", "unsupported_value"),
    (completion(presence_penalty=0.1), "presence_penalty", "unsupported_value"),
    (completion(presence_penalty=False), "presence_penalty", "unsupported_value"),
    (completion(frequency_penalty=-1), "frequency_penalty", "unsupported_value"),
    (completion(repetition_penalty=1.1), "repetition_penalty", "unsupported_value"),
    (completion(logit_bias={"50": 1}), "logit_bias", "unsupported_value"),
    (completion(min_p=0.05), "min_p", "unsupported_value"),
    (chat(tools=[{"type": "function"}]), "tools", "unsupported_value"),
    (chat(tool_choice="required"), "tool_choice", "unsupported_value"),
    (chat(response_format={"type": "json_object"}), "response_format", "unsupported_value"),
    (chat(modalities=["text", "audio"]), "modalities", "unsupported_value"),
    (chat(reasoning_effort="high"), "reasoning_effort", "unsupported_value"),
    (chat(add_generation_prompt=False), "add_generation_prompt", "unsupported_value"),
    (completion(stop_token_ids=[3]), "stop_token_ids", "unsupported_value"),
    (completion(skip_special_tokens=False), "skip_special_tokens", "unsupported_value"),
    (completion(use_beam_search=True), "use_beam_search", "unsupported_value"),
    # --- names
    (completion(temprature=1), "temprature", "unknown_field"),
    (completion(messages=[USER]), "messages", "unknown_field"),
    (chat(prompt="a"), "prompt", "unknown_field"),
    (chat(echo=False), "echo", "unknown_field"),
    (completion(**{"x" * 10_000: 1}), "x" * 64, "unknown_field"),
]  # fmt: skip


@pytest.mark.parametrize(("post", "param", "code"), BODIES, ids=lambda value: str(value)[:70])
def test_a_wrong_field_is_named(gateway: Any, post: Post, param: str, code: str) -> None:
    assert_refused(gateway, gateway.post(*post), 400, param, code)


@pytest.mark.parametrize("post", [completion, chat])
@pytest.mark.parametrize(
    "name", ["kv_transfer_params", "lease_id", "handoff_address", "bootstrap_host", "num_present", "tenant", "attempt"]
)
def test_a_client_has_no_say_in_the_hand_off(gateway: Any, post: Callable[..., Post], name: str) -> None:
    assert_refused(gateway, gateway.post(*post(**{name: {"host": "10.0.0.1"}})), 400, name, "unknown_field")


@pytest.mark.parametrize(
    "name", ["chat_template", "chat_template_kwargs", "guided_regex", "guided_json", "structured_outputs", "bad_words"]
)
def test_a_client_has_no_say_in_templates_and_patterns(gateway: Any, name: str) -> None:
    assert_refused(gateway, gateway.post(*chat(**{name: "(a+)+$"})), 400, name, "unknown_field")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"model": }',
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b"[" * 5000,
        b'{"n": ' + b"9" * 6000 + b"}",
        b"hi",
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_bad_json_is_said_to_be_bad_json(gateway: Any, path: str, raw: bytes) -> None:
    assert_refused(gateway, gateway.http.post(path, content=raw), 400, None, "invalid_json")


@pytest.mark.parametrize("raw", [b"[]", b"1", b'"text"', b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(gateway: Any, raw: bytes) -> None:
    assert_refused(gateway, gateway.http.post(CHAT, content=raw), 400, None, "invalid_value")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p"])
def test_a_number_that_is_none_is_refused(gateway: Any, number: str, field: str) -> None:
    raw = f'{{"model": "smollm2", "prompt": "a", "{field}": {number}}}'
    assert_refused(gateway, gateway.http.post(COMPLETIONS, content=raw), 400, field, "invalid_value")


@pytest.mark.parametrize("post", [completion(model="gpt-5"), chat(model="gpt-5"), completion(model="")])
def test_an_unknown_model_is_not_found(gateway: Any, post: Post) -> None:
    assert_refused(gateway, gateway.post(*post), 404, "model", "model_not_found")


def test_an_unknown_model_has_no_description(gateway: Any) -> None:
    assert_refused(gateway, gateway.http.get("/v1/models/gpt-5"), 404, "model", "model_not_found")


@pytest.mark.parametrize("num_bytes", [200_001, 1_500_000, 5_000_000])
def test_a_huge_body_is_too_large(gateway: Any, num_bytes: int) -> None:
    frame = b'{"model": "smollm2", "prompt": ""}'
    raw = frame[:-2] + b"a" * (num_bytes - len(frame)) + frame[-2:]
    assert_refused(gateway, gateway.http.post(COMPLETIONS, content=raw), 413, None, "request_too_large")


def test_a_huge_body_of_undeclared_length_is_too_large(gateway: Any) -> None:
    pieces = iter([b"a" * 100_000] * 5)
    assert_refused(gateway, gateway.http.post(COMPLETIONS, content=pieces), 413, None, "request_too_large")


def test_the_largest_body_is_read(gateway: Any) -> None:
    raw = b'{"model": "smollm2", "prompt": [1]' + b" " * (200_000 - 35) + b"}"
    assert len(raw) == 200_000
    assert gateway.http.post(COMPLETIONS, content=raw).status_code == 200


TOO_MUCH = {  # each held up the event loop for a tenth of a second to more than one, as 4 MiB of it
    "prompts of one id": (COMPLETIONS, b'{"model": "smollm2", "prompt": [%s]}', b"[1]", 21_000),
    "texts": (COMPLETIONS, b'{"model": "smollm2", "prompt": [%s]}', b'"a"', 21_000),
    "ids": (COMPLETIONS, b'{"model": "smollm2", "prompt": [%s]}', b"1", 17_000),
    "ids of a tokenizer": ("/detokenize", b'{"tokens": [%s]}', b"1", 17_000),
    "long numbers": (COMPLETIONS, b'{"model": "smollm2", "prompt": [%s]}', b"9" * 4000, 33),
    "messages": (CHAT, b'{"model": "smollm2", "messages": [%s]}', b'{"role":"user","content":""}', 4_100),
    "parts": (
        CHAT,
        b'{"model": "smollm2", "messages": [{"role": "user", "content": [%s]}]}',
        b'{"type":"text","text":""}',
        4_100,
    ),
    "metadata": (COMPLETIONS, b'{"model": "smollm2", "prompt": "a", "metadata": [%s]}', b"[]", 21_000),
    "fields": (COMPLETIONS, b'{"model": "smollm2", "prompt": "a", %s}', b'"a":1', 21_000),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_takes_long_to_parse_is_refused_unparsed(gateway: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, frame, item, num = TOO_MUCH[name]
    parsed: list[int] = []
    for door in (endpoint, tokenizing):
        monkeypatch.setattr(door, "parse", lambda kind, raw: parsed.append(len(raw)) or parse(kind, raw))
    refused = gateway.http.post(path, content=frame % b",".join([item] * num))
    assert not parsed
    assert_refused(gateway, refused, 413, None, "request_too_large")
    assert len(parsed) == 1
    assert gateway.observer.refusals == ["request_too_large"]


@pytest.mark.parametrize(
    "post",
    [
        completion(prompt='[{",' * 39_000),
        completion(prompt='\\"[' * 20_000),
        completion(prompt="\u0000" * 30_000),
    ],
    ids=["marks", "quotes", "escapes"],
)
def test_a_long_text_may_hold_whatever_it_likes(gateway: Any, post: Post) -> None:
    refused = gateway.post(*post)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/completions/x", "/docs", "/openapi.yaml"])
def test_a_route_that_isnt_there_is_not_found(gateway: Any, path: str) -> None:
    assert_refused(gateway, gateway.http.get(path), 404, None, "not_found")


@pytest.mark.parametrize("path", [f"{COMPLETIONS}/", f"{CHAT}/", "/tokenize/"])
def test_nobody_is_sent_elsewhere(gateway: Any, path: str) -> None:
    """Behind what ends TLS, that would be to plain text, with the prompt."""
    assert_refused(gateway, gateway.http.post(path, json={}, follow_redirects=False), 404, None, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", COMPLETIONS), ("DELETE", CHAT), ("POST", "/v1/models")])
def test_a_method_that_isnt_allowed_is_refused(gateway: Any, method: str, path: str) -> None:
    response = gateway.http.request(method, path)
    assert_refused(gateway, response, 405, None, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize("depth", [None, "full"])
def test_a_wrong_depth_header_is_refused_whoever_wins(gateway: Any, depth: str | None) -> None:
    response = gateway.post(*completion(depth=depth), headers={"x-shoal-depth": "abyss"})
    assert_refused(gateway, response, 400, "x-shoal-depth", "invalid_value")


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "0",
        "-1",
        "nan",
        "inf",
        "infinity",
        "",
        "1_0",
        "1e",
        "1e999",
        "+5",
        "5.",
        "0x10",
        "1 0",
        "10\xa0",
        "9" * 400,
    ],
)
def test_a_deadline_is_a_number_of_seconds(gateway: Any, value: str) -> None:
    response = gateway.post(*completion(), headers={"x-shoal-timeout": value.encode("latin-1")})
    assert_refused(gateway, response, 400, "x-shoal-timeout", "invalid_value")


def test_a_depth_header_that_contradicts_echo_is_refused(gateway: Any) -> None:
    response = gateway.post(*completion(echo=True), headers={"x-shoal-depth": "shallow"})
    assert_refused(gateway, response, 400, "depth", "invalid_value")


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
def test_a_field_that_changes_nothing_is_ignored(gateway: Any, name: str) -> None:
    assert gateway.post(*completion(**{name: {"any": ["thing"]}})).status_code == 200


def test_of_very_many_wrong_fields_none_is_described(gateway: Any) -> None:
    """A body has room for hundreds of thousands, and no other request would be served meanwhile."""
    response = gateway.post(*completion(**{str(index): 1 for index in range(1001)}))
    assert_refused(gateway, response, 400, None, "invalid_value")
    assert "more than 1000 wrong fields" in response.json()["error"]["message"]


NEUTRAL = [
    completion(best_of=1, echo=False, suffix=None, min_p=0.0, logit_bias={}, repetition_penalty=1.0, cache_salt=None),
    completion(presence_penalty=0.0, frequency_penalty=0, top_k=-1, stop=None, n=None, seed=None, temperature=None),
    completion(
        max_tokens=None, top_p=None, stream=None, stream_options=None, ignore_eos=None, depth=None, logprobs=None
    ),
    chat(tools=[], tool_choice="auto", response_format={"type": "text"}, modalities=["text"], logprobs=False),
    chat(tools=None, functions=None, tool_choice=None, top_logprobs=None, max_completion_tokens=None),
    chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    chat(messages=[{"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "name": "me"}, USER]),
    chat(messages=[{**USER, "type": "text"}]),  # as lm-eval sends it
    chat(messages=[{"role": "developer", "content": "Be brief."}, USER]),
    # What other servers' answers carry, as clients send it back, and parts that were marked for one.
    chat(messages=[USER, {"role": "assistant", "content": "Hi", "reasoning_content": "…", "reasoning": None}, USER]),
    chat(messages=[{"role": "assistant", "content": "Hi", "reasoning_details": [], "provider_specific_fields": {}}]),
    chat(
        messages=[
            {
                **USER,
                "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}],
            }
        ]
    ),
    chat(top_logprobs=0, reasoning_effort="none", add_generation_prompt=True),
    chat(stream=False, stream_options={"include_usage": False}, stop_token_ids=[], use_beam_search=False),
    completion(stream_options={}, skip_special_tokens=True, spaces_between_special_tokens=True, typical_p=1.0),
    completion(include_stop_str_in_output=False, length_penalty=1.0),
    completion(seed=-(2**63)),
    completion(echo=None, prompt_logprobs=None),
    completion(prompt=[1] * 400, echo=True, max_tokens=0, min_tokens=0),
    completion(seed=2**63 - 1, temperature=2, top_p=1, n=16, logprobs=20, stop=["a" * 256] * 4, max_tokens=16),
]


@pytest.mark.parametrize("post", NEUTRAL, ids=lambda post: str(post)[:70])
def test_fields_at_their_neutral_values_and_limits_are_accepted(gateway: Any, post: Post) -> None:
    response = gateway.post(*post)
    assert response.status_code == 200, response.text


def test_a_part_s_field_that_isn_t_known_is_named(gateway: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "mood": "good"}]
    response = gateway.post(*chat(messages=[{**USER, "content": parts}]))
    assert_refused(gateway, response, 400, "messages[0].content", "invalid_value")
    assert "no field mood: leave it out" in response.json()["error"]["message"]


def test_a_developer_speaks_as_the_system_does() -> None:
    [told] = parse(ChatBody, b'{"model": "m", "messages": [{"role": "developer", "content": "Be brief."}]}').messages
    assert told == Message(role="system", content="Be brief.")


def test_the_ignored_fields_are_the_ones_listed() -> None:
    ignored = {name for name, one in Body.model_fields.items() if list(one.metadata) == list(get_args(Ignored)[1:])}
    assert ignored == IGNORED_FIELDS
