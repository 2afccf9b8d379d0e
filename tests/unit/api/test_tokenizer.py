"""SmolLM2's tokenizer through ours: the same ids as transformers', and text that streams exactly."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from shoal.api.schema import Message
from shoal.api.tokenizer import Tokenizer
from shoal.engine.detokenizer import Detokenizer
from shoal.errors import ContextLengthExceeded, InvalidRequest
from shoal.model.files import locate
from shoal.wire.messages import PromptOutline

TURNS = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hello!", name="Ann"),
    Message(role="assistant", content="Hello."),
    Message(role="user", content="你好 👋"),
]


@settings(max_examples=60, deadline=None)
@given(st.text("ab 1.\n\x00é你👋\u0301", max_size=300), st.sampled_from(["", "<|im_end|>", " <|im_start|> "]))
@example("a" * 9000, "")
def test_any_text_has_the_ids_transformers_gives(tokenizer: Tokenizer, smollm2: Any, text: str, special: str) -> None:
    assert list(asyncio.run(tokenizer.encode(text + special + text))) == smollm2.encode(text + special + text)


async def test_a_conversation_has_the_ids_transformers_gives(tokenizer: Tokenizer, smollm2: Any) -> None:
    turns = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    expected = smollm2.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(await tokenizer.encode_chat(TURNS)) == expected


def parts(tokenizer: Tokenizer, ids: tuple[int, ...], outline: PromptOutline) -> tuple[str, str]:
    """Of the system prompt and of the answer's header, the text."""
    front, end = ids[: outline.num_system_tokens], ids[len(ids) - outline.num_header_tokens :]
    return tokenizer._tokenizer.decode(front), tokenizer._tokenizer.decode(end)


DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize(("turns", "system"), [(TURNS, "Be brief."), (TURNS[1:], DEFAULT_SYSTEM)])
async def test_a_conversation_s_parts_are_told_apart(tokenizer: Tokenizer, turns: list[Message], system: str) -> None:
    """The template's own system prompt counts."""
    ids = await tokenizer.encode_chat(turns)
    front, end = parts(tokenizer, ids, await tokenizer.outline_chat(turns, ids))
    assert front == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    assert end == "<|im_start|>assistant\n"


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}[INST] <<SYS>>{{ m.content }}<</SYS>>{% elif m.role == 'user' %}"
)
LLAMA_2 += (
    "{% if loop.first %}[INST]{% endif %} {{ m.content }} [/INST]{% else %} {{ m.content }}{% endif %}{% endfor %}"
)
REFUSES = "{% if not add_generation_prompt %}{{ raise_exception('answers only') }}{% endif %}"
OTHER_FRONT = "{{ 'answer' if add_generation_prompt else 'log' }}"


@pytest.mark.parametrize(
    ("template", "front", "end"),
    [
        (LLAMA_2, "[INST] <<SYS>>Be brief.<</SYS>> ", ""),
        (REFUSES + LLAMA_2, "[INST] <<SYS>>Be brief.<</SYS>> ", ""),
        (OTHER_FRONT + LLAMA_2, "answer[INST] <<SYS>>Be brief.<</SYS>> ", ""),
    ],
    ids=["system within the user's turn", "no rendering without the header", "another beginning without it"],
)
async def test_any_template_s_parts_are_told_or_counted_as_none(
    smollm2: Any, template: str, front: str, end: str
) -> None:
    before, smollm2.chat_template = smollm2.chat_template, template
    try:
        tokenizer = Tokenizer(smollm2)
        ids = await tokenizer.encode_chat(TURNS)
        found = parts(tokenizer, ids, await tokenizer.outline_chat(TURNS, ids))
    finally:
        smollm2.chat_template = before
    assert found[1] == end and found[0].strip() == front.strip()


FRONTS = ["", "{{ bos_token }}", "a", "{% if messages[0].role != 'system' %}<|im_start|>{% endif %}"]
TURN_TEMPLATES = [
    "",
    "{{ m.content }}",
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'system' %}{{ m.content }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}",
    "{% if m.role == 'user' %}{{ m.content }}{% endif %}",
]
HEADERS = ["", "a", "<|im_start|>assistant\n", "{{ messages[0].content }}"]
templates = st.builds(
    "{}{{% for m in messages %}}{}{{% endfor %}}{{% if add_generation_prompt %}}{}{{% endif %}}{}".format,
    st.sampled_from(FRONTS),
    st.sampled_from(TURN_TEMPLATES),
    st.sampled_from(HEADERS),
    st.sampled_from(["", "<|im_end|>"]),
)
turns = st.builds(
    Message, role=st.sampled_from(["system", "user", "assistant"]), content=st.sampled_from(["", "A", "a b"])
)


