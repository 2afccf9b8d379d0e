"""Copies with their checksum: by the kernel and without it, both against numpy and google-crc32c."""

from __future__ import annotations

import threading

import google_crc32c
import numpy as np
import pytest
from engines import native_kernels, widening_kernels
from hypothesis import given
from hypothesis import strategies as st

from shoal.backends.cpu import copying
from shoal.backends.cpu.copying import Copier


@pytest.fixture(scope="module", params=["kernel", "kernel that widens", "numpy"])
def copier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Copier:
    """By this machine's kernel; by that of processors that multiply fewer bits at once; without one."""
    if request.param == "numpy":
        return Copier()
    if request.param == "kernel":
        return Copier(native_kernels())
    return Copier(widening_kernels(tmp_path_factory.getbasetemp().parent / "kernels"))


def random_bytes(size: int) -> memoryview:
    return memoryview(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))  # type: ignore[arg-type]


def crc_of(array: np.ndarray) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(array).reshape(-1)))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 64, 65, 128, 192, 1000, 4096, 1 << 20, (1 << 20) + 8, (1 << 20) - 64])
def test_a_copy_is_the_source_and_its_checksum(copier: Copier, size: int) -> None:
    source, around = random_bytes(size), np.full(size + 2, 7, np.uint8)
    assert copier.copy(source, around[1:-1]) == crc_of(np.frombuffer(source, np.uint8))
    assert around[1:-1].tobytes() == source
    assert around[0] == around[-1] == 7


def rows_at(offset: int, num_rows: int, row_bytes: int) -> np.ndarray:
    """So many bytes after a multiple of 64: at 0 the kernel stores past the caches."""
    around = np.full(num_rows * row_bytes + 128, 9, np.uint8)
    start = -around.ctypes.data % 64 + offset
    return around[start : start + num_rows * row_bytes].reshape(num_rows, row_bytes)


@given(data=st.data())
def test_rows_land_where_they_belong_and_nowhere_else(copier: Copier, data: st.DataObject) -> None:
    num_targets = data.draw(st.integers(1, 4))
    at = np.array(data.draw(st.lists(st.integers(0, 19), unique=True, max_size=20)), np.int64)
    row_bytes = data.draw(st.sampled_from([1, 4, 8, 24, 64, 768, 1000]))
    skew = data.draw(st.integers(0, 7))  # payload of a frame lies anywhere
    whole = random_bytes(skew + num_targets * len(at) * row_bytes)
    targets = [rows_at(data.draw(st.sampled_from([0, 16])), 20, row_bytes) for _ in range(num_targets)]
    crc = copier.scatter(whole[skew:], targets, at)
    source = np.frombuffer(whole[skew:], np.uint8).reshape(num_targets, len(at), row_bytes)
    for target, rows in zip(targets, source, strict=True):
        expected = np.full((20, row_bytes), 9, np.uint8)
        expected[at] = rows
        np.testing.assert_array_equal(target, expected)
    assert crc == crc_of(source)


@given(data=st.data())
def test_rows_are_gathered_in_their_order_and_nothing_else_is_written(copier: Copier, data: st.DataObject) -> None:
    row_bytes = data.draw(st.sampled_from([1, 4, 8, 24, 64, 768, 1000]))
    num_sources = data.draw(st.integers(1, 4))
    sources = [np.frombuffer(random_bytes(20 * row_bytes), np.uint8).reshape(20, row_bytes) for _ in range(num_sources)]
    sources = [np.roll(source, number, axis=0) for number, source in enumerate(sources)]
    at = np.array(data.draw(st.lists(st.integers(0, 19), max_size=20)), np.int64)
    expected = np.stack([source[at] for source in sources])
    around = np.full(expected.size + 2, 9, np.uint8)
    assert copier.gather(sources, at, around[1:-1]) == crc_of(expected)
    np.testing.assert_array_equal(around[1:-1], expected.reshape(-1))
    assert around[0] == around[-1] == 9


def test_more_than_a_piece(copier: Copier) -> None:
    rows = 5 + copying._PIECE_BYTES // 768
    at = np.random.default_rng(0).permutation(rows)
    source, targets = random_bytes(2 * rows * 768), [np.zeros((rows, 768), np.uint8) for _ in range(2)]
    assert copier.scatter(source, targets, at) == crc_of(np.frombuffer(source, np.uint8))
    landed = np.stack([target[at] for target in targets])
    assert landed.tobytes() == source
    back = np.zeros(2 * rows * 768, np.uint8)
    assert copier.gather(targets, at, back) == crc_of(back)
    assert back.tobytes() == source


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there_is_an_error_and_nothing_is_written(copier: Copier, row: int) -> None:
    targets = [np.zeros((4, 8), np.uint8), np.zeros((3, 8), np.uint8)]
    with pytest.raises(IndexError, match="of 3"):
        copier.scatter(b"x" * 32, targets, np.array([0, row]))
    assert not any(target.any() for target in targets)
    gathered = np.zeros(32, np.uint8)
    with pytest.raises(IndexError, match="of 3"):
        copier.gather([target + 1 for target in targets], np.array([0, row]), gathered)
    assert not gathered.any()


def test_bytes_that_do_not_fit_are_an_error(copier: Copier) -> None:
    with pytest.raises(ValueError, match="don't fit"):
        copier.copy(bytes(8), np.zeros(16, np.uint8))
    with pytest.raises(ValueError, match="aren't 1 rows of 8"):
        copier.scatter(bytes(16), [np.zeros((2, 8), np.uint8)], np.array([0]))
    with pytest.raises(ValueError, match="aren't 1 rows of 8"):
        copier.gather([np.zeros((2, 8), np.uint8)], np.array([0]), np.zeros(16, np.uint8))


@pytest.mark.parametrize("offset", [0, 16])
def test_the_checksum_is_of_what_was_written_whatever_happens_to_the_source(copier: Copier, offset: int) -> None:
    """Somebody writes to it all the while: what they write may be copied, or not, but never checked and not copied."""
    source = np.zeros(1 << 20, np.uint8)
    at, is_over = np.random.default_rng(0).permutation(1 << 14), threading.Event()

    def write() -> None:
        value = 0
        while not is_over.is_set():
            value = (value + 1) % 256
            source[:] = value

    writer = threading.Thread(target=write)
    writer.start()
    try:
        num_rounds = torn = 0
        # On busy cores the writer may not come in between for a while.
        while num_rounds < 40 or (not torn and num_rounds < 4000):
            num_rounds += 1
            plain, target = np.empty(1 << 20, np.uint8), rows_at(offset, 1 << 14, 64)
            assert copier.copy(memoryview(source), plain) == crc_of(plain)  # type: ignore[arg-type]
            assert copier.scatter(memoryview(source), [target], at) == crc_of(target[at])  # type: ignore[arg-type]
            assert copier.gather([source.reshape(-1, 64)], at, plain) == crc_of(plain)
            torn += len(np.unique(plain)) > 1
        assert torn  # else nothing was shown
    finally:
        is_over.set()
        writer.join()
