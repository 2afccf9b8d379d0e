from __future__ import annotations

import hashlib
import struct

from shoal.handoff.base import crc32c, prompt_hash


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial


def test_the_prompt_hash_is_sha256_of_little_endian_int64() -> None:
    ids = (1, 2**31 - 1, 0)
    assert prompt_hash(ids) == hashlib.sha256(struct.pack("<3q", *ids)).digest()
