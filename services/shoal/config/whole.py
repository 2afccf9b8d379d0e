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
    def _prefill_has_none_of_decode_s(self) -> ShoalConfig:
        if self.prefill.stream_interval != 1:
            raise ValueError("prefill.stream_interval: prefill streams no answers; set decode.stream_interval")
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
