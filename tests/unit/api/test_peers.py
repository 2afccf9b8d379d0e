"""Calls that need no key, by where they come from."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from shoal.api.peers import PeerCalls
from shoal.errors import Overloaded


@pytest.mark.parametrize("address", ["ipv4:10.0.0.1", "ipv6:%5Bfd00::5%5D"])
def test_one_address_has_so_many_calls_over_all_of_its_connections_and_others_have_theirs(address: str) -> None:
    calls = PeerCalls(2)
    with ExitStack() as stack:
        for port in (1, 2):
            stack.enter_context(calls.counted(f"{address}:{port}"))
        with pytest.raises(Overloaded), calls.counted(f"{address}:3"):
            raise AssertionError("it was let in")
        stack.enter_context(calls.counted("ipv4:10.0.0.2:1"))
    assert not calls._open  # who has gone leaves nothing behind
    with calls.counted(f"{address}:3"):
        pass
