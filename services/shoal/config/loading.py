"""Where a configuration comes from: a file, the environment, the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from shoal.config.whole import ShoalConfig
from shoal.config.yaml_file import read_yaml
from shoal.errors import ConfigError


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
