"""`llmos coordinator`: invite sites, and run federated trainings with them."""

from __future__ import annotations

import click

from llmos.cli.session import Session, say, with_session

PORT = 8443


@click.group()
def coordinator() -> None:
    """Run federated trainings with other organisations' sites."""


@coordinator.command()
@click.option("--organisation", help="Make this home its CA first, such as research.example.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option("--port", type=int, default=PORT, show_default=True, help="0 picks one.")
@with_session
def up(session: Session, organisation: str | None, host: str, port: int) -> None:
    """Let invited sites join, and run the jobs of `llmos federate`, until Ctrl-C.

    One TLS port; a site shows its certificate and can ask for its own jobs, and for nothing else.
    """
    from llmos.errors import PartyExists, UnknownParty
    from llmos.parties import authority
    from llmos.server.federation import serve_coordinator

    system = session.system()
    try:
        ca = authority.load(system.kernel)
    except UnknownParty:
        if organisation is None:
            raise
        system.parties.create_authority(organisation)
        ca = authority.load(system.kernel)
    if organisation not in {None, ca.organisation}:
        raise PartyExists(
            f"this home is the CA of {ca.organisation} already",
            hint="leave --organisation out, or use another home for another organisation",
        )
    serve_coordinator(
        system.parts,
        ca,
        system.who,
        host=host,
        port=port,
        on_ready=lambda url: click.echo(
            f"coordinator of {ca.organisation} at {url} (stop with Ctrl-C)\n"
            "Next: llmos party invite SITE; there: llmos site join " + url
        ),
        tell=say,
    )
