"""The metrics of the two pools. Times are seconds, sizes bytes. Thread-safe: engine thread and event loop both call."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shoal.telemetry.labels import BlockState, FallbackRung, GrantWay, HandoffReason, PromptWay, TokenSource
from shoal.telemetry.registry import BATCH, KV_BYTES, LATENCY_S, TOKEN_S
from shoal.wire.handoff_messages import Carrier, CarrierReason, WireMode
from shoal.wire.messages import Depth, Stage


class StageMetrics:
    """One engine, in either pool: its queue, its blocks, its weights, and the prompts it encodes."""

    def __init__(self, registry: CollectorRegistry, stage: Stage) -> None:
        self._queue_depth = Gauge(
            "shoal_queue_depth", "Requests that wait for a place.", ("pool",), registry=registry
        ).labels(stage)
        self._queue_s = Histogram(
            "shoal_queue_seconds",
            "Seconds a request waited for a place.",
            ("pool",),
            buckets=LATENCY_S,
            registry=registry,
        ).labels(stage)
        self._blocks = Gauge("shoal_kv_blocks", "Blocks of the KV pool by state.", ("state",), registry=registry)
        self._usage = Gauge(
            "shoal_kv_cache_usage_ratio",
            "Share of the KV pool's blocks that is used or reserved, of the fuller kind.",
            registry=registry,
        )
        self._preemptions = Counter(
            "shoal_preemptions_total", "Sequences that gave up their blocks to an older one.", registry=registry
        )
        self._parameters = Gauge(
            "shoal_parameter_bytes", "Bytes of the weights this replica holds.", ("stage",), registry=registry
        ).labels(stage)
        self._full_parameters = Gauge(
            "shoal_full_model_parameter_bytes", "Bytes all weights of the model would take here.", registry=registry
        )
        self._prefill_s = Histogram(
            "shoal_prefill_seconds",
            "Seconds from a prompt's first step to its last, by depth.",
            ("depth",),
            buckets=LATENCY_S,
            registry=registry,
        )
        self._prefill_tokens = Counter(
            "shoal_prefill_tokens_total", "Prompt tokens, computed or found in a cache.", ("source",), registry=registry
        )
        self._prefix_queries = Counter(
            "shoal_prefix_cache_queries_total", "Prompt tokens that were looked up among those computed before.",
            registry=registry,
        )  # fmt: skip
        self._prefix_hits = Counter(
            "shoal_prefix_cache_hits_total", "Prompt tokens that were found among those computed before.",
            registry=registry,
        )  # fmt: skip
        self._layers_run = Gauge(
            "shoal_prefill_layers_run", "Layers that the tokens of the last prompt ran.", registry=registry
        )

    def queue_depth(self, num_waiting: int) -> None:
        self._queue_depth.set(num_waiting)

    def queued(self, seconds: float) -> None:
        self._queue_s.observe(seconds)

    def blocks(self, *, free: int, used: int, reserved: int, deep_usage: float = 0.0) -> None:
        """Reserved blocks wait for a hand-off; they are not counted as used.

        ``deep_usage`` is the share of the deep layers' blocks that is held, where they have blocks of their own.
        """
        self._blocks.labels(BlockState.FREE).set(free)
        self._blocks.labels(BlockState.USED).set(used)
        self._blocks.labels(BlockState.RESERVED).set(reserved)
        total = free + used + reserved
        self._usage.set(max((used + reserved) / total if total else 0.0, deep_usage))

    def preempted(self, num_sequences: int = 1) -> None:
        self._preemptions.inc(num_sequences)

    def parameters(self, *, held_bytes: int, full_model_bytes: int) -> None:
        self._parameters.set(held_bytes)
        self._full_parameters.set(full_model_bytes)

    def looked_up(self, num_tokens: int, num_found: int) -> None:
        """A prompt's beginning was looked for."""
        self._prefix_queries.inc(num_tokens)
        self._prefix_hits.inc(num_found)

    def prefilled(
        self, depth: Depth, seconds: float, *, num_layers: int, computed_tokens: int, cached_tokens: int = 0
    ) -> None:
        """A prompt is encoded."""
        self._prefill_s.labels(depth).observe(seconds)
        self._layers_run.set(num_layers)
        self._prefill_tokens.labels(TokenSource.COMPUTED).inc(computed_tokens)
        self._prefill_tokens.labels(TokenSource.CACHED).inc(cached_tokens)


class PrefillMetrics(StageMetrics):
    """A prefill replica."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry, Stage.PREFILL)
        self._pinned = Gauge(
            "shoal_kv_pinned_bytes", "Bytes of K/V kept for decode replicas that haven't committed.", registry=registry
        )

        self._sessions = Counter(
            "shoal_kv_sessions_total",
            "Sessions opened to decode replicas, by how their payload travels and what it is.",
            ("carrier", "reason", "wire_mode"),
            registry=registry,
        )

        self._grants = Counter(
            "shoal_prefill_grants_total",
            "Prompts begun, by what asked for them first: decode's session, or its call through Ray Serve.",
            ("way",),
            registry=registry,
        )
        for way in GrantWay:
            self._grants.labels(way)

    def granted(self, way: GrantWay) -> None:
        self._grants.labels(way).inc()

    def pinned(self, num_bytes: int) -> None:
        self._pinned.set(num_bytes)

    def session_opened(self, carrier: Carrier, reason: CarrierReason, wire_mode: WireMode) -> None:
        self._sessions.labels(carrier, reason, wire_mode).inc()


class DecodeMetrics(StageMetrics):
    """A decode replica."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry, Stage.DECODE)
        self._fallback = Counter(
            "shoal_kv_fallback_total", "Prompts that took another way than planned.", ("rung", "reason"),
            registry=registry,
        )  # fmt: skip
        self._prompts = Counter(
            "shoal_prompts_total",
            "Prompts by their way to the first token: handed off, or computed by decode itself, and why. Of a "
            "fallback, shoal_kv_fallback_total says more; an answer that is resumed isn't counted again.",
            ("way",),
            registry=registry,
        )
        for way in PromptWay:
            self._prompts.labels(way)
        self._step_s = Histogram(
            "shoal_decode_step_seconds", "Seconds of one step of the engine.", buckets=TOKEN_S, registry=registry
        )
        self._batch = Histogram(
            "shoal_decode_batch_size", "Sequences that ran in a step.", buckets=BATCH, registry=registry
        )
        self._tokens = Counter("shoal_decode_tokens_total", "Tokens generated.", registry=registry)
        self._request_kv = Histogram(
            "shoal_kv_choice_bytes",
            "Bytes of K/V that one choice held when it ended, with those it shares.",
            buckets=KV_BYTES,
            registry=registry,
        )

    def step(self, seconds: float, num_sequences: int) -> None:
        """The engine ran one step over ``num_sequences``."""
        self._step_s.observe(seconds)
        self._batch.observe(num_sequences)

    def decoded(self, num_tokens: int) -> None:
        self._tokens.inc(num_tokens)

    def held(self, num_bytes: int) -> None:
        """A choice has ended that held so much K/V."""
        self._request_kv.observe(num_bytes)

    def went(self, way: PromptWay) -> None:
        """A prompt came to its first token."""
        self._prompts.labels(way).inc()

    def fell_back(self, rung: str, reason: str) -> None:
        """A hand-off did not come about. ``rung`` is a ``labels.FallbackRung``, ``reason`` an error's code.

        Raises ValueError for another rung; a reason that isn't known counts as ``other``.
        """
        self._fallback.labels(FallbackRung(rung), HandoffReason(reason)).inc()
