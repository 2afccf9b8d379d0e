"""What clients see of a running system: the openai package as it is, bad input, and leaving in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from clusters import TestCluster, cluster
from texts import prompts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TEXT = "The whale is the largest animal that has ever lived, and it"


@pytest.fixture(scope="module")
def live() -> Iterator[TestCluster]:
    with cluster(model={"dtype": "auto"}, decode={"replicas": 2}, prefill={"replicas": 2}) as found:
        yield found


@pytest.fixture
def client(live: TestCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found
    live.assert_nothing_held()


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Name three animals that live in the sea."}]
    return client.chat.completions.create(**{"model": "smollm2", "messages": messages, "temperature": 0} | fields)


def test_a_chat_streamed_is_the_chat_at_once(client: openai.OpenAI, live: TestCluster):
    before = live.num_transfers
    whole = chat(client, max_tokens=24)
    chunks = list(chat(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 24 and whole.usage.prompt_tokens > 10
    assert live.num_transfers == before + 2 and live.num_fallbacks == 0


def test_a_completion_streamed_is_the_completion_at_once(client: openai.OpenAI):
    ask = {"model": "smollm2", "prompt": TEXT, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**ask)
    text = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    assert text == whole.choices[0].text and text
    assert whole.choices[0].finish_reason == "length"


def test_several_choices_take_one_transfer(client: openai.OpenAI, live: TestCluster):
    before = live.num_transfers
    answer = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=12, n=2, temperature=1.0, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text
    assert live.num_transfers == before + 1
    again = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=12, n=2, temperature=1.0, seed=7)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_several_prompts_take_one_transfer_each(client: openai.OpenAI, live: TestCluster):
    before = live.num_transfers
    answer = client.completions.create(model="smollm2", prompt=[TEXT, "Once upon a time there was"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert live.num_transfers == before + 2


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI):
    free = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=32, temperature=0).choices[0].text
    stop = free.split()[4]
    stopped = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=32, temperature=0, stop=stop)
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_name_the_token_taken_first(client: openai.OpenAI):
    answer = chat(client, max_tokens=5, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.token == token.top_logprobs[0].token and token.logprob == token.top_logprobs[0].logprob
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.logprob <= 0
    legacy = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=5, logprobs=2, temperature=0)
    assert len(legacy.choices[0].logprobs.token_logprobs) == 5


def test_errors_reach_the_client_as_its_own_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="gpt-5")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smollm2", prompt=[1] * 9000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


BAD = [
    ("empty prompt", {"prompt": ""}, 400, "prompt"),
    ("empty list", {"prompt": []}, 400, "prompt"),
    ("too long", {"prompt": [5] * 8192}, 400, "prompt"),
    ("wrong type", {"max_tokens": "many"}, 400, "max_tokens"),
    ("unknown model", {"model": "gpt-5"}, 404, "model"),
    ("unknown field", {"frobnicate": 1}, 400, "frobnicate"),
    ("huge n", {"n": 10**9}, 400, "n"),
    ("NaN", {"temperature": float("nan")}, 400, "temperature"),
    ("negative temperature", {"temperature": -1}, 400, "temperature"),
    ("token id beyond the vocabulary", {"prompt": [10**6]}, 400, "prompt"),
    ("negative token id", {"prompt": [-1]}, 400, "prompt"),
    ("booleans for token ids", {"prompt": [True]}, 400, "prompt"),
    ("zero tokens", {"max_tokens": 0}, 400, "max_tokens"),
    ("too many stops", {"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ("unknown depth", {"depth": "deepest"}, 400, "depth"),
]


@pytest.mark.parametrize(("fields", "status", "param"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_gets_a_clear_error_and_the_server_lives(
    live: TestCluster, fields: dict[str, Any], status: int, param: str
):
    body = json.dumps({"model": "smollm2", "prompt": TEXT, "max_tokens": 2} | fields)
    answer = httpx.post(f"{live.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["code"] and error["message"]
    assert_alive(live)


@pytest.mark.parametrize(
    ("content", "status", "code"), [(b'{"model": ', 400, "invalid_json"), (b"x" * (5 << 20), 413, "request_too_large")]
)
def test_a_body_that_is_no_request_is_refused(live: TestCluster, content: bytes, status: int, code: str):
    answer = httpx.post(f"{live.url}/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["code"] == code
    assert_alive(live)


def assert_alive(live: TestCluster) -> None:
    assert httpx.get(f"{live.url}/readyz").json() == {"status": "ready", "num_decode": 2, "num_prefill": 2}


@pytest.mark.parametrize("after", ["at once", "while prefill computes", "first token", "several tokens"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(live: TestCluster, after: str, stream: bool):
    asyncio.run(leave(live, after, stream))
    live.assert_nothing_held()
    assert live.metric("shoal_kv_blocks", state="free") == live.metric("shoal_kv_blocks")
    assert live.num_fallbacks == 0


async def leave(live: TestCluster, after: str, stream: bool) -> None:
    long = prompts()["20-handbook"] * 3
    body = {"model": "smollm2", "prompt": long, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        request = asyncio.create_task(read(client, body, 1 if after == "first token" else 8))
        if after == "at once":
            while not live_metric(live, "shoal_requests_in_flight") and not request.done():
                await asyncio.sleep(0)
        elif after == "while prefill computes" or not stream:
            while not live_metric(live, "shoal_kv_transfers_in_flight") and not request.done():
                await asyncio.sleep(0)
        else:
            await request
            return
        assert not request.done(), "the answer was there before the client could leave"
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


def live_metric(live: TestCluster, name: str) -> float:
    return live.metric(name)


async def read(client: httpx.AsyncClient, body: dict[str, Any], num_chunks: int) -> None:
    """Read so many chunks of a stream (or the whole answer), then hang up."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        seen = 0
        async for line in response.aiter_lines():
            seen += line.startswith("data: ")
            if seen >= num_chunks:
                return


def test_every_replica_holds_what_its_stage_needs_and_no_more(live: TestCluster):
    held = live.metric("shoal_parameter_bytes", role="prefill") / 2
    whole = live.metric("shoal_full_model_parameter_bytes", role="prefill") / 2
    assert 0.5 < held / whole < 0.8
    assert live.metric("shoal_parameter_bytes", role="decode") / 2 >= whole