@examples(200)
@given(templates, st.lists(turns, min_size=1, max_size=4))
def test_a_prompt_s_parts_fit_into_it(
    tokenizer: Tokenizer, smollm2: Any, template: str, messages: list[Message]
) -> None:
    """Even if all messages are the system's, or the template writes nothing but the header of the answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "chat_template", template)
        ids = asyncio.run(tokenizer.encode_chat(messages))
        outline = asyncio.run(tokenizer.outline_chat(messages, ids))
    assert outline.num_system_tokens + outline.num_header_tokens <= len(ids)


async def test_long_texts_are_encoded_beside_the_event_loop(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(smollm2, max_inline_chars=10)
    threads: list[str] = []
    encode = tokenizer._encode

    def spy(text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        threads.append(threading.current_thread().name)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "_encode", spy)
    short, long = await asyncio.gather(tokenizer.encode("a" * 10), tokenizer.encode("a" * 11))
    tokenizer.close()
    assert short and long
    assert [name.startswith("shoal-tokenizer") for name in threads] == [False, True]


async def test_a_conversation_is_as_long_as_its_messages_are_many(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def render(messages: object) -> str:
        threads.append(threading.current_thread().name)
        return ""

    monkeypatch.setattr(tokenizer, "render", render)
    await tokenizer.encode_chat([Message(role="user", content="")])
    await tokenizer.encode_chat([Message(role="user", content="")] * 1000)
    await tokenizer.encode_chat([Message(role="user", content="", name="a" * 9000)])
    assert [name.startswith("shoal-tokenizer") for name in threads] == [False, True, True]


async def test_a_text_of_the_longest_tokens_is_encoded_and_one_byte_more_refused(tokenizer: Tokenizer) -> None:
    longest = "\n" + " " * 80
    assert len(await tokenizer.encode(longest, max_tokens=1)) == 1
    with pytest.raises(ContextLengthExceeded, match="82 bytes are more than the model's context") as refused:
        await tokenizer.encode(longest + "a", max_tokens=1)
    assert refused.value.param == "prompt"
    with pytest.raises(ContextLengthExceeded) as refused:
        await tokenizer.encode_chat([Message(role="user", content="a" * 810)], max_tokens=10)
    assert refused.value.param == "messages"


async def test_what_cant_fit_is_refused_before_it_is_encoded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Tokenizer, "_encode")
    with pytest.raises(ContextLengthExceeded):
        await tokenizer.encode("你" * 2800, max_tokens=100)  # bytes count, not characters


@pytest.mark.parametrize("shortener", [normalizers.Strip(), AddedToken("<gap>", rstrip=True)])
async def test_a_tokenizer_that_shortens_a_text_encodes_it_first(shortener: Any) -> None:
    fast = locate("smollm2").tokenizer()
    if isinstance(shortener, AddedToken):
        fast.backend_tokenizer.add_tokens([shortener])
    else:
        fast.backend_tokenizer.normalizer = shortener
    ids = await Tokenizer(fast).encode("<gap>" + " " * 2000, max_tokens=4)
    assert len(ids) <= 4


async def test_a_model_without_a_template_refuses_conversations(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "chat_template", None)
    with pytest.raises(InvalidRequest, match="send a prompt"):
        await Tokenizer(smollm2).encode_chat(TURNS)


async def test_who_isn_t_to_think_is_told_as_the_template_does(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3's does; a template without a choice never looks."""
    tokenizer, plain = Tokenizer(smollm2), await Tokenizer(smollm2).encode_chat(TURNS)
    assert await tokenizer.encode_chat(TURNS, may_think=False) == plain
    closed = "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    monkeypatch.setattr(smollm2, "chat_template", smollm2.chat_template + closed)
    assert await tokenizer.encode_chat(TURNS) == plain
    ids = await tokenizer.encode_chat(TURNS, may_think=False)
    assert tokenizer.decode(ids).endswith("assistant\n<think></think>")
    _, end = parts(tokenizer, ids, await tokenizer.outline_chat(TURNS, ids, may_think=False))
    assert end == "<|im_start|>assistant\n<think></think>"


async def test_of_a_template_that_says_so_at_its_beginning_parts_are_told_all_the_same(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = "{% if enable_thinking is false %}Don't think.{% endif %}"
    monkeypatch.setattr(smollm2, "chat_template", mode + smollm2.chat_template)
    tokenizer = Tokenizer(smollm2)
    ids = await tokenizer.encode_chat(TURNS, may_think=False)
    front, end = parts(tokenizer, ids, await tokenizer.outline_chat(TURNS, ids, may_think=False))
    assert front == "Don't think.<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert end == "<|im_start|>assistant\n"


async def test_a_template_that_refuses_is_the_clients_fault(smollm2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="chat template refuses them: roles must alternate") as refused:
        await Tokenizer(smollm2).encode_chat(TURNS)
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[9].content.x }}", "{{ messages[0].content.index('secret') }}", "{{ 'secret' + 1 }}", "{% secret %}"],
)
async def test_what_a_template_fails_with_is_told_to_the_log_alone(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, template: str
) -> None:
    monkeypatch.setattr(smollm2, "chat_template", template)
    with pytest.raises(InvalidRequest) as refused:
        await Tokenizer(smollm2).encode_chat(TURNS)
    assert refused.value.message == "messages: the model's chat template can't render them"
    assert refused.value.param == "messages"
    [record] = caplog.records
    assert record.message == "a chat template failed" and record.exc_info


def test_a_prompt_is_never_cut_or_filled_up(smollm2: Any) -> None:
    backend = smollm2.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(smollm2)
    assert len(asyncio.run(tokenizer.encode("one two three four five"))) == 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 49_151), max_size=30))
def test_any_ids_stream_to_their_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer.decode)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.flush() == tokenizer.decode(ids)
