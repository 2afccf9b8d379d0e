"""docs/configuration.md is what the classes say, and what it says is true."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from shoal.config import ShoalConfig, load_config
from shoal.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "configuration.md"

_spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
assert _spec is not None and _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = generate  # where dataclasses look for it
_spec.loader.exec_module(generate)

KEYS = list(generate.keys())
LEAVES = [key for key in KEYS if key.section is None]
# Where 2 is too small.
SAMPLES = {"handoff.min_tokens": 3, "handoff.credit_bytes": 2 << 20, "handoff.staging_bytes": 2 << 20} | dict.fromkeys(
    ("handoff.max_frame_bytes", "handoff.slot_bytes", "gateway.max_body_bytes"), 2048
)

# What has no other value than its default: when answers' tokens leave is decode's.
FIXED = {"prefill.stream_interval"}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield ".".join((*path, name)), value


def value_at(config: BaseModel, path: tuple[str, ...]) -> Any:
    value: Any = config.model_dump(mode="json")
    for name in path:
        value = value[name]
    return value


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == generate.reference(), "run make generate"


def test_a_page_that_is_stale_or_missing_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TARGET", tmp_path / "configuration.md")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    generate.TARGET.write_text(generate.TARGET.read_text().replace("8000", "8001"))
    assert generate.main(["--check"]) == 1


def test_every_key_is_listed_with_its_variable() -> None:
    listed = set(re.findall(r"^\| `([a-z_.]+)`<br>`(SHOAL_[A-Z_]+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {name for name, _ in leaves(ShoalConfig().model_dump(mode="json"))}
    assert wanted <= {name for name, _ in listed}
    assert listed == {(key.name, key.variable) for key in KEYS if len(key.path) > 1 or key.description}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_is_described(key: Any) -> None:
    told = key.description or key.section.__doc__
    assert told and told.rstrip().endswith("."), "give the Field a description that is a sentence"


def sample(key: Any) -> Any:
    """A value that isn't the default, and the same for keys that must agree."""
    told = generate._value(key)
    if key.name in FIXED:
        return key.default
    if told.startswith("`"):
        choices = [yaml.safe_load(choice) for choice in re.findall("`(.*?)`", told)]
        return next(choice for choice in choices if choice not in ("auto", key.default))
    kinds = {"whole number": 2, "number": 0.5, "text": "another", "path": "another.pem"}
    return SAMPLES.get(key.name, kinds[told.split(",")[0]])


def test_the_variables_set_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {key.name: sample(key) for key in LEAVES}
    for key in LEAVES:
        value = wanted[key.name]
        monkeypatch.setenv(key.variable, value if isinstance(value, str) else json.dumps(value))
    config = load_config()
    assert {key.name: value_at(config, key.path) for key in LEAVES} == wanted
    assert {key.name for key in LEAVES if wanted[key.name] == key.default} == FIXED


def test_a_variable_may_hold_a_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    [example] = re.findall(r"`(SHOAL_[A-Z_]+)='(\{.*?\})'`", PAGE.read_text(encoding="utf-8"))
    monkeypatch.setenv(*example)
    assert load_config().handoff.port_range.model_dump() == json.loads(example[1])


@pytest.mark.parametrize("key", [key for key in LEAVES if key.limits], ids=lambda key: key.name)
def test_the_range_that_is_told_is_the_one_that_is_checked(key: Any) -> None:
    told = generate._value(key)
    numbers = [float(number) for number in re.findall(r"\d+", told)]
    assert numbers, told
    beyond = [numbers[0] if "above" in told else numbers[0] - 1, *(number + 1 for number in numbers[1:])]
    for value in beyond:
        with pytest.raises(ConfigError, match=rf"{key.path[0]}\.{key.path[1]}.*: Input should be"):
            load_config(**nested(key.path, int(value)))


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    return {path[0]: nested(path[1:], value) if len(path) > 1 else value}


def test_the_example_holds_every_default_and_loads(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "shoal.yaml"
    file.write_text(example, encoding="utf-8")
    assert load_config(file) == ShoalConfig()
    assert yaml.safe_load(example) == ShoalConfig().model_dump(mode="json")


def test_null_is_refused_where_no_value_can_be_found(tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    for key in (key for key in LEAVES if key.is_shown):
        file.write_text(yaml.safe_dump(nested(key.path, None)))
        if "or `null`" in generate._value(key):
            assert load_config(file) == ShoalConfig()
        else:
            with pytest.raises(ConfigError, match=key.path[0]):
                load_config(file)
