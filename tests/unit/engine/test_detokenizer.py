"""The incremental text equals the text decoded at once, whatever the tokens are cut like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.detokenizer import Detokenizer

# --- three kinds of tokenizers, reduced to what matters: a token is a few bytes ---------------------------------

# Every byte, so that any text can be written; then pieces that begin, end or span characters.
BYTE_LEVEL = [bytes([value]) for value in range(256)] + [
    b"hello", b" world", b"the", b" ", b"\n", "é".encode(), "你".encode(), "你好".encode(), "👋".encode(),
    "你".encode()[:2], "你".encode()[2:] + b"a", "👋".encode()[:3], "👋".encode()[1:],
    "好".encode()[1:] + "你".encode()[:1], "\ufffd".encode(), b"",
]  # fmt: skip


def byte_level(ids: Sequence[int]) -> str:
    """GPT-2's way: bytes, joined, then read as UTF-8. The last token is a special one, which shows as nothing."""
    return b"".join(BYTE_LEVEL[token_id] for token_id in ids).decode("utf-8", errors="replace")


# SentencePiece's way: ▁ is a space, the text's first one is dropped; a run of <0x..> is UTF-8 as a whole or not at all.
PIECES: list[str | int] = ["▁hello", "▁", "▁▁", "wor", "ld", "▁the", "a", "é", "你", ".", "\n", *range(256)]


def byte_fallback(ids: Sequence[int]) -> str:
    text, run = "", b""
    for token_id in [*ids, None]:
        piece = None if token_id is None else PIECES[token_id]
        if isinstance(piece, int):
            run += bytes([piece])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += (piece or "").replace("▁", " ")
    return text.removeprefix(" ")


def ids_of_bytes(text: str) -> list[int]:
    return list(text.encode())


def fallback_ids(text: str) -> list[int]:
    """``text`` in pieces where there's one, else in bytes."""
    known = {piece: index for index, piece in enumerate(PIECES) if isinstance(piece, str)}
    first_byte = PIECES.index(0)
    ids: list[int] = []
    for char in text.replace(" ", "▁"):
        ids += [known[char]] if char in known else [first_byte + byte for byte in char.encode()]
    return ids


def pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int], **options: object) -> list[str]:
    detokenizer = Detokenizer(decode, **options)  # type: ignore[arg-type]
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()]


def cut(text: str, stop: Sequence[str], num_exempt: int = 0) -> tuple[str, str | None]:
    """The oracle: read one character after another until a stop string is complete."""
    for end in range(num_exempt + 1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            found = max(complete, key=len)
            return text[: end - len(found)], found
    return text, None


# --- characters -----------------------------------------------------------------------------------------------

any_ids = st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=40)
garbage = st.lists(st.sampled_from([0x80, 0xBF, 0xC3, 0xE4, 0xF0, 0x9F, 0xFF, 0x61, 265, 267, 270]), max_size=40)


@given(any_ids | garbage)
def test_byte_level_pieces_join_to_the_whole_text(ids: list[int]) -> None:
    assert "".join(pieces(byte_level, ids)) == byte_level(ids)


@given(st.lists(st.text(st.sampled_from("ab é你👋\n▁"), max_size=4), max_size=12).map("".join))
def test_byte_fallback_pieces_join_to_the_whole_text(text: str) -> None:
    ids = fallback_ids(text)
    assert "".join(pieces(byte_fallback, ids)) == byte_fallback(ids)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    assert not any("\ufffd" in piece for piece in pieces(byte_level, ids_of_bytes(text)))


@given(st.text(st.characters(codec="ascii"), max_size=40))
def test_whole_characters_are_never_held_back(text: str) -> None:
    assert pieces(byte_level, ids_of_bytes(text)) == [*text, ""]


