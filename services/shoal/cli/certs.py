"""Certificates for Shoal's own processes: the command of shoal.cluster.certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.progress import err


def certs(
    folder: Annotated[Path, typer.Argument(help="Where they go; made if it isn't there.", metavar="DIR")],
    days: Annotated[
        int | None, typer.Option(min=1, help="How long the roles' certificates are valid. Default: 365, or as before.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name or IP address that clients reach the gateway by, one --host each: its certificate can then be "
            "that of gateway.tls, too. Default: localhost, 127.0.0.1 and ::1, or as before.",
            metavar="HOST",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the roles' certificates, by the authority that is there.")
    ] = False,
) -> None:
    """Make certificates by which Shoal's own processes know one another.

    Writes a certificate authority (ca.crt and ca.key), and for each role (gateway, prefill, decode) a folder with
    ca.crt, tls.crt and tls.key, all of them readable by you alone. A host needs the folders of the roles that it runs,
    and nobody but you needs ca.key: who has it can make a certificate of any role.

    Then: [bold]shoal serve --tls DIR[/bold], or [bold]tls: {folder: DIR}[/bold] in a configuration. Replicas take up
    replaced files without a restart, so [bold]--force[/bold] in time before they expire is all there is to do.

    For development and small installations: a larger one has an authority of its own, such as cert-manager's.
    """
    from shoal.cluster.certificates import ROLES, make_certificates

    terms = make_certificates(folder, days=days, gateway_hosts=host or (), replaces=force)
    err.print(
        f"{folder} has a certificate for each of {', '.join(ROLES)}, valid for {terms.days} days, the gateway's also "
        f"for {', '.join(terms.hosts)}. Serve with them:"
    )
    err.print(f"  shoal serve --tls {folder}", markup=False, soft_wrap=True)
