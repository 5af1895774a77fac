"""`llmos party`: let partners join by certificate, join theirs, and trust an organisation's CA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmos.cli.session import (
    Session,
    json_option,
    print_fields,
    print_json,
    print_table,
    printable,
    with_session,
)

if TYPE_CHECKING:
    from llmos.verbs.parties import PartyVerbs

DOOR_PORT = 8443


def _verbs(session: Session) -> PartyVerbs:
    return session.system().parties


@click.group()
def party() -> None:
    """Know partners by certificate: be their CA, be a party of theirs, trust an own CA."""


@party.group()
def ca() -> None:
    """Make this home the CA of an organisation; show its certificate."""


@ca.command()
@click.argument("organisation")
@json_option
@with_session
def create(session: Session, organisation: str, as_json: bool) -> None:
    """Make this home the CA of ORGANISATION, a DNS name such as hospital.example."""
    from llmos.verbs.parties import anchor_facts

    facts = anchor_facts(_verbs(session).create_authority(organisation))
    if as_json:
        print_json(facts)
        return
    click.echo(f"CA of {organisation}, SHA-256 {facts['sha256'][0]}")


@ca.command()
@click.option("--out", type=click.Path(path_type=Path), help="Write the bundle to a file.")
@json_option
@with_session
def show(session: Session, out: Path | None, as_json: bool) -> None:
    """Show the trust bundle: the CA's certificate and its revocation list, as PEM."""
    from llmos.verbs.parties import anchor_facts
    from llmos.workflows import outputs

    anchor = _verbs(session).bundle()
    if out is not None:
        outputs.write(out, anchor.pem)
    if as_json:
        print_json(anchor_facts(anchor) | {"bundle": anchor.pem.decode()})
    elif out is None:
        click.echo(anchor.pem.decode(), nl=False)
    else:
        click.echo(f"{out}: trust bundle of {anchor.organisation}")


@party.command()
@click.argument("name")
@click.option(
    "--hours",
    type=click.FloatRange(min=0, max=720, min_open=True),
    default=24.0,
    show_default=True,
    help="How long the token is good.",
)
@click.option("--dns", multiple=True, help="DNS name that its certificates shall have too.")
@json_option
@with_session
def invite(session: Session, name: str, hours: float, dns: tuple[str, ...], as_json: bool) -> None:
    """Print, once, the token by which a partner joins as NAME; send it on a way that you trust."""
    token = _verbs(session).invite(name, dns=dns, hours=hours)
    if as_json:
        print_json({"party": name, "token": token.text, "hours": hours})
        return
    click.echo(f"the token for {name} is good for {hours:g} hours, and once:", err=True)
    click.echo(token.text)


@party.command()
@click.argument("url")
@click.option(
    "--token-file",
    type=click.File("r"),
    default="-",
    help="File with the token.  [standard input]",
)
@json_option
@with_session
def join(session: Session, url: str, token_file: Any, as_json: bool) -> None:  # noqa: ANN401
    """Join at URL, such as https://ca.hospital.example:8443, by a token read from a file."""
    asked = token_file.isatty()
    token = click.prompt("Token", hide_input=True) if asked else token_file.readline()
    facts = _verbs(session).join(url, token)
    if as_json:
        print_json(facts)
        return
    click.echo(f"{facts['id']} until {facts['expires_at']}; renew from {facts['renew_at']} on")


@party.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the parties of this home's CA, and what this home is elsewhere."""
    parties, memberships = _verbs(session).overview(), _verbs(session).memberships()
    if as_json:
        print_json({"parties": parties, "memberships": memberships})
        return
    print_table(
        "parties",
        ("party", "state", "expires"),
        [(facts["name"], facts["state"], _newest_end(facts)) for facts in parties],
    )
    columns = ("organisation", "party", "expires_at", "renew_at")
    rows = [[facts[column] for column in columns] for facts in memberships]
    print_table("memberships", columns, rows)


def _newest_end(facts: dict[str, Any]) -> str | None:
    return facts["certificates"][0]["expires_at"] if facts["certificates"] else None


@party.command("show")
@click.argument("name")
@json_option
@with_session
def show_party(session: Session, name: str, as_json: bool) -> None:
    """Show a party and every certificate that it got."""
    facts = _verbs(session).party(name)
    if as_json:
        print_json(facts)
        return
    print_fields({key: facts[key] for key in ("id", "state", "dns", "invited_at", "revoked_at")})
    columns = ("serial", "issued_at", "expires_at", "revoked_at")
    rows = [[row[column] for column in columns] for row in facts["certificates"]]
    print_table("certificates", columns, rows)


