"""What the commands of one process share: the opened home and the terminal."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

    from llmos.config import Config
    from llmos.system import System

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """The flags that hold for a whole command line; opens the home when a command needs it."""

    home: str | None = None
    device: str | None = None
    opened: System | None = field(default=None, repr=False)

    def config(self) -> Config:
        """Read the configuration."""
        from llmos.config import let_threads_sleep, load

        let_threads_sleep()
        return load(home=self.home, device=self.device)

    def system(self, ask: Callable[[str], str] | None = None) -> System:
        """Open the home, asking for its passphrase or PIN when it has one and a person is there."""
        if self.opened is None:
            config = self.config()  # before PyTorch is loaded
            from llmos.system import boot

            self.opened = boot(config, ask=ask or ask_secret)
        return self.opened


def ask_secret(what: str) -> str:
    """Ask a person at a terminal for a passphrase or a PIN; nothing is echoed.

    Raises:
        WrongPassphrase: there is no terminal.
    """
    if not sys.stdin.isatty():
        from llmos.errors import WrongPassphrase

        raise WrongPassphrase(
            f"a {what} opens this home and there is no terminal to ask for it",
            hint=f"set LLMOS_{'PKCS11_PIN' if what == 'PIN' else 'PASSPHRASE'}_FILE to a file "
            "that holds it",
        )
    return str(click.prompt(what[0].upper() + what[1:], hide_input=True))


def ask_new_passphrase(_what: str = "passphrase") -> str:
    """Ask for a passphrase that does not exist yet, twice; nothing is echoed.

    Raises:
        WrongPassphrase: there is no terminal.
    """
    if not sys.stdin.isatty():
        from llmos.errors import WrongPassphrase

        raise WrongPassphrase(
            "there is no terminal to ask for the new passphrase",
            hint="name a file whose first line holds it",
        )
    return str(click.prompt("New passphrase", hide_input=True, confirmation_prompt=True))


def ask_new_secret(what: str) -> str:
    """Ask for a secret that does not exist yet, twice; nothing is echoed."""
    return str(click.prompt(f"New {what}", hide_input=True, confirmation_prompt=True, err=True))


def ask_present(what: str) -> str:
    """Ask for a secret that exists; nothing is echoed."""
    return str(click.prompt(what, hide_input=True, err=True))


def secret_from(file: str | None, what: str) -> str:
    """Return the first line of a file that holds a secret, or nothing where none is named."""
    from llmos.kernel.root import first_line

    return "" if file is None else first_line(Path(file), what)


def json_option(function: F) -> F:
    """Give a command the flag `--json`, passed to it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def device_option(function: F) -> F:
    """Give a command the flag `--device`, which overrides the configured device."""

    def remember(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
        if value is not None and (session := ctx.find_object(Session)) is not None:
            session.device = value

    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        callback=remember,
        expose_value=False,
        help="Where to compute; auto takes a GPU when there is one.  [env: LLMOS_DEVICE; auto]",
    )(function)


def with_session(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the session as the command's first argument."""

    @click.pass_context
    def called(ctx: click.Context, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return ctx.invoke(function, ctx.find_object(Session), *args, **kwargs)

    return update_wrapper(called, function)


def printable(text: str) -> str:
    """Return a text of whoever wrote it, as one line that says what it says and does nothing.

    A line break, a return or an escape sequence of another organisation could overwrite on the
    screen what stands before it.
    """
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )


def say(text: str) -> None:
    """Print what happened, and when."""
    click.echo(f"{datetime.now(UTC):%H:%M:%S} {printable(text)}")


def console() -> Console:
    """Return the console for people: standard output, colour only on a terminal, text as it is."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=False)


def print_json(value: object) -> None:
    """Print one JSON value for programs."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows as a table, or say that there are none."""
    from rich import box
    from rich.table import Table

    if not rows:
        click.echo(f"no {title}")
        return
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else printable(str(cell)) for cell in row))
    console().print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print name and value pairs, one a line, values aligned."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        click.echo(f"  {name.ljust(width)}  {printable(str(value))}")
