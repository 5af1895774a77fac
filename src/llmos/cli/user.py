"""`llmos user` and `llmos login`: the people and programs of a home, and how people log in."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import (
    Session,
    ask_new_secret,
    ask_present,
    json_option,
    print_json,
    print_table,
    secret_from,
    with_session,
)

ROLES = ("administrator", "steward", "engineer", "developer", "auditor", "site")


@click.group()
def user() -> None:
    """Add, list and change the people and programs of this home."""


@user.command()
@click.argument("name")
@click.option("--role", "roles", multiple=True, required=True, type=click.Choice(ROLES))
@click.option("--tenant", help="Part of the organisation whose share of a budget their jobs use.")
@click.option("--service", is_flag=True, help="A program: it has keys only, and approves nothing.")
@json_option
@with_session
def add(
    session: Session,
    name: str,
    roles: tuple[str, ...],
    tenant: str | None,
    service: bool,
    as_json: bool,
) -> None:
    """Add a person, or a service account, with one or more roles."""
    kind = "service" if service else "person"
    principal = session.system().access.add_user(name, roles, kind=kind, tenant=tenant)
    if as_json:
        facts = {"name": name, "kind": kind, "roles": sorted(principal.roles), "tenant": tenant}
        print_json(facts)
        return
    click.echo(f"{principal.name}: {', '.join(sorted(principal.roles))}")


@user.command("ls")
@json_option
@with_session
def list_(session: Session, as_json: bool) -> None:
    """List the people and programs."""
    rows = session.system().people.overview()
    if as_json:
        print_json(rows)
        return
    lines = [
        (r["name"], r["kind"], ", ".join(r["roles"]), r["tenant"] or "-", r["login"]) for r in rows
    ]
    print_table("users", ("name", "kind", "roles", "tenant", "login"), lines)


@user.command()
@click.argument("name")
@click.option("--role", "roles", multiple=True, required=True, type=click.Choice(ROLES))
@json_option
@with_session
def roles(session: Session, name: str, roles: tuple[str, ...], as_json: bool) -> None:
    """Give NAME these roles and no others, for its present keys too."""
    session.system().people.set_roles(name, roles)
    if as_json:
        print_json({"name": name, "roles": sorted(set(roles))})
        return
    click.echo(f"{name}: {', '.join(sorted(set(roles)))}")


@user.command()
@click.argument("name")
@click.argument("tenant", required=False)
@json_option
@with_session
def tenant(session: Session, name: str, tenant: str | None, as_json: bool) -> None:
    """Let the jobs that NAME plans from now on count for TENANT; without one, for none."""
    session.system().people.set_tenant(name, tenant)
    if as_json:
        print_json({"name": name, "tenant": tenant})
        return
    click.echo(f"{name}: {'no tenant' if tenant is None else f'tenant {tenant}'}")


@user.command()
@click.argument("name")
@json_option
@with_session
def disable(session: Session, name: str, as_json: bool) -> None:
    """Refuse NAME and all of its keys from now on; the name is not given again."""
    session.system().people.disable(name)
    if as_json:
        print_json({"name": name, "state": "disabled"})
        return
    click.echo(f"{name} is disabled, and so are all of its keys")


@user.command()
@click.argument("name")
@click.option("--password-file", type=click.Path(), help="File whose first line is it.")
@click.option("--present-file", type=click.Path(), help="File with the present one, for your own.")
@json_option
@with_session
def password(
    session: Session, name: str, password_file: str | None, present_file: str | None, as_json: bool
) -> None:
    """Give NAME a new password, asked for twice; for your own, the present one first."""
    people = session.system().people
    present = _present(session, name, present_file)
    new = secret_from(password_file, "password") or ask_new_secret("password")
    people.set_password(name, new, present=present)
    if as_json:
        print_json({"name": name, "login": "password"})
        return
    click.echo(f"{name} has a new password: llmos login {name}")


@user.command()
@click.argument("name")
@click.option("--remove", is_flag=True, help="Ask for no codes any more.")
@click.option("--present-file", type=click.Path(), help="File with your password, for your own.")
@json_option
@with_session
def totp(
    session: Session, name: str, remove: bool, present_file: str | None, as_json: bool
) -> None:
    """Ask NAME for a code of an authenticator app too, from when its first code was typed here.

    The otpauth URI is shown once; whoever has it can make the codes.
    """
    from llmos.accounts import totp as codes

    people = session.system().people
    present = _present(session, name, present_file)
    seed = None if remove else codes.new_seed()
    code = ""
    if seed is not None:
        click.echo(codes.uri(seed, name, "LLMOS"), err=as_json)
        code = str(click.prompt("Code of the app", err=True))
    people.set_codes(name, seed, code, present=present)
    if as_json:
        print_json({"name": name, "codes": not remove})
        return
    click.echo(f"{name} logs in with a password{'' if remove else ' and a code'}")


def _present(session: Session, name: str, file: str | None) -> str:
    """Return the present password where it has to be shown."""
    if not session.system().people.proves_password(name):
        return ""
    return secret_from(file, "password") or ask_present("Present password")


@click.command()
@click.argument("name")
@click.option("--password-file", type=click.Path(), help="File whose first line is the password.")
@click.option("--code", "with_code", is_flag=True, help="Ask for a code of your app too.")
@click.option("--to", type=click.Path(path_type=Path), help="Write the key there, for you only.")
@json_option
@with_session
def login(
    session: Session,
    name: str,
    password_file: str | None,
    with_code: bool,
    to: Path | None,
    as_json: bool,
) -> None:
    """Log in with a password and get an API key for twelve hours.

    LLMOS_API_KEY_FILE names the file that --to writes; without it the key is printed.
    """
    from llmos.workflows import login as workflow

    people = session.system().people
    if to is not None:
        workflow.check_place(to)
    given = secret_from(password_file, "password") or ask_present("Password")
    code = str(click.prompt("Code of the app", err=True)) if with_code else ""
    issued = people.log_in(name, given, code)
    shown = {"id": issued.id}
    if to is None:
        shown["token"] = issued.token
    else:
        workflow.write_key(to, issued)
        shown["file"] = str(to.absolute())
    if as_json:
        print_json(shown)
        return
    click.echo(shown.get("token") or f"export LLMOS_API_KEY_FILE={shown['file']}")
