"""What is configured of the two pools, and of the hand-off between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.config.sections import Frozen, PortRange, RateConfig, RetryConfig

# Linux gives 2.4 times as much to whoever is 4 less nice. Workers of a Ray that is joined are at 15 of 19 already.
PREFILL_NICENESS = 4


class StageConfig(Frozen):
    """One pool: how many replicas, on which resources, with how much memory."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Processes, each with its own weights.")
    num_cpus: Annotated[float, Field(ge=0)] = Field(1, description="CPUs that Ray sets aside for a replica.")
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        0, description="GPUs that Ray sets aside for a replica, which computes on one: 1, or a part, such as 0.5."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …; auto is cuda where num_gpus > 0, else cpu.")
    num_threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Compute threads; by default all cores that the process may use."
    )
    niceness: Annotated[int, Field(ge=0, le=19)] | None = Field(
        None,
        description="By how much its compute threads yield to others on the same cores, as in nice(1). By default 4 "
        "for prefill on CPUs, so that decode gets most of shared cores, and else 0. Under a Ray that is joined "
        "(ray.address), replicas start at 15 of 19. Without effect between containers with CPUs of their own.",
    )
    kv_pool_bytes: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Memory for K/V; by default 25 % of what is free, or 70 % of a GPU that Ray sets aside (for "
        "num_gpus: 0.5, half of that).",
    )
    num_blocks: Annotated[int, Field(ge=1)] | None = Field(None, description="The pool in blocks, instead of bytes.")
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Tokens in a block of the KV pool.")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: Shoal's own, for bfloat16 on CPUs with AVX-512 (compiled in a wheel, or at the first "
        "start), and by Triton on GPUs. auto: native where possible, else torch's.",
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="int8: weights and the inputs they multiply are rounded to 8 bits; half the bytes for nearly the "
        "same answers. Needs native kernels; on processors with AMX, prompts take longer. auto: model.dtype.",
    )
    reuse: Literal["none", "exact", "any"] = Field(
        "none",
        description="Whether prompts that begin alike share K/V; not decode's under the speed plan. any, of decode: "
        "also the full-depth K/V of earlier answers, so that an answer may depend on what was asked before.",
    )
    max_step_tokens: Annotated[int, Field(ge=1)] = Field(
        2048, description="Tokens of one step; longer prompts are cut into chunks."
    )
    target_step_s: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="How long a step with prompts should take: chunks are cut shorter than max_step_tokens, by what "
        "earlier steps took.",
    )
    max_sequences: Annotated[int, Field(ge=1)] = Field(64, description="Sequences that run at once.")
    pack_up_to: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Calls that one replica gets before the next one gets any, at most max_sequences; 0 spreads them. "
        "By default half of max_sequences where the pool's replicas share all cores of one machine, since each reads "
        "all weights for its own answers, else 0.",
    )
    stream_interval: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Of decode: how many steps' tokens leave in one message. The first token never waits, the last "
        "only for a stop string, and none more than a tenth of a second. With many streams, fewer messages leave more "
        "time to compute.",
    )
    max_queued: Annotated[int, Field(ge=1)] = Field(
        256, description="Requests that may wait; more get 429. Answers that another replica has begun are not refused."
    )
    max_queued_tokens: Annotated[int, Field(ge=1)] = Field(
        1 << 20, description="Tokens of all waiting requests together; a single one may always wait."
    )

    @model_validator(mode="after")
    def _packs_what_runs(self) -> StageConfig:
        if self.pack_up_to is not None and self.pack_up_to > self.max_sequences:
            raise ValueError(
                f"pack_up_to ({self.pack_up_to}) is above max_sequences ({self.max_sequences}): calls would wait for "
                "one replica while another one has nothing to do"
            )
        return self

    def packs_up_to(self, *, share_cores: bool) -> int:
        """``pack_up_to``, or its default where the pool's replicas ``share_cores`` or don't."""
        if self.pack_up_to is not None:
            return self.pack_up_to
        return self.max_sequences // 2 if share_cores else 0