@party.command()
@click.argument("name")
@json_option
@with_session
def revoke(session: Session, name: str, as_json: bool) -> None:
    """Revoke a party's certificates and tokens; its next handshake is refused."""
    count = _verbs(session).revoke(name)
    if as_json:
        print_json({"revoked": name, "certificates": count})
        return
    listed = "1 certificate is" if count == 1 else f"{count} certificates are"
    click.echo(f"{name} is revoked: {listed} on the revocation list")


@party.command()
@json_option
@with_session
def renew(session: Session, as_json: bool) -> None:
    """Renew this home's certificates that are due and fetch revocation lists; run it hourly."""
    from llmos.verbs.parties import membership_facts

    done = _verbs(session).renew()
    good = [one for one in done if one.error is None]
    if not as_json:
        for one in good:
            facts = membership_facts(one.member)
            said = "renewed" if one.renewed else f"is due from {facts['renew_at']} on"
            click.echo(f"{facts['id']} {said}; good until {facts['expires_at']}")
    if failed := [(one.member.id.uri, one.error) for one in done if one.error is not None]:
        for uri, error in failed[1:]:
            click.echo(f"{uri}: {printable(error.message)}", err=True)
        raise failed[0][1]
    if as_json:
        print_json([membership_facts(one.member) | {"renewed": one.renewed} for one in good])


@party.command()
@click.argument("organisation")
@json_option
@with_session
def leave(session: Session, organisation: str, as_json: bool) -> None:
    """Stop being a party of ORGANISATION and destroy the keys; its CA is not told."""
    running = _verbs(session).leave(organisation)
    if as_json:
        print_json({"left": organisation, "running": running})
        return
    click.echo(f"this home is no party of {organisation} any more")
    for job in running:
        click.echo(
            f"{job} holds budget: join again by a new token to go on with it, or "
            f"llmos site withdraw {job} --reason TEXT"
        )


@party.command()
@click.option("--out", type=click.Path(path_type=Path), help="Write it to a file.")
@json_option
@with_session
def crl(session: Session, out: Path | None, as_json: bool) -> None:
    """Print this home's revocation list as PEM."""
    from llmos.parties.encoding import crl_to_pem
    from llmos.verbs.parties import anchor_facts
    from llmos.workflows import outputs

    anchor = _verbs(session).bundle()
    pem = crl_to_pem(anchor.crls[0])
    if out is not None:
        outputs.write(out, pem.encode())
    if as_json:
        print_json({"crl": pem, "crl_until": anchor_facts(anchor)["crl_until"][0]})
    elif out is None:
        click.echo(pem, nl=False)
    else:
        click.echo(f"{out}: revocation list")


@party.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind.")
@click.option("--port", type=int, default=DOOR_PORT, show_default=True, help="0 picks one.")
@with_session
def serve(session: Session, host: str, port: int) -> None:
    """Let invited partners join and renew until Ctrl-C, over TLS with this CA's certificate."""
    from llmos.parties import authority
    from llmos.server.party import serve_parties

    kernel = session.system().kernel
    serve_parties(
        authority.load(kernel),
        kernel.principal(),
        host=host,
        port=port,
        on_ready=lambda url: click.echo(f"parties join at {url} (stop with Ctrl-C)"),
    )


@party.group()
def trust() -> None:
    """Trust organisations that have a CA of their own, such as step-ca or SPIRE."""


@trust.command()
@click.argument("file", type=click.File("rb"))
@click.option("--organisation", required=True, help="Whose parties it may name, a DNS name.")
@json_option
@with_session
def add(session: Session, file: Any, organisation: str, as_json: bool) -> None:  # noqa: ANN401
    """Trust the CAs in FILE, PEM of certificates and their revocation lists; again to update."""
    facts = _verbs(session).trust(organisation, file.read())
    if as_json:
        print_json(facts)
        return
    click.echo(f"{organisation} is trusted: SHA-256 {', '.join(facts['sha256'])}")


@trust.command("ls")
@json_option
@with_session
def list_trusted(session: Session, as_json: bool) -> None:
    """List the trusted organisations."""
    rows = _verbs(session).trusted()
    if as_json:
        print_json(rows)
        return
    print_table(
        "trusted organisations",
        ("organisation", "sha256", "lists good until"),
        [(row["organisation"], *map(", ".join, (row["sha256"], row["crl_until"]))) for row in rows],
    )


@trust.command()
@click.argument("organisation")
@json_option
@with_session
def remove(session: Session, organisation: str, as_json: bool) -> None:
    """Trust an organisation no longer."""
    _verbs(session).distrust(organisation)
    if as_json:
        print_json({"removed": organisation})
        return
    click.echo(f"{organisation} is not trusted any more")
