"""What is configured of the two pools, and of the hand-off between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.config.sections import Dtype, Frozen, PortRange, RateConfig, RetryConfig

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
        description="How far its compute threads step back for others on the same cores, as nice(1) counts; under "
        "a Ray that is joined (ray.address) a replica is at 15 of 19 already. By default 4 for prefill on CPUs, which "
        "gets 30 % of them while decode wants all, and else 0. Between containers with CPUs of their own it counts "
        "nothing.",
    )
    kv_pool_bytes: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Memory for K/V; by default 25 % of what is free, and where Ray sets a GPU aside for the replica "
        "70 % (of a part of one, such as num_gpus: 0.5, as large a part of that).",
    )
    num_blocks: Annotated[int, Field(ge=1)] | None = Field(None, description="The pool in blocks, instead of bytes.")
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Tokens in a block of the KV pool.")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: Shoal's own, for bfloat16 on CPUs with AVX-512, compiled ahead (a wheel brings "
        "them) or at the first start, and on GPUs, by Triton; auto: those where it can be, else torch's.",
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="int8: what is multiplied is rounded to 8 bits, weights and inputs, for about the same answers; "
        "half the bytes, and half the multiplications. By Shoal's own kernels alone; where a processor has a matrix "
        "unit (AMX), prompts take longer so. auto: model.dtype.",
    )
    reuse: Literal["none", "exact", "any"] = Field(
        "none",
        description="Whether prompts that begin alike share K/V; decode's not with the speed plan. any, of decode: "
        "answers of earlier turns, too, which are full depth where the prompt would be shallow, so that an answer may "
        "depend on what was asked before.",
    )
    max_step_tokens: Annotated[int, Field(ge=1)] = Field(
        2048, description="Tokens one forward may run: longer prompts come in chunks."
    )
    target_step_s: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="How long a step with prompts in it should take: where max_step_tokens would take longer, chunks "
        "are shorter, by what steps took before; so a replica's first long prompt is cut by max_step_tokens alone.",
    )
    max_sequences: Annotated[int, Field(ge=1)] = Field(64, description="Sequences that run at once.")
    pack_up_to: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Calls that a replica gets before another one of the pool gets any, at most max_sequences; 0: they "
        "are spread. By default half of max_sequences where each replica has all cores of one machine to compute on, "
        "and would read all weights for its own few answers, else 0.",
    )
    stream_interval: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Of decode: how many steps' tokens of an answer leave in one message. Neither the first nor the "
        "last, but for a stop string's, waits for others, and none if the next step would make it more than a tenth of "
        "a second late. With many streams, each message less leaves time to compute in.",
    )
    max_queued: Annotated[int, Field(ge=1)] = Field(
        256, description="Requests that may wait; more get 429, but answers that another replica has begun go on."
    )
    max_queued_tokens: Annotated[int, Field(ge=1)] = Field(
        1 << 20, description="Tokens that the requests which wait may have in all; a single one always may."
    )
    skip_layers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Must agree between the two pools; leave it to model.skip_layers."
    )
    kv_dtype: Dtype | None = Field(None, description="Must agree between the two pools; leave it to model.kv_dtype.")

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
        5.0, description="How long a lease outlives its last sign of life; decode's counts for both pools."
    )
    drain_s: Annotated[float, Field(gt=0)] = Field(2.0, description="How long open leases may finish on shutdown.")
    claim_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="How long decode waits for a prefill replica with room; then it computes the prompt itself."
    )
    credit_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        32 << 20, description="Bytes of a lease on their way at once."
    )
    max_frame_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 20)] = Field(1 << 20, description="Payload of a frame.")
    carrier: Literal["auto", "inline", "shm", "nixl"] = Field(
        "auto",
        description="How payload travels: inline in gRPC's frames, by shared memory where both replicas are on one "
        "host, or by NIXL, which decode reads prefill's memory with. auto is shm where that works, else nixl where it "
        "does, both have it and tls isn't set, which it would go around, else inline; shm and nixl warn where they "
        "don't work, and go inline, too.",
    )
    staging_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        64 << 20,
        description="Memory of a prefill replica for each decode replica that payload goes to by shm or nixl; of "
        "/dev/shm at most half of what is free.",
    )
    slot_bytes: Annotated[int, Field(ge=1 << 10, le=16 << 20)] = Field(
        8 << 20,
        description="Largest payload of shm and nixl: fewer, larger ones cost fewer frames. Slots are smaller where "
        "there is no room for four.",
    )
    max_retired_bytes: Annotated[int, Field(ge=0)] = Field(
        512 << 20,
        description="Buffers of a decode replica that NIXL may fill: four slots for each prefill replica, and those of "
        "reads that never ended, which are used no more. Beyond it, new sessions go inline.",
    )
    min_tokens: Annotated[int, Field(ge=2)] = Field(
        256,
        description="Shorter prompts are prefilled by decode itself, at the depth that was asked for: a step that "
        "decodes anyway takes them along, and to ship them would take longer than to compute them.",
    )
    local_tokens: Annotated[int, Field(ge=0)] = Field(
        512, description="Where decode has half of a prompt's K/V already, it computes up to so many tokens itself."
    )
    busy_after_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="A prompt of which prefill has sent nothing for so long is computed by decode itself, at the depth "
        "that was asked for, if that decode replica has nothing else to do; by default never. Where decode has cores "
        "or GPUs of its own, some times what a prompt takes alone is sensible: 5.",
    )
    yield_s: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="While prompts are on their way from prefill, a step of decode that only goes on with answers "
        "begins so long after the one before at the earliest, and leaves the cores to prefill until then: more answers "
        "at once for each step. Not for answers whose time ends within a minute. Where both pools compute on the same "
        "cores of a machine of their own (ray.address is unset), prompts on their way to any decode replica count, and "
        "the default is 0.08, where calls are spread times the number of decode replicas, but at most 0.2; elsewhere a "
        "replica's own prompts count, and it is 0.",
    )
    max_reserved_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Share of decode's pool that prompts on their way may hold."
    )
    max_attempts: Annotated[int, Field(ge=1, le=16)] = Field(
        3, description="Attempts at one request, those of the gateway and of decode together."
    )
    other_replica: RateConfig = Field(
        RateConfig(),
        description="How often a decode replica may turn to another prefill replica after a failure; beyond that, it "
        "computes the prompt itself.",
    )
    local: RetryConfig = Field(
        RetryConfig(),
        description="How often a decode replica may compute a prompt itself after a failure; beyond that, it's 503.",
    )
