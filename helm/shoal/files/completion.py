"""One completion; then a hand-off must have been counted. `helm test` runs it in Shoal's image: see the README."""

from __future__ import annotations

import json
import os
import secrets
import sys
import urllib.request

COUNTED = "shoal_kv_transfer_seconds_count"
TIMEOUT_S = 120
SENTENCE = "Fish swim in schools because it is safe, and they eat what the current brings."
# Long enough to be worth a hand-off, whatever config.handoff.min_tokens is in practice; and another each time: of what
# decode has in its cache, nothing would be sent.
PROMPT = " ".join([secrets.token_hex(8), *[SENTENCE] * 25])


def fetch(url: str, body: object = None, key: str = "") -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, data, headers)  # noqa: S310 - our own URLs
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
        return str(response.read().decode())


def transfers(gateway: str, key: str) -> float:
    """How many hand-offs all processes have counted."""
    total = 0.0
    for group in json.loads(fetch(f"{gateway}/metrics/targets", key=key)):
        for address in group["targets"]:
            lines = fetch(f"http://{address}/metrics").splitlines()
            total += sum(float(line.split()[-1]) for line in lines if line.startswith(COUNTED))
    return total


def main(gateway: str, key: str) -> None:
    model = json.loads(fetch(f"{gateway}/v1/models", key=key))["data"][0]["id"]
    before = transfers(gateway, key)
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 8}
    answer = json.loads(fetch(f"{gateway}/v1/completions", asked, key))
    print(answer["choices"][0]["text"])
    counted = transfers(gateway, key) - before
    if counted < 1:
        sys.exit(f"{COUNTED} didn't move: the prompt never passed from prefill to decode")
    print(f"{counted:.0f} counted")


if __name__ == "__main__":
    main(sys.argv[1], os.environ.get("SHOAL_API_KEY", ""))
