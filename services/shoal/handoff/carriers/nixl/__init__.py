"""Payload in memory that decode reads through NIXL: shared memory or TCP on CPUs, RDMA where UCX is told to.

::

    prefill  makes an agent, and slots that it registers ─> Hello      decode  makes an agent, reads the nonce ─> Hello
             writes a free slot ─> Chunk                                       READs it into a buffer of its own,
             the slot is free again                                            and only then verifies ─> Credit

Both agents are made for one session, under names that nobody can guess, and end with it: no agent is ever updated.
Prefill never writes into decode's memory, and what travels of NIXL's is one agent's metadata, inside Hello.

A READ can't be stopped, only waited for. One that is still under way when its session ends leaves its buffer *retired*
(``retired.py``): registered, counted and used for nothing, until NIXL says that the READ is done or has failed. Time
never says so.

=============  ============  ===============================================================
``process``    event loop    what a replica opens once: the thread, and what is retired
``thread``     its own       the one that calls NIXL; it sleeps while nothing is under way
``agent``      NIXL thread   an agent, its errors in our words
``loader``     both          prefill's slots
``unloader``   event loop    decode's end of a session
``reader``     NIXL thread   its buffers, and the READs under way
=============  ============  ===============================================================
"""
