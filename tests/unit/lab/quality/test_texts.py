"""What ships is enough and doesn't overlap; what users bring is read, or refused with a word on what to do."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from pathlib import Path

import pytest
from models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from shoal.errors import DataError, TooLittleText
from shoal.model.files import locate
from shoal_lab.quality.texts import Kind, Split, load, opening, passages, read

TOKENIZER = tiny_tokenizer()
FILES = list(itertools.product(Kind, Split))


@functools.cache
def shipped_ids(kind: Kind, split: Split) -> list[int]:
    [ids] = load(kind, split).token_ids(locate("smollm2").tokenizer())
    return ids


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_is_evaluated_on_two_hundred_passages(kind: Kind):
    cut = passages(kind, [shipped_ids(kind, Split.EVALUATION)], num_prompt=512, num_continuation=128, limit=200)
    assert len(cut) == 200
    assert {(len(passage.prompt), len(passage.continuation)) for passage in cut} == {(512, 128)}


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_is_calibrated_on_120_000_tokens(kind: Kind):
    assert len(shipped_ids(kind, Split.CALIBRATION)) >= 120_000


@pytest.mark.parametrize("kind", Kind)
def test_no_paragraph_of_an_evaluation_is_in_any_calibration(kind: Kind):
    calibrations = [set(load(other, Split.CALIBRATION).documents[0].split("\n\n")) for other in Kind]
    evaluated = load(kind, Split.EVALUATION).documents[0].split("\n\n")
    seen = [text for text in evaluated if len(text) > 200 and any(text in known for known in calibrations)]
    assert seen == []


def test_passages_lie_in_order_apart_and_all_over_the_documents():
    documents = [range(1000), range(2000, 2095), range(3000, 3007)]
    cut = passages("own", documents, num_prompt=7, num_continuation=3, limit=40)
    assert len(cut) == 40
    spans = [passage.prompt + passage.continuation for passage in cut]
    assert all(span == tuple(range(span[0], span[0] + 10)) for span in spans)
    assert all(before[-1] < after[0] for before, after in itertools.pairwise(spans))
    assert spans[0][0] == 0
    assert spans[-1][0] >= 2000
    assert cut == passages("own", documents, num_prompt=7, num_continuation=3, limit=40)


def test_an_opening_stands_before_every_passage_once():
    documents = [[1, *range(10, 60)], range(60, 110)]
    cut = passages("own", documents, num_prompt=6, num_continuation=5, limit=100, opening=[1])
    assert {passage.prompt[0] for passage in cut} == {1}
    assert sum((passage.prompt + passage.continuation).count(1) for passage in cut) == len(cut)
    assert len(cut) == 10
    assert {len(passage.prompt) for passage in cut} == {6}


def test_the_opening_is_what_the_tokenizer_puts_before_a_text():
    assert opening(TOKENIZER) == ()
    with_bos = tiny_tokenizer()
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{with_bos.bos_token} $A", special_tokens=[(with_bos.bos_token, bos)]
    )
    assert opening(with_bos) == (bos,)


def test_too_little_text_is_said_with_what_is_needed():
    with pytest.raises(TooLittleText, match=r"own: 25 tokens in 2 documents hold 2 passages of 10, and 3 are needed"):
        passages("own", [range(20), range(5)], num_prompt=8, num_continuation=2, limit=9, at_least=3)


def test_a_text_file_is_one_document(tmp_path: Path):
    path = tmp_path / "letters.txt"
    data = "\ufeffDear all,\r\n\r\nà bientôt\r\n".encode()
    path.write_bytes(data)
    text = read(path)
    assert text.documents == ("Dear all,\n\nà bientôt\n",)
    assert (text.kind, text.digest) == ("letters", hashlib.sha256(data).hexdigest())


def test_a_jsonl_file_is_a_document_a_line(tmp_path: Path):
    talk = [{"role": "user", "content": "Hi"}]
    answered = [*talk, {"role": "assistant", "content": "Ho"}]
    records = [{"prompt": "one\u2028line"}, {"messages": talk}, {"messages": answered}]
    path = tmp_path / "own.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    first, asked, whole = read(path, TOKENIZER).documents
    assert first == "one\u2028line"
    assert asked == TOKENIZER.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert whole == TOKENIZER.apply_chat_template(answered, tokenize=False)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("own.csv", b"a,b", "neither .txt"),
        ("own.txt", b"", "is empty"),
        ("own.txt", b" \n", "is empty"),
        ("own.jsonl", b"\n", "is empty"),
        ("own.txt", b"caf\xe9", "UTF-8 (byte 3)"),
        ("own.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2 isn't JSON"),
        ("own.jsonl", b"[" * 100_000, "line 1 isn't JSON"),
        ("own.jsonl", b'["a"]', 'either "prompt" or "messages"'),
        ("own.jsonl", b'{"text": "a"}', 'either "prompt" or "messages"'),
        ("own.jsonl", b'{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ("own.jsonl", b'{"prompt": 3}', "must be text"),
        ("own.jsonl", b'{"prompt": " "}', "not empty"),
        ("own.jsonl", b'{"prompt": "\\ud83d"}', "surrogate"),
        ("own.jsonl", b'{"messages": []}', '"role" and "content"'),
        ("own.jsonl", b'{"messages": [{"role": "user", "content": ["a"]}]}', '"role" and "content"'),
    ],
)
def test_bad_data_is_refused_with_what_to_do(tmp_path: Path, name: str, content: bytes, reason: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        read(path, TOKENIZER)
    assert reason in str(refused.value)
    assert name in str(refused.value)


def test_messages_need_a_chat_template(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    bare = tiny_tokenizer()
    bare.chat_template = None
    for tokenizer in (None, bare):
        with pytest.raises(DataError, match="no chat template"):
            read(path, tokenizer)


def test_messages_that_the_template_refuses_are_refused(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    strict = tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('only systems') }}"
    with pytest.raises(DataError, match="line 1: the model's chat template refuses the messages: only systems"):
        read(path, strict)
