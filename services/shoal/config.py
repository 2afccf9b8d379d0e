"""Configuration: one frozen class a layer, unknown keys refused, checked once before anything starts.

A file is YAML in the shape of ``ShoalConfig``; every key can also come from the environment
(``SHOAL_DECODE__REPLICAS=2``). The command line wins over the environment, the environment over the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from shoal.errors import ConfigError
from shoal.machine import is_loopback, usable_threads
from shoal.yaml_file import read_yaml

AUTO = "auto"
"""As a host: the address that the Ray cluster knows this node by."""

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PortRange(_Frozen):
    """Ports ``first..last``, both included. A process takes the first free one."""

    first: Annotated[int, Field(ge=1, le=65535)] = Field(description="The lowest port; set it together with last.")
    last: Annotated[int, Field(ge=1, le=65535)] = Field(
        description="The highest port; a process takes the first free one."
    )

    @model_validator(mode="after")
    def _ordered(self) -> PortRange:
        if self.last < self.first:
            raise ValueError(f"last ({self.last}) is below first ({self.first})")
        return self


class RateConfig(_Frozen):
    """A token bucket: ``burst`` at once, ``per_s`` on average."""

    per_s: Annotated[float, Field(gt=0)] = Field(10.0, description="On average.")
    burst: Annotated[int, Field(ge=1)] = Field(100, description="At once, after a quiet while.")


class RetryConfig(RateConfig):
    """What follows a death. A replica that dies when it's full leaves 64 requests that ran and 256 that waited: by
    default, all of them go on at once."""

    burst: Annotated[int, Field(ge=1)] = Field(
        320, description="At once, after a quiet while: as many requests as a full decode replica has."
    )


class TlsConfig(_Frozen):
    """PEM files of a server: its certificate chain and key; with ``client_ca_file``, clients must have one, too."""

    cert_file: Path = Field(description="The server's certificate, and those between it and the root.")
    key_file: Path = Field(description="The certificate's private key, without a passphrase.")
    client_ca_file: Path | None = Field(
        None, description="Whose certificates clients must show; without it, they need none."
    )


class PeerTlsConfig(_Frozen):
    """Mutual TLS between Shoal's own processes. The section itself may be ``off`` (docs/certificates.md)."""

    folder: Path = Field(
        description="Has a folder for each role on a host (gateway, prefill, decode) with ca.crt, tls.crt and tls.key, "
        "as shoal certs makes them. Files that change are what the next connection uses."
    )