def test_endless_garbage_is_sent_and_decoded_in_small_windows() -> None:
    sizes: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return byte_level(ids)

    sent = pieces(decode, [0xFF] * 500)
    assert "".join(sent) == "\ufffd" * 500
    assert max(sizes) < 20
    assert sum(map(len, sent[:-1])) > 490


# --- stop strings ---------------------------------------------------------------------------------------------

short = st.text("ab", min_size=1, max_size=4)


@given(st.text("abc", max_size=30), st.lists(short, max_size=4))
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(byte_level, stop=stop)
    got = "".join(detokenizer.add(token_id) for token_id in ids_of_bytes(text)) + detokenizer.flush()
    assert (got, detokenizer.stop_reason) == cut(text, stop)


@given(any_ids, st.lists(st.sampled_from(["hello", "o w", "你", "好你", "\ufffd", "a", "l", "\n\n"]), max_size=4))
def test_stop_strings_are_found_however_tokens_cut_them(ids: list[int], stop: list[str]) -> None:
    detokenizer = Detokenizer(byte_level, stop=stop)
    got = "".join(detokenizer.add(token_id) for token_id in ids) + detokenizer.flush()
    assert (got, detokenizer.stop_reason) == cut(byte_level(ids), stop)


@given(st.text("ab", max_size=20), st.lists(short, min_size=1, max_size=3), st.integers(0, 20))
def test_stop_strings_complete_before_min_tokens_are_text(text: str, stop: list[str], min_tokens: int) -> None:
    detokenizer = Detokenizer(byte_level, stop=stop, min_tokens=min_tokens)
    got = "".join(detokenizer.add(token_id) for token_id in ids_of_bytes(text)) + detokenizer.flush()
    assert (got, detokenizer.stop_reason) == cut(text, stop, num_exempt=min_tokens)


@given(st.text("ab", max_size=20), st.lists(short, min_size=1, max_size=3), st.integers(0, 20))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string(
    text: str, stop: list[str], min_tokens: int
) -> None:
    detokenizer = Detokenizer(byte_level, stop=stop, min_tokens=min_tokens)
    beginnings = {string[:size] for string in stop for size in range(len(string))}
    num_sent = 0
    for position, token_id in enumerate(ids_of_bytes(text), start=1):
        num_sent += len(detokenizer.add(token_id))
        if detokenizer.stop_reason is not None:
            break
        held = text[num_sent:position]
        assert held == max((one for one in beginnings if text[:position].endswith(one)), key=len)


def test_special_tokens_are_no_part_of_an_open_character() -> None:
    special = BYTE_LEVEL.index(b"")
    ids = [0xE4, *[special] * 8, 0xBD, special, 0xA0, 0x80, 0x80, *[special] * 6]
    assert "".join(pieces(byte_level, ids)) == byte_level(ids) == "你\ufffd\ufffd"


def test_tokens_that_show_as_nothing_are_not_decoded_again_and_again() -> None:
    """As of a model that goes on after its end and says it once more each time."""
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level(ids)

    nothing, hello, world = len(BYTE_LEVEL) - 1, BYTE_LEVEL.index(b"hello"), BYTE_LEVEL.index(b" world")
    ids = [nothing] * 50 + [hello] + [nothing] * 500 + [world] + [nothing] * 50
    detokenizer = Detokenizer(decode)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.flush() == "hello world"
    assert longest < 6


@pytest.mark.parametrize("before", [[], ["nothing"], ["nothing"] * 3])
def test_a_space_that_shows_as_nothing_by_itself_is_kept(before: list[str]) -> None:
    """SentencePiece drops the first one of a text, and no other."""

    def decode(ids: Sequence[int]) -> str:
        return byte_fallback([token_id for token_id in ids if token_id >= 0])

    space, hello = PIECES.index("▁"), PIECES.index("▁hello")
    ids = [-1] * len(before) + [space, hello, -1, -1, space, hello]
    detokenizer = Detokenizer(decode)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.flush() == decode(ids) == " hello  hello"
