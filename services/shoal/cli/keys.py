"""Keys for clients: made, listed and taken back in the file that the gateway reads (shoal.api.keys)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.progress import err

keys = typer.Typer(
    help="""Who may ask: make, list and take back API keys.

    A file has the tenants, SHA-256 of each of their keys, and what they may do; a gateway that was started with
    [bold]--keys-file[/bold] wants one of these keys for all but its probes, and reads the file again when it changes.
    """,
    no_args_is_help=True,
)

File = Annotated[Path, typer.Option(help="Where they are kept. The first key makes the file.", metavar="FILE")]


@keys.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whose it is: letters, digits, and . _ -")],
    file: File = Path("keys.yaml"),
    role: Annotated[
        list[str] | None,
        typer.Option(help="What the tenant's keys open: generate, metrics, or both, one --role each.", metavar="ROLE"),
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests of the tenant at once, each of several prompts counting. "
            "Default: as many as there is room for.",
        ),
    ] = None,
    max_kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of the tenant's prompts and answers at once, each answer at its longest. "
            "Default: as many as there is room for.",
        ),
    ] = None,
) -> None:
    """Make a key and print it: this once, since the file has no more of it than its hash.

    What is said of roles and limits holds for all keys of the tenant; what isn't said stays as it is.
    """
    from shoal.api.keys import KeysFile, changing, digest_of, new_key, read_keys, write_keys
    from shoal.errors import ConfigError

    key, key_id = new_key()
    with changing(file):
        found = read_keys(file) if file.exists() else KeysFile()
        tree = found.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        mine = tree.setdefault("tenants", {}).setdefault(tenant, {})
        mine.setdefault("keys", {})[key_id] = digest_of(key)
        if role:
            mine["roles"] = role
        if max_running is not None:
            mine["max_running"] = max_running
        if max_kv_tokens is not None:
            mine["max_kv_tokens"] = max_kv_tokens
        try:
            changed = KeysFile.model_validate(tree)
        except ValueError as error:
            raise ConfigError(f"this can't be in {file}: {error}") from error
        write_keys(file, changed)
    err.print(f"{tenant} may use this key from now on; {file} has its hash:")
    print(key)


@keys.command(name="list")
def list_keys(file: File = Path("keys.yaml")) -> None:
    """Tenants, the ids of their keys, and what they may do. An id is the part of a key before its secret."""
    from shoal.api.keys import read_keys

    table = Table("tenant", "keys", "roles", "requests at once", "tokens at once", "requests a second")
    for name, one in sorted(read_keys(file).tenants.items()):
        table.add_row(
            name, " ".join(sorted(one.keys)), " ".join(sorted(one.roles)), str(one.max_running or ""),
            str(one.max_kv_tokens or ""),
            "" if one.requests is None else f"{one.requests.per_s:g}, at once {one.requests.burst}",
        )  # fmt: skip
    Console().print(table)


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The eight letters and digits after sk-shoal-.", metavar="ID")],
    file: File = Path("keys.yaml"),
) -> None:
    """Take a key back. What was asked with it is still answered."""
    from shoal.api.keys import KeysFile, changing, read_keys, write_keys
    from shoal.errors import ConfigError

    with changing(file):
        tree = read_keys(file).model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        owner = next((name for name, one in tree.get("tenants", {}).items() if key_id in one.get("keys", {})), None)
        if owner is None:
            raise ConfigError(f"{file} has no key {key_id}: shoal keys list shows those that it has")
        del tree["tenants"][owner]["keys"][key_id]
        write_keys(file, KeysFile.model_validate(tree))
    err.print(f"{owner}'s key {key_id} opens nothing any more")
