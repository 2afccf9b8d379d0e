"""The tokenizer that a GGUF file carries.

A byte-level vocabulary with its merges is all there; how text is split before them is a name
(``tokenizer.ggml.pre``), which the table below spells out. Building it takes 0.3 s; transformers' own conversion takes
3 s and knows fewer splits (it lacks SmolLM2's single digits), so it is left to the other kinds of vocabulary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from shoal.errors import MalformedWeights, UnsupportedModel
from shoal.model.gguf_values import CONTROL
from shoal.model.tensor_file import TensorFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

_USER_DEFINED = 4  # as CONTROL
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(file: TensorFile) -> PreTrainedTokenizerFast:
    """The tokenizer with special tokens and chat template. Raises MalformedWeights if the vocabulary is damaged."""
    from transformers import PreTrainedTokenizerFast  # a second that who wants the backend alone needn't spend

    backend = _byte_level(file)
    if backend is None:
        return _converted(file)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **_specials(file),
    )


def gguf_backend(file: TensorFile) -> Tokenizer:
    """What ``gguf_tokenizer`` turns text into ids and back with. Raises MalformedWeights."""
    backend = _byte_level(file)
    return _converted(file).backend_tokenizer if backend is None else backend


def _kind(file: TensorFile) -> tuple[Any, Any]:
    """Of the vocabulary, and of how text is split."""
    return file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")


def _specials(file: TensorFile) -> dict[str, str | None]:
    tokens = _strings(file, "tokens")
    return {role: _special(file, key, tokens) for role, key in _SPECIAL.items()}


def _byte_level(file: TensorFile) -> Tokenizer | None:
    """``None`` for another kind of vocabulary, or one that is split in a way that isn't in the table."""
    model, pre = _kind(file)
    split = _splits().get(str(pre)) if model == "gpt2" else None
    if split is None:
        return None
    tokens = _strings(file, "tokens")
    tokenizer = Tokenizer(_bpe(file, tokens, whole_words=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(file, tokens, CONTROL, special=True))
    tokenizer.add_tokens(_added(file, tokens, _USER_DEFINED, special=False))
    special = _specials(file)
    names = [name for name in dict.fromkeys(special.values()) if name is not None]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    bos = special["bos_token"]
    if bos is not None and file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, tokens.index(bos))]
        )
    return tokenizer


def _splits() -> dict[str, Any]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encode_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "llama-bpe": pre_tokenizers.Sequence([llama3, encode_only]),
    }


def _converted(file: TensorFile) -> PreTrainedTokenizerFast:
    model, pre = _kind(file)
    if model == "gpt2":
        _bpe(file, _strings(file, "tokens"), whole_words=False)  # names damage that tokenizers raises as bare Exception
        _log.warning("unknown pre-tokenizer %r in a GGUF file: text may be split otherwise than in training", pre)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        folder, name = str(file.path.parent), file.path.name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise MalformedWeights(
            f"{file.path}: no tokenizer can be made from its {model!r} vocabulary: {error}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"{file.path}: transformers gives no fast tokenizer for its {model!r} vocabulary")
    return tokenizer


def _bpe(file: TensorFile, tokens: list[str], *, whole_words: bool) -> BPE:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise MalformedWeights(f"{file.path}: the vocabulary holds a token twice")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(file, "merges"))]
    if not all(left in vocab and right in vocab and left + right in vocab for left, right in merges):
        raise MalformedWeights(f"{file.path}: a merge names a token that the vocabulary lacks")
    return BPE(vocab=vocab, merges=merges, ignore_merges=whole_words)


def _strings(file: TensorFile, key: str) -> list[str]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not (isinstance(values, list) and values and all(isinstance(value, str) for value in values)):
        raise MalformedWeights(f"{file.path}: tokenizer.ggml.{key} is no list of strings")
    return values


def _added(file: TensorFile, tokens: list[str], kind: int, *, special: bool) -> list[AddedToken]:
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise MalformedWeights(f"{file.path}: tokenizer.ggml.token_type doesn't fit the {len(tokens)} tokens")
    chosen = (token for token, its_kind in zip(tokens, kinds, strict=False) if its_kind == kind)
    return [AddedToken(token, normalized=False, special=special) for token in chosen]


def _special(file: TensorFile, key: str, tokens: list[str]) -> str | None:
    index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise MalformedWeights(f"{file.path}: tokenizer.ggml.{key}_token_id is {index!r}, no token's id")
    return tokens[index]