class ModelConfig(_Frozen):
    """Which model, and how its prompt is encoded."""

    name: str = Field("smollm2", description="A known name, a folder with safetensors, or a .gguf file.")
    served_name: str | None = Field(None, description="The name clients use; by default the model's own.")
    dtype: Dtype = Field("auto", description="Weights and activations; auto is bfloat16 where the machine has it.")
    kv_dtype: Dtype = Field("auto", description="The KV cache's dtype; auto is the same as dtype.")
    skip_layers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many of the last layers a shallow prompt skips; by default a third."
    )
    projector: str = Field(
        "auto", description="A file of shoal calibrate's; auto: the one beside the model, if any; paper: none."
    )
    boundary_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="How many tokens at a prompt's end are full depth: more lose less, and decode computes them."
    )
    plan: Literal["pop", "speed"] = Field(
        "pop",
        description="pop projects the skipped layers' K/V of the prompt. speed leaves them out, all but the anchors': "
        "only for checkpoints tuned for it (arXiv 2605.06105).",
    )
    anchors: Literal["bos", "system"] | Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Of speed: bos, the first token alone (the default); system, all before the user's first words; "
        "or so many tokens at the prompt's front.",
    )
    deep_blocks_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="Of speed: how many blocks decode's deep layers have, for each one of its other layers."
    )
    depth: Literal["auto", "shallow", "full"] = Field("auto", description="What a request gets that asks for none.")
    max_context_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Longest prompt plus answer; by default what the model was trained for."
    )

    @model_validator(mode="after")
    def _anchors_of_speed(self) -> ModelConfig:
        if self.anchors is not None and self.plan != "speed":
            raise ValueError("anchors are speed's: set plan to speed, or leave them out")
        return self

    @field_validator("anchors", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("bos, system, or a number of tokens")  # noqa: TRY004 - what pydantic reports as its own
        return value


class StageConfig(_Frozen):
    """One pool: how many replicas, on which resources, with how much memory."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Processes, each with its own weights.")
    num_cpus: Annotated[float, Field(ge=0)] = Field(1, description="CPUs that Ray sets aside for a replica.")
    num_gpus: Annotated[float, Field(ge=0)] = Field(0, description="GPUs that Ray sets aside for a replica.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 …; auto is cuda where num_gpus > 0.")
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
        None, description="Memory for K/V; by default 25 % of what is free."
    )
    num_blocks: Annotated[int, Field(ge=1)] | None = Field(None, description="The pool in blocks, instead of bytes.")
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Tokens in a block of the KV pool.")
    kernels: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="native: Shoal's own, for bfloat16 on CPUs with AVX-512, compiled at the first start; auto: those "
        "where it can be, else torch's.",
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="Of decode: int8 halves the bytes of weights that a step reads, for about the same answers; by "
        "Shoal's own kernels alone. auto: model.dtype.",
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
        "are shorter, by what steps took before.",
    )
    max_sequences: Annotated[int, Field(ge=1)] = Field(64, description="Sequences that run at once.")
    pack_up_to: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Calls that a replica gets before another one of the pool gets any, at most max_sequences; 0: they "
        "are spread. By default half of max_sequences where each replica has all cores of one machine to compute on, "
        "and would read all weights for its own few answers, else 0.",
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


class HandoffConfig(_Frozen):
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
    ttl_s: Annotated[float, Field(gt=0)] = Field(5.0, description="How long a lease outlives its last sign of life.")
    drain_s: Annotated[float, Field(gt=0)] = Field(2.0, description="How long open leases may finish on shutdown.")
    claim_timeout_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="How long decode waits for a prefill replica with room; then it computes the prompt itself."
    )
    credit_bytes: Annotated[int, Field(ge=1 << 20)] = Field(
        16 << 20, description="Bytes of a lease on their way at once."
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
        32 << 20,
        description="Memory of a prefill replica for each decode replica that payload goes to by shm or nixl; of "
        "/dev/shm at most half of what is free.",
    )
    slot_bytes: Annotated[int, Field(ge=1 << 10, le=16 << 20)] = Field(
        4 << 20, description="Largest payload of shm and nixl: fewer, larger ones cost fewer frames."
    )
    max_retired_bytes: Annotated[int, Field(ge=0)] = Field(
        256 << 20,
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
    yield_s: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="While prompts are on their way from prefill, a step of decode that only goes on with answers "
        "begins so long after the one before at the earliest, and leaves the cores to prefill until then: more answers "
        "at once for each step. Not for answers whose time ends within a minute. Where both pools compute on the same "
        "cores of a machine of their own (ray.address is unset), prompts on their way to any decode replica count, and "
        "the default is 0.05, where calls are spread times the number of decode replicas, but at most 0.2; elsewhere a "
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


class GatewayConfig(_Frozen):
    """Where clients come in, and what they may ask."""

    host: str = Field("127.0.0.1", description="Address of the HTTP and gRPC servers; loopback by default.")
    port: Port = Field(8000, description="HTTP. 0: any free one, on a private cluster.")
    grpc_port: Port = Field(9000, description="gRPC. 0: none.")
    tls: TlsConfig | None = Field(
        None,
        description="Of the HTTP and gRPC servers; without it, they speak plain text. Files that are replaced are what "
        "the next connection gets. HTTP by Ray Serve's proxy (a Serve config file, the chart) has none.",
    )
    keys_file: Path | None = Field(
        None,
        description="Tenants, hashes of their keys, and what each may do, as shoal keys writes them; read again when "
        "it changes. Without it, whoever reaches the gateway may ask.",
    )
    reflection: bool = Field(True, description="Whether the gRPC server tells clients its schema; off in production.")
    retry: RetryConfig = Field(
        RetryConfig(),
        description="How often a request may go to another decode replica when its own has died; who comes more often "
        "waits.",
    )
    resume: bool = Field(
        True,
        description="Whether another decode replica goes on with an answer whose own has died; else the answer ends "
        "with an error once its first token was made.",
    )
    resource: str | None = Field(
        None,
        description="A Ray resource that the gateway's node must have; by default that of `shoal serve`, or of the "
        "private cluster; anywhere for a Serve config file.",
    )
    num_cpus: Annotated[float, Field(ge=0)] = Field(0, description="CPUs that Ray sets aside for the gateway.")
    max_body_bytes: Annotated[int, Field(ge=1024)] = Field(4 << 20, description="Largest request; more gets 413.")
    max_choices: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Largest n.")
    max_logprobs: Annotated[int, Field(ge=0)] = Field(20, description="Most alternatives that are told for a token.")
    max_stop_strings: Annotated[int, Field(ge=0)] = Field(4, description="Most strings in stop.")
    max_stop_chars: Annotated[int, Field(ge=1)] = Field(256, description="Characters in one of them.")
    max_prompts: Annotated[int, Field(ge=1)] = Field(64, description="Prompts in one completions request.")
    max_running: Annotated[int, Field(ge=1)] = Field(
        2048,
        description="Requests that a gateway works on at once, waiting ones included, each of several prompts "
        "counting; more get 429.",
    )
    deadline_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="How long a request may take in all; a client may ask for less."
    )


class MetricsConfig(_Frozen):
    """Every process serves its own metrics; the gateway's /metrics/targets lists them for Prometheus."""

    host: str = Field("127.0.0.1", description="Address that each process binds; auto is that of its Ray node.")
    port_range: PortRange = Field(PortRange(first=22000, last=22999), description="Where processes listen, one each.")


class RayConfig(_Frozen):
    """The Ray cluster that carries the pools."""

    address: str | None = Field(None, description="auto joins the running cluster; by default a private one starts.")
    join_timeout_s: Annotated[float, Field(ge=0)] = Field(
        0.0, description="How long to wait until a joined cluster has the nodes that the pools need."
    )
    stop_timeout_s: Annotated[float, Field(ge=0)] = Field(
        60.0,
        description="How long a replica that is stopped (a drained node, a smaller pool) may finish its answers; "
        "where all of it ends, that is handoff.drain_s.",
    )
    stall_timeout_s: Annotated[float, Field(gt=0)] = Field(
        3.0,
        description="How long a thread of a replica may have work and neither come any further nor compute; ten times "
        "as long if it computes. Then the replica gets no more work, and Serve replaces it unless it goes on soon.",
    )
    app_name: str = Field("shoal", description="The Ray Serve application; two on one cluster need two names.")


class LogConfig(_Frozen):
    """What each process writes to its standard error. Without ``error_text`` no prompts, answers or token ids."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is written.")
    format: Literal["console", "json"] = Field("json", description="json: one object a line; console: for people.")
    error_text: bool = Field(
        False,
        description="Whether unexpected errors are told with their own text, which may quote a prompt or an answer; "
        "without it, by their class and where they came from.",
    )


class ShoalConfig(BaseSettings):
    """Everything ``shoal serve`` needs; the defaults work on a laptop."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="SHOAL_", env_nested_delimiter="__")

    model: ModelConfig = ModelConfig()
    prefill: StageConfig = StageConfig()
    decode: StageConfig = StageConfig()
    handoff: HandoffConfig = HandoffConfig()
    gateway: GatewayConfig = GatewayConfig()
    metrics: MetricsConfig = MetricsConfig()
    ray: RayConfig = RayConfig()
    log: LogConfig = LogConfig()
    tls: PeerTlsConfig | Literal["off"] | None = Field(
        None,
        description="Without it, handoff.host must be loopback; off lets it be any address, in plain text.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_config alone reads the environment: a replica takes what it's given, whatever its own host has set.
        return (init_settings,)

    def packs_up_to(self, pool: StageConfig) -> int:
        """Calls that a replica of ``pool`` gets before another one gets any; 0: they are spread."""
        is_on_cpu = self.ray.address is None and pool.device in ("auto", "cpu") and not pool.num_gpus
        has_all_cores = pool.num_threads is None or pool.num_threads >= usable_threads()
        return pool.packs_up_to(share_cores=is_on_cpu and has_all_cores)

    @model_validator(mode="after")
    def _pools_agree(self) -> ShoalConfig:
        """The two pools must describe one plan, or every hand-off would be refused at Hello."""
        for key in ("skip_layers", "kv_dtype"):
            ours = {stage: self._of_stage(stage, key) for stage in ("prefill", "decode")}
            if ours["prefill"] != ours["decode"]:
                raise ValueError(
                    f"prefill.{key} ({ours['prefill']}) and decode.{key} ({ours['decode']}) differ: "
                    f"set model.{key} and leave the pools' own unset"
                )
        return self

    @field_validator("tls", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of the word

    @model_validator(mode="after")
    def _plain_text_stays_here(self) -> ShoalConfig:
        if self.handoff.host != AUTO and (refusal := self.refusal_to_bind(self.handoff.host)) is not None:
            raise ValueError(refusal)
        return self

    @property
    def has_peer_tls(self) -> bool:
        """Whether Shoal's processes know one another by certificates."""
        return isinstance(self.tls, PeerTlsConfig)

    def refusal_to_bind(self, host: str) -> str | None:
        """Why decode's server mustn't listen on ``host``: others reach it, and nothing says how they are known."""
        if self.tls is not None or is_loopback(host):
            return None
        return (
            f"handoff.host is {host or 'every interface'}, which other machines may reach: make certificates with "
            "shoal certs and set tls.folder, or say tls: off if this network is yours alone"
        )

    @model_validator(mode="after")
    def _int8_is_decode_s(self) -> ShoalConfig:
        if self.prefill.weights != "auto":
            raise ValueError("prefill.weights: many rows at a time are no faster in int8; set decode.weights")
        return self

    def _of_stage(self, stage: Literal["prefill", "decode"], key: str) -> Any:
        own = getattr(getattr(self, stage), key)
        return getattr(self.model, key) if own is None else own

    @property
    def skip_layers(self) -> int | None:
        """What both pools agreed on; ``None`` is a third of the model's layers."""
        value: int | None = self._of_stage("decode", "skip_layers")
        return value

    @property
    def kv_dtype(self) -> Dtype:
        value: Dtype = self._of_stage("decode", "kv_dtype")
        return self.model.dtype if value == "auto" else value


def load_config(path: Path | None = None, **overrides: Any) -> ShoalConfig:
    """Read a YAML file (or none), lay the environment over it, and ``overrides`` over both.

    ``overrides`` are nested dicts; ``None`` values are ignored. Raises ConfigError that names each wrong key.
    """
    tree = _read(path) if path is not None else {}
    try:
        return ShoalConfig(**_merge(_merge(tree, _environment()), overrides))
    except ValidationError as error:
        lines = (f"  {'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors())
        raise ConfigError("the configuration is refused:\n" + "\n".join(lines)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no such date
        hint = "" if path.suffix in {".yaml", ".yml"} else "; if it's a model, say --model"
        raise ConfigError(f"can't read the configuration {path}: {error}{hint}") from error
    if tree is None:
        return {}
    if not (isinstance(tree, dict) and all(isinstance(key, str) for key in tree)):
        raise ConfigError(f"{path} must map names to values, such as 'decode: {{replicas: 2}}'")
    return tree


def _environment() -> dict[str, Any]:
    """What ``SHOAL_SECTION__KEY`` variables say. Others are left alone: Kubernetes sets ``SHOAL_PORT`` and the like."""
    for name in os.environ:
        section, separator, _ = name.removeprefix("SHOAL_").partition("__")
        if name.startswith("SHOAL_") and separator and section.lower() not in ShoalConfig.model_fields:
            known = ", ".join(field.upper() for field in ShoalConfig.model_fields)
            raise ConfigError(f"the environment variable {name} names no section: there are {known}")
    try:
        return EnvSettingsSource(ShoalConfig)()
    except SettingsError as error:
        raise ConfigError(f"can't read the configuration from the environment: {error}") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict):
            below = merged.get(key)
            merged[key] = _merge(below if isinstance(below, dict) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged
