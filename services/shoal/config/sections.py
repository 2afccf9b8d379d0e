"""What is configured beside the pools: each key with its purpose, its default, and what it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

AUTO = "auto"
"""As a host: the address that the Ray cluster knows this node by."""

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Port = Annotated[int, Field(ge=0, le=65535)]


class Frozen(BaseModel):
    # Nobody can wait for infinity, and no message holds it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PortRange(Frozen):
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


class RateConfig(Frozen):
    """A token bucket: ``burst`` at once, ``per_s`` on average."""

    per_s: Annotated[float, Field(gt=0)] = Field(10.0, description="On average.")
    burst: Annotated[int, Field(ge=1)] = Field(100, description="At once, after a quiet while.")


class RetryConfig(RateConfig):
    """What follows a death. A replica that dies when it's full leaves 64 requests that ran and 256 that waited: by
    default, all of them go on at once."""

    burst: Annotated[int, Field(ge=1)] = Field(
        320, description="At once, after a quiet while: as many requests as a full decode replica has."
    )


class TlsConfig(Frozen):
    """PEM files of a server: its certificate chain and key; with ``client_ca_file``, clients must have one, too."""

    cert_file: Path = Field(description="The server's certificate, and those between it and the root.")
    key_file: Path = Field(description="The certificate's private key, without a passphrase.")
    client_ca_file: Path | None = Field(
        None, description="Whose certificates clients must show; without it, they need none."
    )


class PeerTlsConfig(Frozen):
    """Mutual TLS between Shoal's own processes. The section itself may be ``off`` (docs/deploy.md)."""

    folder: Path = Field(
        description="Has a folder for each role on a host (gateway, prefill, decode) with ca.crt, tls.crt and tls.key, "
        "as shoal certs makes them. Files that change are what the next connection uses."
    )


class ModelConfig(Frozen):
    """Which model, and how its prompt is encoded."""

    name: str = Field("smollm2", description="A known name, a folder with safetensors, or a .gguf file.")
    served_name: str | None = Field(None, description="The name clients use; by default the model's own.")
    dtype: Dtype = Field("auto", description="Weights and activations; auto is bfloat16 where it's quicker.")
    kv_dtype: Dtype = Field("auto", description="The KV cache's dtype; auto is the same as dtype.")
    skip_layers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many of the last layers a shallow prompt skips; by default a third, of smollm2 6."
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


class GatewayConfig(Frozen):
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
    max_bodies: Annotated[int, Field(ge=1)] = Field(
        64,
        description="Bodies of max_body_bytes that a gateway holds at once, from the first byte to the answer's end; "
        "smaller ones count by their bytes. More get 429 unread. By gRPC, so many messages are read at once.",
    )
    max_key_bodies: Annotated[int, Field(ge=1)] = Field(16, description="The same for the keys of one tenant.")
    max_choices: Annotated[int, Field(ge=1, le=1024)] = Field(16, description="Largest n.")
    max_logprobs: Annotated[int, Field(ge=0)] = Field(20, description="Most alternatives that are told for a token.")
    max_stop_strings: Annotated[int, Field(ge=0)] = Field(4, description="Most strings in stop.")
    max_stop_chars: Annotated[int, Field(ge=1)] = Field(256, description="Characters in one of them.")
    max_prompts: Annotated[int, Field(ge=1)] = Field(64, description="Prompts in one completions request.")
    max_messages: Annotated[int, Field(ge=1)] = Field(
        2048,
        description="Messages in one conversation. A body with more than ten lists, objects and strings for each of so "
        "many gets 413 before it is parsed.",
    )
    max_values: Annotated[int, Field(ge=1)] = Field(
        262_144, description="Commas in one JSON body, as between token ids; more get 413 before it is parsed."
    )
    max_running: Annotated[int, Field(ge=1)] = Field(
        2048,
        description="Requests that a gateway works on at once, waiting ones included, each of several prompts "
        "counting; more get 429.",
    )
    deadline_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="How long a request may take in all; a client may ask for less."
    )


class MetricsConfig(Frozen):
    """Every process serves its own metrics; the gateway's /metrics/targets lists them for Prometheus."""

    host: str = Field("127.0.0.1", description="Address that each process binds; auto is that of its Ray node.")
    port_range: PortRange = Field(PortRange(first=22000, last=22999), description="Where processes listen, one each.")


class RayConfig(Frozen):
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


class LogConfig(Frozen):
    """What each process writes to its standard error. Without ``error_text`` no prompts, answers or token ids."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is written.")
    format: Literal["console", "json"] = Field("json", description="json: one object a line; console: for people.")
    error_text: bool = Field(
        False,
        description="Whether unexpected errors are told with their own text, which may quote a prompt or an answer; "
        "without it, by their class and where they came from.",
    )
