"""What an operator writes, by hand or wrongly: any file is a configuration, or is refused in words."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from examples import examples
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from shoal.api.keys import KeysFile, digest_of, new_key, read_keys
from shoal.config import ShoalConfig, load_config
from shoal.errors import ConfigError

any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.printable, max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
KEY, KEY_ID = new_key()
KEYS = {"tenants": {"alice": {"keys": {KEY_ID: digest_of(KEY)}, "roles": ["generate"], "max_running": 3}}}
ODD_TEXTS = [
    "[" * 5000,
    "a: " * 300,
    "a: &a [*a]",
    "a: 2001-99-99",
    "a: " + "9" * 5000,
    "? [1, 2]\n: 3",
    "a: &a [1, 1, 1]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\ngateway: [*c, *c]",
    "\x00",
    "\ufeff",
    "a: *b",
    "%YAML 9.9\n---\n",
    "- - - -",
    "gateway: {<<: 3}",
    "decode: {replicas: .inf}",
]


def places(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return tree | {path[0]: replaced(tree.get(path[0], {}), path[1:], value)}


def accepts_config(folder: Path, data: bytes) -> bool:
    path = folder / "shoal.yaml"
    path.write_bytes(data)
    told = refusal(lambda: load_config(path))
    assert told is None or 10 < len(told) < 20_000
    return told is None


def accepts_keys(folder: Path, data: bytes) -> bool:
    path = folder / "keys.yaml"
    path.write_bytes(data)
    told = refusal(lambda: read_keys(path))
    assert told is None or (str(path) in told and KEY not in told and digest_of(KEY) not in told)
    return told is None


def refusal(read: Callable[[], object]) -> str | None:
    try:
        read()
    except ConfigError as error:
        return error.message
    return None


CONFIG = ShoalConfig().model_dump(mode="json")


def test_both_are_accepted_as_they_are(tmp_path: Path) -> None:
    assert accepts_config(tmp_path, yaml.safe_dump(CONFIG).encode())
    assert accepts_keys(tmp_path, yaml.safe_dump(KEYS).encode())
    KeysFile.model_validate(KEYS)


@examples(150, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(places(CONFIG))), value=any_value, unknown=st.booleans())
def test_any_value_at_any_key_is_taken_or_refused(
    tmp_path: Path, path: tuple[str, ...], value: Any, unknown: bool
) -> None:
    tree = replaced(CONFIG, (*path[:-1], "no_such_key") if unknown else path, value)
    accepted = accepts_config(tmp_path, yaml.safe_dump(tree).encode())
    assert not (accepted and unknown)


@examples(100, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(places(KEYS))), value=any_value)
def test_any_value_in_a_keys_file_is_taken_or_refused(tmp_path: Path, path: tuple[str, ...], value: Any) -> None:
    accepts_keys(tmp_path, yaml.safe_dump(replaced(KEYS, path, value)).encode())


@pytest.mark.parametrize("text", ODD_TEXTS, ids=lambda text: repr(text[:12]))
def test_odd_texts_are_taken_or_refused(tmp_path: Path, text: str) -> None:
    for accepts in (accepts_config, accepts_keys):
        accepts(tmp_path, text.encode())


@pytest.mark.parametrize("accepts", [accepts_config, accepts_keys])
def test_a_text_that_asks_for_code_to_be_run_is_refused_and_runs_none(
    tmp_path: Path, accepts: Callable[[Path, bytes], bool]
) -> None:
    made = tmp_path / "made"
    assert not accepts(tmp_path, f"!!python/object/apply:os.mkdir ['{made}']".encode())
    assert not made.exists()
