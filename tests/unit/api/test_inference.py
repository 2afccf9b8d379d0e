"""What gRPC clients get: the same answers as by HTTP, in shoal.v1's messages."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import inference_server
import pytest
from fake_backend import STAGES
from inference_server import TIMEOUT_S, Inference, client_of, request, told

from shoal.api.draining import DrainingBackend
from shoal.api.intake import Services
from shoal.v1 import inference_pb2 as pb
from shoal.wire.messages import Depth, HandoffReport, SamplingParams, TokenOutput

TEXT = "The pools hand the prompt over."


async def ended(inference: Inference) -> None:
    """Wait until a request has given back all it had."""
    assert await asyncio.to_thread(inference.backend.ended.acquire, timeout=TIMEOUT_S)


async def held(inference: Inference) -> None:
    assert await asyncio.to_thread(inference.backend.held.acquire, timeout=TIMEOUT_S)


# --- answers --------------------------------------------------------------------------------------------


async def test_a_text_is_continued(inference: Inference, smollm2: Any) -> None:
    response = await inference.generate(text="Hello", max_tokens=50)
    [choice] = response.choices
    assert (choice.text, choice.finish_reason) == (TEXT, pb.FINISH_REASON_STOP)
    assert smollm2.decode(choice.token_ids) == TEXT
    assert response.model == "smollm2"
    assert not choice.HasField("stop")
    assert response.usage == pb.Usage(
        num_prompt_tokens=1, num_output_tokens=len(choice.token_ids), num_cached_tokens=0, depth=pb.DEPTH_SHALLOW
    )


async def test_token_ids_are_continued_as_they_are(inference: Inference) -> None:
    await inference.generate(token_ids=pb.TokenIds(ids=[5, 6, 7]))
    assert inference.backend.requests[0].prompt_token_ids == (5, 6, 7)


async def test_a_chat_goes_through_the_template_as_it_does_by_http(inference: Inference, gateway: Any) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    await inference.generate(chat=pb.Chat(messages=[pb.ChatMessage(**turn) for turn in turns]), seed=1)
    body = {"model": "smollm2", "messages": turns, "seed": 1}
    await asyncio.to_thread(gateway.post, "/v1/chat/completions", body)
    [ours], [theirs] = inference.backend.requests, gateway.backend.requests
    assert (ours.prompt_token_ids, ours.sampling) == (theirs.prompt_token_ids, theirs.sampling)


async def test_every_sampling_field_arrives(inference: Inference) -> None:
    await inference.generate(
        max_tokens=9, temperature=0, top_p=0.5, top_k=7, seed=-1, n=3, logprobs=2, stop=["x", "y"], min_tokens=4,
        ignore_eos=True,
    )  # fmt: skip
    assert inference.backend.requests[0].sampling == SamplingParams(
        max_tokens=9, temperature=0, top_p=0.5, top_k=7, seed=2**63 - 1, num_choices=3, num_logprobs=2,
        stop=("x", "y"), min_tokens=4, ignore_eos=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "Hello"},
        {"token_ids": pb.TokenIds(ids=[1])},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])},
    ],
    ids=lambda prompt: next(iter(prompt)),
)
async def test_what_is_left_out_has_the_proto_files_defaults(inference: Inference, prompt: Any) -> None:
    await inference.generate(**prompt)
    [asked] = inference.backend.requests
    sampling = asked.sampling
    assert sampling.max_tokens == 400 - len(asked.prompt_token_ids)
    assert sampling.may_shorten
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.num_choices) == (1.0, 1.0, 0, 1)
    assert (sampling.num_logprobs, sampling.stop) == (None, ())
    assert asked.model == "smollm2"


async def test_decodes_word_on_the_depth_wins(inference: Inference, monkeypatch: pytest.MonkeyPatch) -> None:
    report = HandoffReport(Depth.FULL, transferred=False)
    outputs = [TokenOutput(0, (1,), "a", handoff=report), TokenOutput(0, (2,), "b", finish_reason="length")]  # type: ignore[arg-type]
    monkeypatch.setattr(inference.backend, "outputs", lambda request: outputs)
    assert (await inference.generate(depth=pb.DEPTH_SHALLOW)).usage.depth == pb.DEPTH_FULL


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "logprobs": 2},
        {"n": 2, "logprobs": 2, "echo": True},
        {"max_tokens": 0, "echo": True},
        {"stop": ["hand"]},
        {"max_tokens": 3},
        {"chat": pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")]), "logprobs": 0},
    ],
    ids=str,
)
async def test_a_stream_adds_up_to_the_whole_answer(inference: Inference, fields: Any) -> None:
    whole = await inference.generate(**fields)
    messages = await inference.stream(**fields)
    for choice in whole.choices:
        own = [message for message in messages if message.index == choice.index]
        assert "".join(message.text for message in own) == choice.text
        assert [token for message in own for token in message.token_ids] == list(choice.token_ids)
        assert [one for message in own for one in message.logprobs] == list(choice.logprobs)
        assert [message.finish_reason for message in own[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(own) - 1)
        assert (own[-1].finish_reason, own[-1].stop) == (choice.finish_reason, choice.stop)
    assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].usage == whole.usage
    assert {message.model for message in messages} == {"smollm2"}
    assert len({message.request_id for message in messages}) == 1


@pytest.mark.parametrize("fields", [{"echo": True}, {"prompt_logprobs": 0}])
async def test_a_shallow_prompt_has_nothing_to_tell(inference: Inference, fields: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await inference.generate(**fields, depth=pb.DEPTH_SHALLOW)
    assert told(refused.value) == (400, "invalid_value", "depth")
    assert (await inference.generate(**fields, depth=pb.DEPTH_AUTO)).usage.depth == pb.DEPTH_FULL
    assert inference.observer.deepened == [*fields]


async def test_logprobs_come_with_their_alternatives(inference: Inference) -> None:
    [choice] = (await inference.generate(logprobs=2, max_tokens=1)).choices
    [one] = choice.logprobs
    assert (one.token_id, one.token, one.logprob) == (choice.token_ids[0], "The", -0.5)
    assert [(top.token_id - one.token_id, top.logprob) for top in one.top] == [(0, -0.5), (1, -1.5)]


async def test_tokens_are_sent_as_they_come(inference: Inference) -> None:
    inference.backend.hold_after = 1
    messages = aiter(inference.stub.GenerateStream(request(), timeout=TIMEOUT_S))
    assert (await anext(messages)).text == "The"
    await held(inference)
    assert inference.backend.num_outputs == 1
    inference.backend.release()
    assert "".join([message.text async for message in messages]) == TEXT.removeprefix("The")


# --- a request's id, trace and deadline -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_the_clients_request_id_is_echoed_and_passed_on(inference: Inference, method: str) -> None:
    call = getattr(inference.stub, method)(request(), metadata=[("x-request-id", "order-66")], timeout=TIMEOUT_S)
    answer = await call if method == "Generate" else await call.read()
    assert answer.request_id == "order-66"
    assert dict(await call.initial_metadata())["x-request-id"] == "order-66"
    assert inference.backend.requests[0].context.request_id == "order-66"
    call.cancel()


async def test_a_trace_context_is_passed_on(inference: Inference) -> None:
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    for sent in (traceparent, "00-no-trace-01"):
        await inference.stub.Generate(request(), metadata=[("traceparent", sent)], timeout=TIMEOUT_S)
    assert [asked.context.traceparent for asked in inference.backend.requests] == [traceparent, None]


@pytest.mark.parametrize(("timeout_s", "low", "high"), [(None, 590, 600), (50, 40, 55), (5000, 590, 600)])
async def test_the_sooner_deadline_counts(inference: Inference, timeout_s: float | None, low: int, high: int) -> None:
    # What gRPC sends of a deadline is rounded up.
    await inference.stub.Generate(request(), timeout=timeout_s)
    assert low < inference.backend.requests[0].context.timeout_s <= high


# --- clients who leave ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("hold_after", "stage"), [(0, "waiting"), (2, "streaming")])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_cancelled_call_frees_the_pool_and_is_told_with_what_was_seen(
    inference: Inference, method: str, hold_after: int, stage: str
) -> None:
    inference.backend.hold_after = hold_after
    call = getattr(inference.stub, method)(request(n=2))
    if method == "GenerateStream":
        for _ in range(hold_after):
            await call.read()
    await held(inference)
    call.cancel()
    await ended(inference)
    assert inference.backend.num_running == 0
    await asyncio.to_thread(inference.observer.wait_finished)
    assert [finished[2:] for finished in inference.observer.finished] == [(499, "cancelled_error")]
    assert inference.observer.gone == [stage]


async def test_a_client_that_does_not_read_on_can_still_leave(inference: Inference) -> None:
    inference.backend.text = "word " * 40
    call = inference.stub.GenerateStream(request(n=16, logprobs=20, ignore_eos=True))
    await call.read()
    call.cancel()
    await ended(inference)
    assert inference.backend.num_running == 0


# gRPC rounds the second one up on its way to the server, which has time left when the client ends the call.
@pytest.mark.parametrize("timeout_s", [0.2, 1.001])
@pytest.mark.parametrize(("method", "endpoint"), [("generate", "generate"), ("stream", "generate_stream")])
async def test_a_call_past_its_deadline_frees_the_pool_and_is_told_as_late(
    inference: Inference, method: str, endpoint: str, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference_server, "TIMEOUT_S", timeout_s)
    inference.backend.hold_after = 1
    await inference.channel.channel_ready()  # to connect takes time of the call
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await getattr(inference, method)()
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await ended(inference)
    await asyncio.to_thread(inference.observer.wait_finished)
    assert inference.observer.finished == [("smollm2", endpoint, 504, "timeout_error")]
    assert (inference.observer.gone, inference.observer.refusals) == ([], [])


async def test_a_server_that_stops_ends_its_calls(services: Services) -> None:
    async with client_of(services) as inference:
        inference.backend.hold_after = 1
        call = inference.stub.GenerateStream(request())
        await call.read()
    assert inference.backend.num_running == 0
    assert await call.code() != grpc.StatusCode.OK


# --- draining -------------------------------------------------------------------------------------------


async def test_a_draining_server_refuses_and_tells_when_to_come_back(services: Services) -> None:
    backend = DrainingBackend(services.backend)
    draining = Services(backend, services.tokenizer, services.models, services.config, services.observer)
    async with client_of(draining) as inference:
        await backend.drain(1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await inference.generate()
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert told(refused.value) == (503, "unavailable", None)
    assert dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


# --- what the observer is told --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "endpoint"), [("generate", "generate"), ("stream", "generate_stream")])
async def test_a_finished_call_is_told_once_with_its_times(inference: Inference, method: str, endpoint: str) -> None:
    await getattr(inference, method)(n=2)
    observer = inference.observer
    assert (observer.started, observer.finished) == (1, [("smollm2", endpoint, 200, "none")])
    [(ttft_s, gateway_s, stages)] = observer.first
    assert stages == STAGES
    assert gateway_s + stages.total_s == pytest.approx(ttft_s)
    assert len(observer.last) == 2


async def test_a_refused_call_is_told_with_its_reason(inference: Inference) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await inference.generate(n=99)
    assert inference.observer.finished == [("smollm2", "generate", 400, "invalid_request_error")]
    assert inference.observer.refusals == ["invalid_value"]
