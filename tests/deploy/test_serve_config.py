"""deploy/serve.yaml: Ray Serve takes it, and so does Shoal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import HTTPOptionsSchema, ServeDeploySchema

from shoal.config import load_config

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    return loaded


def test_ray_serve_accepts_the_file(tree: dict[str, Any]) -> None:
    parsed = ServeDeploySchema.model_validate(tree)
    assert parsed.proxy_location == "HeadOnly"
    # Serve ignores what it doesn't know here.
    assert tree["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    assert tree.keys() <= ServeDeploySchema.model_fields.keys()


def test_the_arguments_are_a_configuration_that_agrees_with_the_rest_of_the_file(tree: dict[str, Any]) -> None:
    [application] = tree["applications"]
    config = load_config(**application["args"])
    assert config.ray.app_name == application["name"]
    assert config.gateway.port == tree["http_options"]["port"]
    assert config.gateway.host == tree["http_options"]["host"]


@pytest.mark.parametrize("name", ["serve.yaml", "shoal.yaml"])
def test_who_reaches_the_machine_is_not_told_the_schema(name: str) -> None:
    loaded = yaml.safe_load((DEPLOY / name).read_text())
    config = load_config(**(loaded["applications"][0]["args"] if "applications" in loaded else loaded))
    assert config.gateway.host == "0.0.0.0" and not config.gateway.reflection


def test_it_describes_the_system_of_the_compose_file(tree: dict[str, Any]) -> None:
    [application] = tree["applications"]
    ours, composed = load_config(**application["args"]), load_config(DEPLOY / "shoal.yaml")
    assert ours.model_copy(update={"ray": composed.ray}) == composed
