"""One NIXL agent, with the errors of NIXL in our words. Called by the NIXL thread alone."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shoal.errors import Unavailable
from shoal.wire.frames import MAX_AGENT_BYTES

_BACKEND = "UCX"
_MEMORY = "DRAM"
_DEVICE = 0


@dataclass(frozen=True, slots=True)
class Registered:
    """Memory that an agent may read into, or be read from. ``descriptors`` are NIXL's."""

    memory: mmap.mmap
    address: int
    descriptors: Any


class Agent:
    """Raises Unavailable, always, for whatever NIXL raises.

    Nothing moves by itself: one side of a transfer calls ``progress``, the other ``is_done``.
    """

    def __init__(self) -> None:
        with _in_our_words("make an agent"):
            from nixl._api import nixl_agent, nixl_agent_config

            if "NIXL_LOG_LEVEL" not in os.environ:  # it tells each agent's name, on standard output
                logging.getLogger("nixl").setLevel(logging.WARNING)

            # A progress thread would burn a core, for every agent, also when nothing is to do.
            config = nixl_agent_config(enable_prog_thread=False, enable_listen_thread=False, backends=[_BACKEND])
            self._agent = nixl_agent(f"shoal-{secrets.token_hex(16)}", config)
        if _BACKEND not in self._agent.backends:
            raise Unavailable(f"NIXL has no {_BACKEND} backend here")

    def register(self, memory: mmap.mmap) -> Registered:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with _in_our_words("register memory"):
            descriptors = self._agent.register_memory([(address, len(memory), _DEVICE, "")], _MEMORY)
        return Registered(memory, address, descriptors)

    def deregister(self, registered: Registered) -> None:
        with _in_our_words("deregister memory"):
            self._agent.deregister_memory(registered.descriptors)

    @property
    def metadata(self) -> bytes:
        """What a peer needs to know: where this agent is, and what is registered by now."""
        with _in_our_words("describe an agent"):
            metadata: bytes = self._agent.get_agent_metadata()
        if len(metadata) > MAX_AGENT_BYTES:
            raise Unavailable(
                f"an agent's metadata are {len(metadata)} bytes here, more than {MAX_AGENT_BYTES}: let UCX use fewer "
                "devices (UCX_NET_DEVICES)"
            )
        return metadata

    def add_peer(self, metadata: bytes) -> str:
        """Another agent, by the name that it says it has."""
        with _in_our_words("use a peer's agent"):
            name = self._agent.add_remote_agent(metadata)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        with _in_our_words("remove a peer's agent"):
            self._agent.remove_remote_agent(name)

    def keep(self) -> None:
        """Let it never end, not even with the process: where a connection broke, something of it may be pending, and
        UCX then aborts the process that ends the agent. It costs some 6 MiB and a dozen files."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._agent))

    def progress(self) -> None:
        """Answer whatever peers have asked of this agent since."""
        with _in_our_words("make progress"):
            self._agent.get_new_notifs()

    def read(self, peer: str, address: int, target: Registered, num_bytes: int) -> Any:
        """Begin a READ of ``num_bytes`` at the peer's ``address``; returns its handle.

        May take as long as the whole READ does. When it raises, nothing is under way.
        """
        with _in_our_words("begin a READ"):
            here = self._agent.get_xfer_descs([(target.address, num_bytes, _DEVICE)], _MEMORY)
            there = self._agent.get_xfer_descs([(address, num_bytes, _DEVICE)], _MEMORY)
            handle = self._agent.initialize_xfer("READ", here, there, peer)
        with _in_our_words("READ"):
            self._agent.transfer(handle)
        return handle

    def is_done(self, handle: Any) -> bool:
        """Whether all of it has arrived. Raises once it has failed: nothing more of it arrives then, either."""
        with _in_our_words("READ"):
            state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise Unavailable("NIXL can't READ, and doesn't say why")
        return bool(state == "DONE")

    def release(self, handle: Any) -> None:
        """Of a READ that has ended: NIXL can't stop another."""
        with _in_our_words("release a READ"):
            self._agent.release_xfer_handle(handle)


def new_memory(num_bytes: int) -> mmap.mmap:
    """To be registered. Shared, so that a fork never moves what a device has been told the place of."""
    return mmap.mmap(-1, num_bytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def is_installed() -> bool:
    return importlib.util.find_spec("nixl") is not None


@contextmanager
def _in_our_words(what: str) -> Iterator[None]:
    """NIXL's own exceptions have no base in common, and those of C++ are Python's."""
    try:
        yield
    except (ImportError, RuntimeError, ValueError, IndexError, MemoryError) as error:
        raise Unavailable(f"NIXL can't {what}: {error}") from error
    except Exception as error:
        if not type(error).__name__.startswith("nixl"):
            raise
        raise Unavailable(f"NIXL can't {what}: {error}") from error
