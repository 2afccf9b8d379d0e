"""Prompts as token ids: Shoal's own, and what people bring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import BOS, tiny_tokenizer

from shoal.errors import DataError
from shoal_lab.quality.prompts import read_prompts, shipped_prompts

TOKENIZER = tiny_tokenizer()


def plain():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_the_shipped_prompts_are_many_and_asked_as_a_chat_where_there_is_a_template():
    asked, raw = shipped_prompts(TOKENIZER), shipped_prompts(plain())
    assert len(set(asked)) == len(asked) == len(raw) >= 60
    assert TOKENIZER.decode(asked[0]).startswith("<s>user:What is the difference")
    assert TOKENIZER.decode(raw[0]).startswith("What is the difference")


def test_a_text_is_cut_into_windows_and_a_short_end_is_left_out(tmp_path: Path):
    (tmp_path / "text.txt").write_text("abcdefghij" * 10)
    prompts = read_prompts(tmp_path / "text.txt", TOKENIZER, max_tokens=30)
    assert [TOKENIZER.decode(prompt) for prompt in prompts] == ["abcdefghij" * 3] * 3


def test_lines_may_be_prompts_or_conversations(tmp_path: Path):
    lines = [{"prompt": "a\u2028b"}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "data.jsonl").write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    raw, chat = read_prompts(tmp_path / "data.jsonl", TOKENIZER, max_tokens=30)
    assert TOKENIZER.decode(raw).startswith("a")
    assert chat[0] == BOS and TOKENIZER.decode(chat) == "<s>user:hi|assistant:"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.csv", b"a,b", "neither .txt"),
        ("data.txt", b"short", "too few prompts (0)"),
        ("data.jsonl", b'{"prompt": "one"}', "too few prompts (1)"),
        ("data.jsonl", b'{"prompt": "one"}\n{"prompt": ', "line 2"),
        ("data.jsonl", b'{"prompt": "one"}\n{"prompt": "' + b"a" * 41 + b'"}', "prompt 2: 41 tokens, and 40"),
    ],
)
def test_bad_data_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, says: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / name, TOKENIZER, max_tokens=40)
    assert says in caught.value.message and name in caught.value.message
