"""All sections together, and what must agree between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from shoal.config.pools import HandoffConfig, StageConfig
from shoal.config.sections import (
    AUTO,
    Dtype,
    GatewayConfig,
    LogConfig,
    MetricsConfig,
    ModelConfig,
    PeerTlsConfig,
    RayConfig,
)
from shoal.process.machine import is_loopback, usable_threads


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
    def _prefill_has_none_of_decode_s(self) -> ShoalConfig:
        if self.prefill.stream_interval != 1:
            raise ValueError("prefill.stream_interval: prefill streams no answers; set decode.stream_interval")
        return self

    @property
    def kv_dtype(self) -> Dtype:
        return self.model.dtype if self.model.kv_dtype == "auto" else self.model.kv_dtype
