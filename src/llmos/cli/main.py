"""The `llmos` command: finds the noun's module, and is one of the two places that print errors."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from llmos import __version__
from llmos.cli.session import Session, printable
from llmos.errors import LlmosError

# noun -> (module in llmos.cli, what `llmos --help` says); modules load only when they are named.
NOUNS: Final[dict[str, tuple[str, str]]] = {
    "demo": ("demo", "Show the whole story on a built-in model and data."),
    "init": ("home", "Make a home: keys, databases, policies, first administrator."),
    "doctor": ("home", "Check this machine and this home."),
    "model": ("model", "Pull, list, show and export models."),
    "data": ("data", "Import, list and show datasets."),
    "train": ("train", "Fine-tune a model on a dataset under a privacy budget."),
    "jobs": ("jobs", "List, show, resume, retry, cancel and work on jobs."),
    "budget": ("budget", "List, show and explain privacy budgets."),
    "approval": ("approval", "Decide on what someone else proposed."),
    "measure": ("measure", "Measure what models leak about their training data."),
    "report": ("report", "Write a signed certificate and an HTML report for a model."),
    "verify": ("verify", "Verify a certificate or a log proof offline."),
    "serve": ("serve", "Serve models through an OpenAI-compatible API."),
    "key": ("key", "Make, list, rotate and revoke API keys."),
    "user": ("user", "Add, list and change the people and programs of this home."),
    "login": ("user", "Log in with a password and get an API key for twelve hours."),
    "vault": ("vault", "Show and rotate the vault's keys; rewrap the root key."),
    "policy": ("policy", "Show, check, test, explain and change the access policies."),
    "party": ("party", "Let partners join by certificate, join theirs, trust an own CA."),
    "coordinator": ("coordinator", "Run federated trainings with other organisations' sites."),
    "site": ("site", "Take part in federated trainings, and decide in which."),
    "federate": ("federate", "Propose federated trainings, and follow them."),
    "log": ("log", "Show, verify, prove, export, inspect and witness the audit log."),
}


class Nouns(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the nouns in the order of a user's day."""
        return list(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the noun's module and return its command."""
        if cmd_name not in NOUNS:
            return None
        module = importlib.import_module(f"llmos.cli.{NOUNS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one line a noun without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(noun, summary) for noun, (_, summary) in NOUNS.items()])


@click.group(cls=Nouns, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--home", type=click.Path(), help="Home directory.  [env: LLMOS_HOME; ~/.llmos]")
@click.version_option(__version__, prog_name="llmos")
@click.pass_context
def llmos(ctx: click.Context, home: str | None) -> None:
    """An operating system for private language models.

    Train, deploy and use language models on data that nobody else may see, and prove afterwards
    what was protected. Start with `llmos demo`; every command takes --help, nearly
    all take --json.
    """
    if not isinstance(ctx.obj, Session):
        ctx.obj = Session(home=home)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the status of the error class, 0 when there is none."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str], session: Session | None = None) -> int:
    """Run one command line and return its exit status; 1 at once where nobody reads its output."""
    try:
        status = llmos.main(args=arguments, prog_name="llmos", standalone_mode=False, obj=session)
        return status if isinstance(status, int) else 0  # click returns what `Exit` carries
    except LlmosError as error:
        _print_error(error, as_json="--json" in arguments)
        return error.exit_status
    except (click.Abort, KeyboardInterrupt):  # click turns Ctrl-C into Abort
        click.echo("llmos: error: stopped", err=True)
        return 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        click.echo(f"llmos: error: {error.format_message()}", err=True)
        if context is not None:
            click.echo(f"llmos: hint: {context.command_path} --help", err=True)
        return error.exit_code


def _print_error(error: LlmosError, *, as_json: bool) -> None:
    if as_json:
        fields: dict[str, Any] = {"type": type(error).__name__, "message": error.message}
        if error.hint:
            fields["hint"] = error.hint
        click.echo(json.dumps({"error": fields}, ensure_ascii=False))
        return
    click.echo(f"llmos: error: {printable(error.message)}", err=True)
    if error.hint:
        click.echo(f"llmos: hint: {printable(error.hint)}", err=True)


if __name__ == "__main__":
    main()
