from __future__ import annotations

import hashlib
import struct

from shoal.handoff.base import crc32c, new_incarnation, prompt_hash


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial


def test_the_prompt_hash_is_sha256_of_little_endian_int64() -> None:
    ids = (1, 2**31 - 1, 0)
    assert prompt_hash(ids) == hashlib.sha256(struct.pack("<3q", *ids)).digest()


def test_the_prompt_hash_tells_order_and_length() -> None:
    assert len({prompt_hash(ids) for ids in [(), (0,), (0, 0), (0, 1), (1, 0)]}) == 5


def test_incarnations_are_random_and_never_zero() -> None:
    drawn = {new_incarnation() for _ in range(100)}
    assert len(drawn) == 100
    assert all(0 < incarnation < 1 << 64 for incarnation in drawn)
