"""What the HTTP API's own document has against a value."""

from __future__ import annotations

from typing import Any

import jsonschema


def errors_of(document: dict[str, Any], schema: str | dict[str, Any], value: Any) -> list[str]:
    """What ``schema``, or the one of that name, has against ``value``."""
    wanted = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
    validator = jsonschema.Draft202012Validator({**wanted, "components": document["components"]})
    return [error.message for error in validator.iter_errors(value)]
