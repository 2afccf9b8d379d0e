"""Outputs that leave together: one a choice, with all that its own bring."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models

from shoal.decode.stream import ChoiceStreams, joined
from shoal.engine.detokenizer import decode_with
from shoal.engine.events import TokenEvent
from shoal.wire.messages import (
    Depth,
    FinishReason,
    GenerateRequest,
    HandoffReport,
    RequestContext,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
    TtftStages,
)

STAGES = TtftStages(0.1, 0.2, 0.3, 0.4, 0.5)
REPORT = HandoffReport(Depth.SHALLOW, transferred=True)


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id, f"<{token_id}>", -0.5, ())


def test_outputs_of_a_choice_become_one_that_begins_as_the_first_and_ends_as_the_last():
    told = (logprob(9),)
    first = TokenOutput(0, (3,), "a", (logprob(3),), stages=STAGES, handoff=REPORT, prompt_logprobs=told)
    last = TokenOutput(0, (5,), "c", (logprob(5),), FinishReason.STOP, "c")
    assert list(joined([first, TokenOutput(0, (4,), "", (logprob(4),)), last])) == [
        TokenOutput(
            0, (3, 4, 5), "ac", (logprob(3), logprob(4), logprob(5)), FinishReason.STOP, "c", STAGES, REPORT, told
        )
    ]


def test_choices_stay_apart():
    outputs = [
        TokenOutput(1, (3,), "a", stages=STAGES),
        TokenOutput(0, (4,), "b"),
        TokenOutput(1, (5,), "c", finish_reason=FinishReason.LENGTH),
        TokenOutput(2, (6,), "d"),
        TokenOutput(0, (7,), "e"),
    ]
    assert list(joined(outputs)) == [
        TokenOutput(1, (3, 5), "ac", finish_reason=FinishReason.LENGTH, stages=STAGES),
        TokenOutput(0, (4, 7), "be"),
        TokenOutput(2, (6,), "d"),
    ]


def test_a_token_s_own_text_keeps_the_space_that_a_text_s_first_one_loses():
    """As Llama 2's and Mistral's tokenizers have it, whose decoders strip a text's first space."""
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "the": 2, "▁": 3}, unk_token="the"))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    sampling = SamplingParams(max_tokens=9, num_logprobs=3)
    request = GenerateRequest(RequestContext("a", timeout_s=9.0), "m", (1,), Depth.FULL, sampling)
    streams = ChoiceStreams(request, decode_with(words))
    told = [
        streams.accept(TokenEvent("a", 0, index, token_id, -0.5, ((0, -1.0), (2, -2.0), (3, -3.0)), None, None, 0.0))
        for index, token_id in enumerate((0, 1))
    ]
    [the], [sea] = told
    assert (the.text, sea.text) == ("the", " sea")
    assert [one.logprobs[0].token for one in (the, sea)] == [" the", " sea"]
    assert [text for _, text, _ in sea.logprobs[0].top] == [" the", "the", " "]
