"""What the documents point to exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from shoal.cli import app
from shoal.config import ShoalConfig
from shoal.telemetry import (
    CertificateMetrics,
    DecodeMetrics,
    GatewayMetrics,
    HealthMetrics,
    PrefillMetrics,
    TransferMetrics,
    Transport,
)

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "deploy", "helm")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))


def code(document: Path) -> str:
    """What a document sets in code, a line a piece: the insides of backticks, and its shell blocks."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *spans]).replace("\\\n", " ") + "\n"


def test_all_documents_are_looked_at() -> None:
    names = {document.name for document in DOCUMENTS}
    pages = {"api.md", "deploy.md", "operate.md", "architecture.md"}
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md"} | pages <= names


def test_the_readme_compares_servers_by_the_figures_of_the_page_on_performance() -> None:
    readme, page = (rows_of_servers(ROOT / name) for name in ("README.md", "docs/performance.md"))
    assert len(readme) >= 5 and readme <= page


def rows_of_servers(document: Path) -> set[tuple[str, ...]]:
    """The rows of tables that compare servers, without links and marks of footnotes."""
    text = re.sub(r"\[([^]]+)\]\([^)]*\)| [\u00b9\u00b2\u00b3]", r"\1", document.read_text(encoding="utf-8"))
    tables = re.findall(r"^\| \| first token, 1,800 tokens \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    return {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@each_document
def test_anchors_lead_somewhere(document: Path) -> None:
    missing = [
        f"{target}#{anchor}"
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8"))
        if anchor not in anchors(document.parent / target if target else document)
    ]
    assert missing == []


def anchors(document: Path) -> set[str]:
    """A heading's anchor is its words in small letters, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^make ([a-z]+)", code(document), re.MULTILINE))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= known


@each_document
def test_paths_exist(document: Path) -> None:
    paths = re.findall(r"(?<![\w./-])((?:docs|deploy|helm|proto|services|tests)/[\w./-]*)", code(document))
    assert [path for path in paths if not (ROOT / path).exists()] == []


@each_document
def test_commands_and_options_exist(document: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    for name, subcommand, options in shoal_commands(document):
        assert name in commands
        command = commands[name]
        if hasattr(command, "commands"):
            assert subcommand in command.commands, name
            command = command.commands[subcommand]
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
        assert set(options) <= known, name


def shoal_commands(document: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each ``shoal …`` that is told to be typed: its command, the word behind it, and its options; ``make serve
    ARGS='…'``, too."""
    for line in re.findall(r"^(?:\S*/)?(?:shoal|make) [a-z].*$", code(document), re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            words = [words[1], *(option for word in words[2:] for option in word.removeprefix("ARGS=").split())]
        else:
            words = words[1:]
        options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        if options or words[0] in ("serve", "generate", "doctor", "demo", "keys", "certs"):
            yield words[0], words[1] if len(words) > 1 else "", options


@each_document
def test_configuration_keys_and_variables_exist(document: Path) -> None:
    if "helm" in document.relative_to(ROOT).parts:
        return  # a chart's values have names like these, too
    known = set(keys(ShoalConfig))
    named = re.findall(rf"(?<![\w./-])((?:{'|'.join(ShoalConfig.model_fields)})\.[a-z_.]+[a-z_])\b", code(document))
    variables = re.findall(r"\bSHOAL_([A-Z_]+__[A-Z_]+)", document.read_text(encoding="utf-8"))
    named += [variable.lower().replace("__", ".") for variable in variables]
    # A role's DNS name looks like a key.
    assert [key for key in named if key not in known and not key.endswith(".shoal.internal")] == []


def keys(kind: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield path + name
        below: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in below:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys(part, f"{path}{name}.")


def test_metrics_that_are_named_exist() -> None:
    registries = [CollectorRegistry() for _ in range(6)]
    GatewayMetrics(registries[0], [])
    PrefillMetrics(registries[1])
    DecodeMetrics(registries[2])
    TransferMetrics(registries[3], Transport.GRPC)
    CertificateMetrics(registries[4])
    HealthMetrics(registries[5])
    known = {
        name
        for registry in registries
        for family in registry.collect()
        for name in (family.name, f"{family.name}_total")
    }
    named = {name for document in DOCUMENTS for name in re.findall(r"\bshoal_(?!lab\b)[a-z_]+", document.read_text())}
    assert named
    assert named <= known


@pytest.mark.parametrize("setting", ["gateway.port", "gateway.grpc_port", "handoff.port_range", "metrics.port_range"])
def test_the_table_of_ports_says_where_we_listen_by_default(setting: str) -> None:
    section, _, name = setting.partition(".")
    config = getattr(ShoalConfig(), section)
    ports = getattr(config, name)
    told = f"`{config.host}:{ports}`" if name != "port_range" else f"{ports.first}\N{EN DASH}{ports.last}"
    rows = [line.split("|") for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()]
    [where] = [row[2] for row in rows if len(row) > 4 and f"`{setting}`" in row[3]]
    assert told in where and f"`{config.host}" in where