class HandoffConfig(Frozen):
    """How a prompt's KV passes from prefill to decode (docs/architecture.md)."""

    host: str = Field(
        "127.0.0.1", description="Address that decode's server binds, for prefill and gateways; auto is its Ray node's."
    )
    advertised_host: str | None = Field(
        None,
        description="Address told to prefill and gateways; by default host, or the node's if host is all interfaces.",
    )
    port_range: PortRange = Field(PortRange(first=21000, last=21999), description="Where decode replicas listen.")
    wire_mode: Literal["auto", "kv", "hidden"] = Field(
        "kv",
        description="What is shipped for the skipped layers: their K/V, or the hidden state that decode projects them "
        "from. auto is kv where payload goes by shared memory, and what is fewer bytes elsewhere.",
    )
    ttl_s: Annotated[float, Field(gt=0)] = Field(
        5.0, description="How long a lease lives after its last sign of life; decode's setting counts for both pools."
    )
    drain_s: Annotated[float, Field(gt=0)] = Field(2.0, description="How long open leases may finish on shutdown.")
    claim_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0,
        description="How long decode waits for a prefill replica with free blocks; then it computes the prompt itself.",
    )
    credit_bytes: Annotated[int, Field(ge=1 << 20)] = Field(32 << 20, description="Bytes of one lease in flight.")
    max_frame_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 20)] = Field(1 << 20, description="Payload of a frame.")
    carrier: Literal["auto", "inline", "shm", "nixl"] = Field(
        "auto",
        description="How payload travels: inline in gRPC frames, shm on one host, or nixl. auto: shm where it works, "
        "else nixl where both have it and tls isn't set (NIXL bypasses it), else inline. shm and nixl fall back to "
        "inline with a warning.",
    )
    staging_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        64 << 20,
        description="Memory of a prefill replica for each decode replica that it ships to by shm or nixl; at most "
        "half of what is free in /dev/shm.",
    )
    slot_bytes: Annotated[int, Field(ge=1 << 10, le=16 << 20)] = Field(
        8 << 20, description="Largest payload of shm and nixl. Slots are smaller where there is no room for four."
    )
    max_retired_bytes: Annotated[int, Field(ge=0)] = Field(
        512 << 20,
        description="Buffers of a decode replica that NIXL may still fill: four slots for each prefill replica, and "
        "those of reads that never ended. Beyond it, new sessions are inline.",
    )
    min_tokens: Annotated[int, Field(ge=2)] = Field(
        256,
        description="Shorter prompts are computed by decode, at the depth asked for: shipping would take longer than "
        "computing.",
    )
    local_tokens: Annotated[int, Field(ge=0)] = Field(
        512, description="Where decode has half of a prompt's K/V, it computes up to this many tokens itself."
    )
    busy_after_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="A prompt of which prefill has sent nothing for this long is computed by its decode replica, if "
        "that one is idle; by default never. Useful where decode has cores or GPUs of its own: a few times what a "
        "prompt takes, such as 5.",
    )
    yield_s: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Minimum gap between decode-only steps while prompts are in flight, which leaves the cores to "
        "prefill. Ignored for answers whose deadline is within a minute. By default 0.08 where both pools share a "
        "machine's cores (ray.address is unset), times the number of decode replicas where calls are spread, at most "
        "0.2; elsewhere 0.",
    )
    max_reserved_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of decode's pool that may be reserved for prompts in flight."
    )
    max_attempts: Annotated[int, Field(ge=1, le=16)] = Field(
        3, description="Attempts at one request, by gateway and decode together."
    )
    other_replica: RateConfig = Field(
        RateConfig(),
        description="How often a decode replica may ask another prefill replica after a failure; beyond that, it "
        "computes the prompt itself.",
    )
    local: RetryConfig = Field(
        RetryConfig(),
        description="How often a decode replica may compute a prompt itself after a failure; beyond that, it's 503.",
    )
