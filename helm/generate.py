"""Write the parts of the Helm chart that other files decide, or compare with ``--check``.

    python helm/generate.py            write them
    python helm/generate.py --check    compare; 1 on a difference

A chart can't read files outside its folder. So its schema of ``config`` is made from services/shoal/config/, its
alerts and dashboard are copies of those in deploy, and the README's table is made from the comments in values.yaml.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from shoal.config import ShoalConfig

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "shoal"
BEGIN, END = "<!-- values -->\n", "<!-- /values -->\n"


def schema() -> str:
    """values.schema.json with the definitions of ShoalConfig and its sections renewed."""
    tree = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    config = _without_titles(ShoalConfig.model_json_schema())
    own = {name: value for name, value in tree["$defs"].items() if name[0].islower()}
    tree["$defs"] = own | config.pop("$defs") | {"ShoalConfig": config}
    return json.dumps(tree, indent=2) + "\n"


def _without_titles(node: Any) -> Any:
    """Pydantic gives every key a title, which is its name again."""
    if isinstance(node, dict):
        return {
            key: _without_titles(value)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(item) for item in node] if isinstance(node, list) else node


def deployed(name: str) -> str:
    return (ROOT / "deploy" / name).read_text(encoding="utf-8")


def readme() -> str:
    """README.md with its table of values renewed."""
    text = (CHART / "README.md").read_text(encoding="utf-8")
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    comments = dict(_comments(values))
    rows = [
        f"| {_named(path)} | `{json.dumps(value)}` | {comments.get(path, '')} |"
        for path, value in leaves(values)
        if not path.startswith("decode.")
    ]
    table = "\n".join(["| Value | Default | |", "| --- | --- | --- |", *rows, ""])
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def _named(path: str) -> str:
    """The two pools have the same values, so one row tells of both."""
    twin = path.replace("prefill.", "decode.", 1)
    return f"`{path}`" if twin == path else f"`{path}`, `{twin}`"


def leaves(values: str) -> list[tuple[str, Any]]:
    """Paths and defaults, in order. ``resources`` and its like are one value each: users replace them as a whole."""
    described = dict(_comments(values))

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if isinstance(value, dict) and value and path not in described and key != "resources":
                yield from walk(value, f"{path}.")
            else:
                yield path, value

    return list(walk(yaml.safe_load(values), ""))


def _comments(values: str) -> Iterator[tuple[str, str]]:
    """The ``# --`` line above a key, by the key's path."""
    path: list[str] = []
    comment = None
    for line in values.splitlines():
        if (said := re.match(r" *# -- (.*)", line)) is not None:
            comment = said[1]
        elif (key := re.match(r"( *)([A-Za-z_]+):", line)) is not None:
            path = [*path[: len(key[1]) // 2], key[2]]
            if comment is not None:
                yield ".".join(path), comment
            comment = None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the parts of the Helm chart that other files decide.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    is_check = parser.parse_args().check
    wanted = {
        "values.schema.json": schema(),
        "files/alerts.yml": deployed("prometheus/alerts.yml"),
        "files/dashboard.json": deployed("grafana/shoal.json"),
        "README.md": readme(),
    }
    stale = [name for name, text in wanted.items() if (CHART / name).read_text(encoding="utf-8") != text]
    if is_check and stale:
        sys.exit(f"helm/shoal: {', '.join(stale)} isn't what other files say: run `make generate`")
    for name in stale:
        (CHART / name).write_text(wanted[name], encoding="utf-8")


if __name__ == "__main__":
    main()
