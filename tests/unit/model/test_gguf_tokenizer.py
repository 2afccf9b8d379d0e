"""Tokenizers that are built from a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_tiny_gguf, tiny_llama

from shoal.errors import MalformedWeights
from shoal.model.files import locate
from shoal.model.gguf_tokenizer import gguf_backend, gguf_tokenizer


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return locate("smollm2").tokenizer()


@pytest.mark.slow
def test_smollm2_tokenizes_as_transformers_does_where_no_digit_follows_spaces(smollm2: Any):
    from transformers import AutoTokenizer

    path = locate("smollm2").path
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [
        "The quick brown fox, isn't it?",
        "def f(x):\n\treturn x ** 2  # no\n\n\nnext",
        "naïve Café Ελληνικά 漢字 🙂👩‍👩‍👧 \u200d",
        "In 1984, 3.14159 and 10,000 or v2.0",
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
        " ",
    ]
    for text in texts:
        ids = smollm2(text).input_ids
        assert ids == theirs(text).input_ids, text
        assert smollm2.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    assert smollm2.chat_template == theirs.chat_template
    ours, reference = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for tokenizer in (smollm2, theirs)
    )
    assert ours == reference


def test_smollm2_splits_every_digit_from_what_is_before_it(smollm2: Any):
    """As it was trained: a space before a digit is a token of its own kind, never part of the number."""
    assert smollm2.convert_ids_to_tokens(smollm2("a\n  12 3").input_ids) == ["a", "ĊĠĠ", "1", "2", "Ġ", "3"]


def test_smollm2s_text_is_the_same_without_transformers_around_its_tokenizer(smollm2: Any):
    assert_same_text(locate("smollm2").backend_tokenizer(), smollm2)


def assert_same_text(backend: Any, tokenizer: Any) -> None:
    for skip in (True, False):
        for token_id in range(len(tokenizer)):
            ids = [token_id, 4]
            theirs = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
            assert backend.decode(ids, skip_special_tokens=skip) == theirs, token_id


BYTES = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<s>", "</s>", *"abcdĠ", "ab", "<x>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def tokenizer_with(tmp_path: Path, **changes: Any) -> Any:
    path = tmp_path / "t.gguf"
    metadata = {**BYTES, **{f"tokenizer.{key}": value for key, value in changes.items()}}
    save_tiny_gguf(path, tiny_llama(torch.float32, layers=1)[1], **metadata)
    return gguf_tokenizer(locate(str(path)).tensor_files[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ggml.eos_token_id": 8},  # one that the file doesn't call a special one
        {"ggml.unknown_token_id": 3, "ggml.padding_token_id": 7},
        {"ggml.token_type": []},
        {"ggml.pre": "of-tomorrow"},
    ],
    ids=str,
)
def test_text_is_the_same_whatever_the_file_says_of_its_tokens(tmp_path: Path, changes: dict[str, Any]):
    path = tmp_path / "t.gguf"
    metadata = {**BYTES, **{f"tokenizer.{key}": value for key, value in changes.items()}}
    save_tiny_gguf(path, tiny_llama(torch.float32, layers=1)[1], **metadata)
    [file] = locate(str(path)).tensor_files
    assert_same_text(gguf_backend(file), gguf_tokenizer(file))


def test_a_byte_level_vocabulary_is_built_from_metadata(tmp_path: Path):
    tokenizer = tokenizer_with(tmp_path)
    assert tokenizer("abc<x></s>").input_ids == [7, 4, 8, 1]
    assert tokenizer.decode([7, 4, 8, 1], skip_special_tokens=True) == "abc<x>"


@pytest.mark.parametrize(("add", "expected"), [(True, [0, 7]), (False, [7])])
def test_bos_is_added_where_the_file_says_so(tmp_path: Path, add: bool, expected: list[int]):
    tokenizer = tokenizer_with(tmp_path, **{"ggml.add_bos_token": add})
    assert tokenizer("ab").input_ids == expected
    assert tokenizer("ab", add_special_tokens=False).input_ids == [7]


@pytest.mark.parametrize(
    "changes",
    [
        {"ggml.tokens": ["a", "a"]},
        {"ggml.tokens": [1, 2]},
        {"ggml.tokens": None},
        {"ggml.merges": ["a z"]},
        {"ggml.merges": ["ab"]},
        {"ggml.merges": None},
        {"ggml.token_type": [3]},
        {"ggml.token_type": "x"},
        {"ggml.eos_token_id": 9},
        {"ggml.eos_token_id": "x"},
        {"ggml.pre": "frob", "ggml.merges": ["a z"]},
        {"ggml.model": "frob"},
        {"ggml.model": None},
    ],
)
def test_damaged_vocabularies_are_malformed(tmp_path: Path, changes: dict[str, Any]):
    with pytest.raises(MalformedWeights):
        tokenizer_with(tmp_path, **changes)
