"""YAML as people write it for Shoal: nothing but plain values, and no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The safe one takes the last of two equal keys without a word: a key taken back in the first would stay."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[Hashable]()
        for name, _ in node.value:
            if name.tag == _MERGE:
                continue  # <<: what is said beside it wins
            key = self.construct_object(name, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", name.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Raises OSError, YAMLError, RecursionError for what is nested too deeply, or ValueError for what is no text, or no
    value that there can be."""
    loader = _Loader(path.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
