from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shoal.config import ShoalConfig, load_config
from shoal.errors import ConfigError


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)


def written(folder: Path, text: str) -> Path:
    path = folder / "shoal.yaml"
    path.write_text(text)
    return path


def test_the_defaults_are_complete_and_stay_on_loopback() -> None:
    config = load_config()
    assert {config.gateway.host, config.handoff.host, config.metrics.host} == {"127.0.0.1"}
    assert config.model.skip_layers is None
    assert config.gateway.port == 8000


def test_a_file_is_laid_over_the_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "decode: {replicas: 2}\nhandoff: {port_range: {first: 30, last: 31}}"))
    assert (config.decode.replicas, config.prefill.replicas) == (2, 1)
    assert (config.handoff.port_range.first, config.handoff.port_range.last) == (30, 31)


def test_the_environment_wins_over_the_file_and_the_caller_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "decode: {replicas: 2, max_queued: 7}")
    monkeypatch.setenv("SHOAL_DECODE__REPLICAS", "3")
    assert load_config(path).decode.replicas == 3
    assert load_config(path, decode={"replicas": 4}).decode.replicas == 4
    assert load_config(path, decode={"replicas": None}).decode.replicas == 3
    assert load_config(path, decode={"replicas": 4}).decode.max_queued == 7


def test_a_configuration_that_is_handed_over_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over = json.loads(load_config(decode={"replicas": 4}).model_dump_json(exclude_unset=True))
    monkeypatch.setenv("SHOAL_GATEWAY__PORT", "1234")
    assert ShoalConfig(**handed_over).gateway.port == 8000


def test_variables_that_others_set_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("SHOAL_SERVICE_HOST", "10.0.0.1")
    assert load_config().gateway.port == 8000


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("SHOAL_DECOD__REPLICAS", "2", "SHOAL_DECOD__REPLICAS"),
        ("SHOAL_DECODE__REPLICA", "2", r"decode\.replica"),
        ("SHOAL_DECODE__REPLICAS", "two", r"decode\.replicas"),
        ("SHOAL_DECODE", "{not json", "decode"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(
    name: str, value: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        load_config()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("handof: {ttl_s: 1}", "handof: Extra"),
        ("decode: {replica: 1}", r"decode\.replica: Extra"),
        ("handoff: {port_range: {start: 1}}", r"handoff\.port_range\.start: Extra"),
        ("decode: {replicas: 0}", r"decode\.replicas"),
        ("decode: 5", "decode"),
        ("decode: {1: 2}", r"decode\.1"),
        ("prefill: {stream_interval: 2}", r"set decode\.stream_interval"),
        ("model: {depth: deep}", r"model\.depth"),
        ("gateway: {port: 70000}", r"gateway\.port"),
        ("handoff: {port_range: {first: 5, last: 4}}", r"last \(4\) is below first \(5\)"),
        ("decode: {max_sequences: 6, pack_up_to: 7}", r"pack_up_to \(7\) is above max_sequences \(6\)"),
    ],
)
def test_a_wrong_key_is_refused_by_name(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(written(tmp_path, text))


@pytest.mark.parametrize("text", ["- a list", "just text", "1: 2", "a: [unclosed", "a: !!python/object:os.system {}"])
def test_a_file_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shoal\.yaml"):
        load_config(written(tmp_path, text))


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'replicas' is there twice.*line 3"):
        load_config(written(tmp_path, "decode:\n  replicas: 1\n  replicas: 2"))


def test_what_a_file_says_once_and_lays_over_it_is_taken(tmp_path: Path) -> None:
    """YAML's merge keys: what is said beside them wins, and is no repetition."""
    file = "prefill: &pool {replicas: 2, block_tokens: 8}\ndecode: {<<: *pool, replicas: 3}"
    config = load_config(written(tmp_path, file))
    assert (config.decode.replicas, config.decode.block_tokens) == (3, 8)


def test_the_kv_dtype_follows_the_model_unless_set() -> None:
    assert load_config(model={"dtype": "float32"}).kv_dtype == "float32"
    assert load_config(model={"dtype": "float32", "kv_dtype": "bfloat16"}).kv_dtype == "bfloat16"


@pytest.mark.parametrize(("said", "meant"), [("bos", "bos"), ("system", "system"), ("12", 12), (3, 3)])
def test_anchors_are_a_name_or_a_number(said: str | int, meant: str | int) -> None:
    assert load_config(model={"plan": "speed", "anchors": said}).model.anchors == meant


@pytest.mark.parametrize(
    "key", [{"anchors": 0}, {"anchors": "user"}, {"anchors": True}, {"plan": "fast"}, {"boundary_tokens": 0}]
)
def test_a_plan_that_is_none_is_refused_by_its_key(key: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.{next(iter(key))}"):
        load_config(model=key)


# --- tls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "node.example.com"])
def test_others_may_reach_the_hand_off_only_by_tls_or_where_plain_text_is_asked_for(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"handoff\.host is .*shoal certs and set tls\.folder, or say tls: off"):
        load_config(written(tmp_path, f"handoff: {{host: '{host}'}}"))
    for said in ("tls: off", "tls: {folder: certs}"):
        assert load_config(written(tmp_path, f"handoff: {{host: '{host}'}}\n{said}")).handoff.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "auto"])
def test_loopback_needs_no_certificates_and_of_auto_the_node_decides(tmp_path: Path, host: str) -> None:
    assert load_config(written(tmp_path, f"handoff: {{host: '{host}'}}")).tls is None


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_off_is_one_word_however_yaml_reads_it(tmp_path: Path, word: str) -> None:
    assert load_config(written(tmp_path, f"tls: {word}")).tls == "off"


@pytest.mark.parametrize("value", ["on", "true", "certs", "{}", "{folder: a, key: b}"])
def test_anything_else_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"tls\."):
        load_config(written(tmp_path, f"tls: {value}"))


def test_tls_comes_from_the_environment_too_and_survives_the_way_to_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TLS__FOLDER", str(tmp_path))
    config = load_config()
    assert config.tls is not None and config.tls != "off" and config.tls.folder == tmp_path
    assert ShoalConfig(**config.model_dump(mode="json")) == config
    monkeypatch.delenv("SHOAL_TLS__FOLDER")
    monkeypatch.setenv("SHOAL_TLS", "off")
    assert load_config().tls == "off"


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "key", ["gateway.deadline_s", "gateway.retry.per_s", "handoff.ttl_s", "decode.num_cpus", "ray.stop_timeout_s"]
)
def test_a_number_that_is_none_is_refused_by_its_key(tmp_path: Path, key: str, value: str) -> None:
    *sections, name = key.split(".")
    tree = f"{{{name}: {value}}}"
    for section in reversed(sections):
        tree = f"{{{section}: {tree}}}"
    with pytest.raises(ConfigError, match=f"{key}: Input should be a finite number"):
        load_config(written(tmp_path, tree))
