"""Who listens to all that Shoal's processes send one another: what of a prompt could be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import capture
import pytest
import yaml
from capture import Flow, Traffic, forms
from cryptography import x509
from netns import network
from nodes import ENVIRONMENT
from prometheus_client.parser import text_string_to_metric_families

import shoal
from shoal.cluster.certificates import make_certificates
from shoal.model.files import locate
from shoal.telemetry import ShownTo

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SERVICES = Path(shoal.__file__).parents[1]
PROMPT = (
    "Seventeen quokkas juggle tangerines behind the lighthouse of Ouagadougou while a bassoonist from Zanzibar counts "
    "7919 marzipan hippopotami, forgets the number, sighs, and begins once more with the smallest of them:"
)
STOP = "xylophone-of-Samarkand"
GATEWAY_PORT = 8000
HANDOFF_PORTS = range(21000, 22000)

# What the client runs on the host: it asks as soon as both pools are there.
_ASK = """
import json, ssl, sys, time, urllib.error, urllib.request
url, authority, body = json.load(sys.stdin)
trust = ssl.create_default_context(cafile=authority) if authority else None
deadline_s = time.monotonic() + 100
ready = {}
while not (ready.get("num_decode") and ready.get("num_prefill")):
    assert time.monotonic() < deadline_s, ready
    try:
        ready = json.load(urllib.request.urlopen(url + "/readyz", timeout=10, context=trust))
    except urllib.error.URLError:
        time.sleep(0.3)
headers = {"content-type": "application/json", "x-shoal-timing": "1"}
request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=60, context=trust) as answer:
    print(answer.read().decode())
with urllib.request.urlopen(url + "/metrics", timeout=60, context=trust) as answer:
    print(answer.read().decode())
"""


def served(tmp_path: Path, tls: Path | None) -> Traffic:
    """All traffic of a run of ``shoal serve``, from its start to its end, with one prompt that is handed over."""
    config: dict[str, Any] = {
        "gateway": {"port": GATEWAY_PORT, "grpc_port": 0},
        "handoff": {"carrier": "inline", "min_tokens": 2},
        "ray": {"stop_timeout_s": 1},
    }
    clients = tmp_path / "clients"
    if tls is not None:
        make_certificates(tls, days=1, gateway_hosts=["127.0.0.1"])
        make_certificates(clients, days=2, gateway_hosts=["127.0.0.1"])
        own = clients / "gateway"
        config["tls"] = {"folder": str(tls)}
        config["gateway"]["tls"] = {"cert_file": str(own / "tls.crt"), "key_file": str(own / "tls.key")}
    (tmp_path / "shoal.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    environment: Mapping[str, str] = {**ENVIRONMENT, "PYTHONPATH": str(SERVICES)}
    serve = [sys.executable, "-c", "from shoal.cli.command import main; main()", "serve", str(tmp_path / "shoal.yaml")]
    body = {"model": "smollm2", "prompt": PROMPT, "stop": STOP, "max_tokens": 4, "temperature": 0}
    url = f"{'http' if tls is None else 'https'}://127.0.0.1:{GATEWAY_PORT}"
    question = [url, tls and str(clients / "ca.crt"), body]
    with network("host") as hosts:
        process = hosts.start("host", [sys.executable, capture.__file__, str(tmp_path), *serve], environment)
        asked = hosts.run("host", [sys.executable, "-c", _ASK], stdin=json.dumps(question))
        assert asked.returncode == 0, f"{asked.stderr}\n{hosts.logs()}"
        hosts.execute("host", ["kill", "1"])  # the capture, which hands it on
        assert process.ended(60) == 0, hosts.logs()
    told, _, metrics = asked.stdout.partition("\n")
    [prompt] = json.loads(told)["shoal"]["prompts"]
    assert prompt["handoff"]["transferred"], prompt
    if tls is None:
        assert expiries(metrics) == {}
    else:
        told_of = {ShownTo.REPLICAS: tls, ShownTo.CLIENTS: clients}
        assert expiries(metrics) == {shown_to: expires_s(one / "gateway") for shown_to, one in told_of.items()}
    return capture.read(tmp_path)


def expiries(metrics: str) -> dict[str, float]:
    """Of the gateway's certificates, by whom they are shown to."""
    name = "shoal_certificate_expiry_timestamp_seconds"
    families = {family.name: family.samples for family in text_string_to_metric_families(metrics)}
    return {sample.labels["shown_to"]: sample.value for sample in families[name]}


def expires_s(folder: Path) -> float:
    certificate = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    return certificate.not_valid_after_utc.timestamp()


def needles() -> list[bytes]:
    """Of the prompt: its ids, its text, and what else the request says."""
    token_ids = locate("smollm2").tokenizer().encode(PROMPT)
    words = [PROMPT[start : start + 24] for start in range(0, len(PROMPT) - 24, 24)]
    return [*forms(token_ids), *(word.encode() for word in (*words, STOP))]


def ports(flows: Mapping[Flow, bytes]) -> set[str]:
    """Whose the flows are."""
    names = {GATEWAY_PORT: "client"} | dict.fromkeys(HANDOFF_PORTS, "decode")
    return {names.get(flow.target) or names.get(flow.source) or str(flow) for flow in flows}


@pytest.mark.long
def test_in_plain_text_a_prompt_is_seen_where_it_belongs_and_not_on_ray_s_plane(tmp_path: Path):
    traffic = served(tmp_path, None)
    seen = traffic.where(needles())
    assert ports(seen) == {"client", "decode"}
    # From the gateway to decode, and from decode to prefill: what is looked for can be found.
    assert {flow.target in HANDOFF_PORTS for flow in seen if GATEWAY_PORT not in flow} == {True, False}
    assert_ray_was_heard(traffic)


def test_under_tls_nothing_of_a_prompt_is_seen_anywhere(tmp_path: Path):
    """That it would be found, test_capture.py shows, and with SHOAL_TEST_ALL=1 the test above."""
    traffic = served(tmp_path, tmp_path / "certificates")
    assert traffic.where(needles()) == {}
    assert {"client", "decode"} <= ports({flow: data for flow, data in traffic.by_flow.items() if data})
    assert_ray_was_heard(traffic)


def assert_ray_was_heard(traffic: Traffic) -> None:
    """Decode's grant to prefill, as Ray pickles it."""
    assert not {"client", "decode"} & ports(calls := traffic.where([b"Grant"])) and calls
