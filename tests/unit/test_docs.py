"""What the documents point to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from shoal.telemetry import DecodeMetrics, GatewayMetrics, PrefillMetrics, TransferMetrics, Transport

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_all_documents_are_looked_at() -> None:
    names = {document.name for document in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "architecture.md", "shallow-prefill.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"`make ([a-z]+)", document.read_text(encoding="utf-8")))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= known


def test_metrics_that_are_named_exist() -> None:
    registries = [CollectorRegistry() for _ in range(4)]
    GatewayMetrics(registries[0], [])
    PrefillMetrics(registries[1])
    DecodeMetrics(registries[2])
    TransferMetrics(registries[3], Transport.GRPC)
    known = {
        name
        for registry in registries
        for family in registry.collect()
        for name in (family.name, f"{family.name}_total")
    }
    named = {name for document in DOCUMENTS for name in re.findall(r"\bshoal_[a-z_]+", document.read_text())}
    assert named
    assert named <= known
