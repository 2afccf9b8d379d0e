"""What clients see of a running system: the openai package as it is, our own, bad input, leaving in the middle."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from clusters import IDLE_WITHIN_S, Look, TestCluster, cluster, rise
from doc_blocks import Block, live_blocks, run
from texts import prompts

from shoal.client import (
    AsyncClient,
    Client,
    ContextLengthExceeded,
    DeadlineExceeded,
    Depth,
    InvalidRequest,
    ModelNotFound,
)  # fmt: skip
from shoal.cluster.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

TEXT = "The whale is the largest animal that has ever lived, and it"
# Few enough that one request with as many choices takes a decode replica's every place.
MAX_SEQUENCES = 2


@pytest.fixture(scope="module")
def live() -> Iterator[TestCluster]:
    decode = {"replicas": 2, "max_sequences": MAX_SEQUENCES}
    gateway = {"grpc_port": free_port("127.0.0.1")}
    with cluster(
        model={"dtype": "auto"}, decode=decode, prefill={"replicas": 2, "pack_up_to": 0}, gateway=gateway
    ) as found:
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


@pytest.mark.parametrize("asked", ["my-own", None])
@pytest.mark.parametrize("path", ["/health", "/v1/no-such"])
def test_every_answer_names_its_request_once(live: TestCluster, path: str, asked: str | None):
    headers = {} if asked is None else {"x-request-id": asked}
    [told] = httpx.get(live.url + path, headers=headers).headers.get_list("x-request-id")
    assert told and asked in (told, None)


def test_a_name_that_can_not_be_logged_is_replaced(live: TestCluster):
    [told] = httpx.get(f"{live.url}/health", headers={"x-request-id": "white space"}).headers.get_list("x-request-id")
    assert told and told != "white space"


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


def test_prefill_hears_of_prompts_by_decodes_session_before_its_call_comes(client: openai.OpenAI, live: TestCluster):
    """But for the first one of each decode replica, whose router Serve makes then, and for the first one of each of the
    four pairs, which may not have greeted before."""
    before = live.look()
    for _ in range(12):
        chat(client, max_tokens=1)
    after = live.look()
    by_session, by_call = (
        after.metric("shoal_prefill_grants_total", way=way) - before.metric("shoal_prefill_grants_total", way=way)
        for way in ("session", "call")
    )
    transferred = after.metric("shoal_kv_transfer_seconds_count") - before.metric("shoal_kv_transfer_seconds_count")
    # Computed once each; one that can't begin at once has been begun twice.
    assert transferred == 12 and by_session + by_call >= 12 and by_session >= 6


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


def test_lm_evals_log_likelihoods_are_full_depth_and_cost_no_transfer(client: openai.OpenAI, live: TestCluster):
    """What lm-evaluation-harness' local-completions sends, and how it reads the answer."""
    before, context = live.num_transfers, [504, 4315, 314]
    fields: dict[str, Any] = {"model": "smollm2", "temperature": 0, "logprobs": 1, "seed": 1234}
    likeliest = client.completions.create(
        prompt=context, max_tokens=4, extra_body={"depth": "full"}, extra_headers={"x-shoal-timing": "1"}, **fields
    )
    prompts = [context + likeliest.shoal["choices"][0]["token_ids"], [*context, 7, 7, 7, 7]]
    answer = client.completions.create(prompt=prompts, max_tokens=1, echo=True, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.usage.depth == "full"
    told = [choice.logprobs for choice in answer.choices]
    assert all(len(one.token_logprobs) == len(one.text_offset) == 8 and one.token_logprobs[0] is None for one in told)
    is_greedy = [
        all(own == max(top.values()) for own, top in zip(one.token_logprobs[3:-1], one.top_logprobs[3:-1], strict=True))
        for one in told
    ]
    assert is_greedy == [True, False]
    assert told[0].token_logprobs[3:-1] == pytest.approx(likeliest.choices[0].logprobs.token_logprobs, abs=0.1)
    only = client.completions.create(prompt=prompts[1:], max_tokens=0, echo=True, **fields)
    assert only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(told[1].token_logprobs[1:-1], abs=0.1)
    assert live.num_transfers == before


def test_errors_reach_the_client_as_its_own_classes(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="gpt-5")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smollm2", prompt=[1] * 9000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"


# --- our own client -------------------------------------------------------------------------------------


@pytest.fixture
def sdk(live: TestCluster) -> Iterator[Client]:
    with Client(f"127.0.0.1:{live.config.gateway.grpc_port}", timeout_s=60) as found:
        yield found
    live.assert_nothing_held()


def test_over_grpc_the_answer_is_the_one_over_http(sdk: Client, client: openai.OpenAI, live: TestCluster):
    before = live.num_transfers
    ask = {"max_tokens": 16, "temperature": 0}
    whole = sdk.generate(TEXT, **ask)
    stream = sdk.stream(TEXT, **ask)
    assert "".join(delta.text for delta in stream) == whole.text and stream.usage == whole.usage
    assert whole.text == client.completions.create(model="smollm2", prompt=TEXT, **ask).choices[0].text
    assert whole.usage.depth is Depth.SHALLOW and whole.usage.num_output_tokens == 16
    assert live.num_transfers == before + 3
    assert [(model.name, model.max_context_tokens) for model in sdk.models()] == [("smollm2", 8192)]
    assert sdk.is_ready()


def test_leaving_the_loop_frees_both_pools(sdk: Client, live: TestCluster):
    before = live.look()
    for delta in sdk.stream(TEXT, max_tokens=2000, ignore_eos=True):
        if delta.text:
            break
    live.assert_nothing_held()
    look = live.look()
    assert rise(before, look, "shoal_cancelled_total", stage="streaming") == 1
    assert rise(before, look, "shoal_decode_tokens_total") < 2000


async def test_a_task_that_is_cancelled_frees_both_pools(live: TestCluster):
    async with AsyncClient(f"127.0.0.1:{live.config.gateway.grpc_port}") as client:
        before = await asyncio.to_thread(live.look)
        asking = asyncio.create_task(client.generate(TEXT, max_tokens=2000, ignore_eos=True))
        await until(live, lambda look: rise(before, look, "shoal_decode_tokens_total") > 0 or asking.done())
        assert asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(live.assert_nothing_held)


def test_a_wrong_field_is_an_error_of_its_own_class(sdk: Client):
    with pytest.raises(InvalidRequest) as wrong:
        sdk.generate(TEXT, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(ContextLengthExceeded) as long:
        sdk.generate([1] * 9000, max_tokens=1)
    assert long.value.param == "token_ids"
    with pytest.raises(ModelNotFound):
        sdk.generate(TEXT, model="gpt-5")


def test_a_deadline_of_the_client_ends_the_request_on_both_pools(sdk: Client, live: TestCluster):
    with pytest.raises(DeadlineExceeded):
        sdk.generate(TEXT, max_tokens=4000, ignore_eos=True, timeout_s=1.5)
    live.assert_nothing_held()


@pytest.mark.parametrize("block", live_blocks("README.md", "docs/api.md"), ids=str)
def test_what_the_documents_show_works(block: Block, live: TestCluster):
    run(block, http_port=int(live.url.rpartition(":")[2]), grpc_port=live.config.gateway.grpc_port)
    live.assert_nothing_held()


# --- bad input, and leaving -----------------------------------------------------------------------------

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


WITH_OUTPUT = ("first token", "several tokens")


@pytest.mark.parametrize("after", ["at once", "queued for a reservation", "while prefill computes", *WITH_OUTPUT])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(live: TestCluster, after: str, stream: bool):
    before = live.look()
    num_left = asyncio.run(leave(live, before, after, stream))
    live.assert_nothing_held()
    look = live.look()
    assert look.metric("shoal_kv_blocks", state="free") == look.metric("shoal_kv_blocks")
    assert look.metric("shoal_kv_fallback_total") == 0
    assert rise(before, look, "shoal_cancelled_total") == num_left
    had_output = after in WITH_OUTPUT
    if not after.startswith("queued"):
        assert rise(before, look, "shoal_cancelled_total", stage="streaming" if had_output else "waiting") == 1
        assert bool(rise(before, look, "shoal_decode_tokens_total")) == had_output


async def leave(live: TestCluster, before: Look, after: str, stream: bool) -> int:
    """Ask, and hang up at the stage ``after``. Returns how many requests were given up in all."""
    # What comes before the first token must take long enough to leave meanwhile.
    long = prompts()["20-handbook"] * (1 if after in WITH_OUTPUT else 3)
    body = {"model": "smollm2", "prompt": long, "max_tokens": 400, "ignore_eos": True, "stream": stream}
    async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
        match after:
            case "at once":
                await hang_up(live, client, body, lambda look: look.metric("shoal_requests_in_flight") > 0)
            case "queued for a reservation":
                return await hang_up_while_queued(live, client, body)
            case "while prefill computes":
                await hang_up(live, client, body, lambda look: look.metric("shoal_kv_transfers_in_flight") > 0)
            case "first token" | "several tokens":
                num_tokens = 1 if after == "first token" else 8
                if stream:
                    await read(client, body, num_tokens)
                else:
                    await hang_up(live, client, body, lambda look: has_output(before, look, num_tokens))
    return 1


def has_output(before: Look, look: Look, num_tokens: int) -> bool:
    """So many tokens were decoded since ``before``, and the gateway has seen the first."""
    has_first = rise(before, look, "shoal_time_to_first_token_seconds_count") > 0
    return has_first and rise(before, look, "shoal_decode_tokens_total") >= num_tokens


async def hang_up_while_queued(live: TestCluster, client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """Leave the queue of a decode pool without a free place; those that hold the places go on, and leave at last."""
    holders: list[asyncio.Task[None]] = []
    look = await asyncio.to_thread(live.look)
    while num_busy(look) < live.num_by_role["decode"]:
        assert len(holders) < 6, "one replica gets all requests"
        hold = {"model": "smollm2", "prompt": TEXT, "max_tokens": 2000, "ignore_eos": True, "n": MAX_SEQUENCES}
        holders.append(asyncio.create_task(read(client, hold, 1)))
        look = await until(live, lambda look: num_busy(look) + num_queued(look) == len(holders))
    num_before = num_queued(look)
    await hang_up(live, client, body, lambda look: num_queued(look) == num_before + 1)
    look = await until(live, lambda look: num_queued(look) == num_before, within_s=IDLE_WITHIN_S)
    assert num_busy(look) == live.num_by_role["decode"] and not any(holder.done() for holder in holders)
    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    return len(holders) + 1


def num_busy(look: Look) -> int:
    """Decode replicas on which some request holds blocks."""
    return sum(usage > 0 for usage in look.each("shoal_kv_cache_usage_ratio", role="decode").values())


def num_queued(look: Look) -> int:
    return int(look.metric("shoal_queue_depth", pool="decode"))


async def hang_up(
    live: TestCluster, client: httpx.AsyncClient, body: dict[str, Any], when: Callable[[Look], bool]
) -> None:
    """Ask, and leave as soon as the cluster looks like ``when``."""
    request = asyncio.create_task(read(client, body, num_chunks=body["max_tokens"]))
    await until(live, lambda look: when(look) or request.done())
    assert not request.done(), "the answer was there before the client could leave"
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)


async def until(live: TestCluster, condition: Callable[[Look], bool], within_s: float = 60) -> Look:
    """The first look for which ``condition`` holds; looking takes a while, so there is no sleep."""
    deadline_s = time.monotonic() + within_s
    while not condition(look := await asyncio.to_thread(live.look)):
        assert time.monotonic() < deadline_s, look.held()
    return look


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
    look = live.look()
    [held] = set(look.each("shoal_parameter_bytes", role="prefill").values())
    [whole] = set(look.each("shoal_full_model_parameter_bytes", role="prefill").values())
    assert 0.5 < held / whole < 0.8
    assert min(look.each("shoal_parameter_bytes", role="decode").values()) >= whole


def test_a_prefill_replica_holds_no_deep_layer_and_no_head(live: TestCluster):
    decode = live.describe()
    prefill = decode["prefill"]
    first, end = prefill["layers"]
    assert first == 0 and 0 < end < prefill["num_layers"] == decode["num_layers"]
    layers = {name: int(name.split(".")[1]) for name in prefill["parameters"] if name.startswith("layers.")}
    assert set(layers.values()) == set(range(end)), "whole layers are the kept ones"
    others = set(prefill["parameters"]) - layers.keys()
    assert {"embedding", "projection.weight"} <= others <= {"embedding", "projection.weight", "projection.bias"}
    assert {prefill["parameter_bytes"]} == set(live.look().each("shoal_parameter_bytes", role="prefill").values())
    assert prefill["plan_hash"] == decode["plan_hash"] and prefill["pid"] != decode["pid"]
