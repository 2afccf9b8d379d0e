"""Write docs/configuration.md from the classes in services/shoal/config/, or compare with ``--check``.

    python docs/generate.py            write it
    python docs/generate.py --check    compare; 1 on a difference

What a key does is said once, in its ``Field``; a section's opening sentence is its class' docstring.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoal.config import ShoalConfig

FOLDER = Path(__file__).resolve().parent
TEMPLATE = FOLDER / "configuration.template.md"
TARGET = FOLDER / "configuration.md"
NONE = type(None)
WORDS = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the reference. ``path`` is the key as in YAML, section first; ``default`` is plain JSON."""

    path: tuple[str, ...]
    annotation: Any
    limits: tuple[Any, ...]
    is_required: bool
    default: Any
    description: str
    is_shown: bool
    """Whether it is there by default: not if the group that it belongs to is left out."""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def variable(self) -> str:
        return "SHOAL_" + "__".join(self.path).upper()

    @property
    def section(self) -> type[BaseModel] | None:
        """The class of the keys below this one, if there are any."""
        kinds = [kind for kind in _members(self.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        return kinds[0] if kinds else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Generate docs/configuration.md from shoal.config.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    fresh = reference()
    if not parser.parse_args(arguments).check:
        TARGET.write_text(fresh, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != fresh:
        print("error: docs/configuration.md does not match services/shoal/config/: run make generate", file=sys.stderr)
        return 1
    return 0


def reference() -> str:
    """The whole page."""
    text = TEMPLATE.read_text(encoding="utf-8")
    return text.replace("{{tables}}\n", "\n".join(_tables())).replace("{{example}}\n", example())


# --- keys -----------------------------------------------------------------------------------------------


def keys(kind: type[BaseModel] = ShoalConfig, path: tuple[str, ...] = (), values: Any = None) -> Iterator[Key]:
    """Every key below ``path``, in the order of the classes; ``values`` are the defaults at this place."""
    if path == ():
        values = ShoalConfig().model_dump(mode="json")
    for name, field in kind.model_fields.items():
        known = isinstance(values, dict)
        key = Key(
            (*path, name),
            field.annotation,
            tuple(_limits(field)),
            is_required=not known and field.is_required(),
            default=values[name] if known else None,
            description=field.description or "",
            is_shown=known,
        )
        yield key
        if key.section is not None:
            yield from keys(key.section, key.path, key.default)


def _limits(field: FieldInfo) -> Iterator[Any]:
    """Of the field itself, and of what stands in ``Annotated[int, Field(ge=0)] | None``."""
    yield from field.metadata
    for member in get_args(field.annotation):
        for extra in get_args(member)[1:] if get_origin(member) is Annotated else ():
            yield from extra.metadata if isinstance(extra, FieldInfo) else (extra,)


def _members(annotation: Any) -> list[Any]:
    """``Annotated[int, …] | None`` as ``[int, NoneType]``."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]


# --- tables ---------------------------------------------------------------------------------------------


def _tables() -> Iterator[str]:
    for key in keys():
        if len(key.path) == 1:
            if key.section is None:
                raise TypeError(f"{key.name} is no section: give it one, or teach docs/generate.py to list it")
            yield f"### {key.name}\n\n{_plain(key.section.__doc__)}\n"
            yield "| key and variable | value | default | what it does |\n|---|---|---|---|"
            # One that may be something else than its keys has a line of its own.
            own = [key] if key.description else []
            below = keys(key.section, key.path, key.default)
            yield "\n".join(map(_row, [*own, *below])) + "\n"


def _row(key: Key) -> str:
    return f"| `{key.name}`<br>`{key.variable}` | {_value(key)} | {_default(key)} | {_plain(key.description)} |"


def _default(key: Key) -> str:
    if key.is_required:
        return "required"
    return "" if isinstance(key.default, dict) else f"`{_yaml(key.default)}`"


def _value(key: Key) -> str:
    words = [_kind(member) for member in _members(key.annotation) if member is not NONE]
    text = ", ".join([*words, *_range(key)])
    return f"{text}, or `null`" if NONE in _members(key.annotation) else text


def _kind(member: Any) -> str:
    if get_origin(member) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(member))
    if isinstance(member, type) and issubclass(member, BaseModel):
        return "the keys below"
    return WORDS[member]


def _range(key: Key) -> Iterator[str]:
    bounds = {
        name: getattr(limit, name) for limit in key.limits for name in ("ge", "gt", "le", "lt") if _is(limit, name)
    }
    match bounds:
        case {"ge": low, "le": high}:
            yield f"{low} to {high}"
        case {"gt": low, "le": high}:
            yield f"above {low}, up to {high}"
        case {"ge": low}:
            yield f"{low} or more"
        case {"gt": low}:
            yield f"above {low}"
        case {}:
            if bounds:
                raise TypeError(f"{key.name} has a range that docs/generate.py has no words for: {bounds}")


def _is(limit: Any, name: str) -> bool:
    return isinstance(limit, getattr(annotated_types, name.capitalize()))


def _plain(text: str | None) -> str:
    """A docstring or description as one line of Markdown."""
    return " ".join((text or "").replace("``", "`").replace("|", "\\|").split())


# --- the example ----------------------------------------------------------------------------------------


def example() -> str:
    """All defaults as one commented YAML file."""
    lines: list[str] = []
    for key in keys():
        if key.is_shown:
            margin = "  " * (len(key.path) - 1)
            lines += [""] if lines and not margin else []
            lines += [f"{margin}# {_comment(key)}", f"{margin}{key.path[-1]}:{_setting(key)}"]
    return "\n".join(lines) + "\n"


def _comment(key: Key) -> str:
    told = key.description or (key.section.__doc__ if key.section else "")
    return _plain(told).replace("`", "")


def _setting(key: Key) -> str:
    """What follows the colon: nothing where keys follow below; all of them at once where they're left out."""
    if isinstance(key.default, dict):
        return ""
    if key.section is None:
        return f" {_yaml(key.default)}"
    below = (f"{one.path[-1]}: {'…' if one.is_required else _yaml(one.default)}" for one in keys(key.section, key.path))
    return f" {_yaml(key.default)}  # or {{{', '.join(below)}}}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    sys.exit(main())
