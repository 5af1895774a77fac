"""The demo's conversation with a real server in its own process, through the `openai` client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from llmos.config import child_environment, load
from llmos.errors import ConfigError, LlmosError

_STOP_TIMEOUT_S: Final = 20


def show_conversation(home: Path, model: str, other_model: str, question: str, token: str) -> None:
    """Ask one question, show two refused calls, and stop the server.

    Raises:
        ConfigError: the `openai` client is not installed.
        LlmosError: the server did not start, or did not refuse what it must refuse.
    """
    try:
        from openai import AuthenticationError, OpenAI, PermissionDeniedError
    except ImportError:
        raise ConfigError(
            "the openai client is not installed", hint="pip install 'llmos[demo]'"
        ) from None
    with running_server(home) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
        click.echo(f"  models this key may use: {', '.join(m.id for m in client.models.list())}")
        click.echo(f"  you:   {question}")
        click.echo("  model: ", nl=False)
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        for chunk in stream:
            click.echo(chunk.choices[0].delta.content or "" if chunk.choices else "", nl=False)
        click.echo()
        refusals = (
            (
                "a wrong key",
                OpenAI(base_url=f"{url}/v1", api_key="llmos_wrong", max_retries=0),
                model,
                AuthenticationError,
            ),
            ("a key without the right", client, other_model, PermissionDeniedError),
        )
        for what, caller, wanted, expected in refusals:
            try:
                caller.chat.completions.create(
                    model=wanted, messages=[{"role": "user", "content": question}], max_tokens=4
                )
            except expected as error:
                click.echo(f"  {what}: refused with {error.status_code}")
            else:
                raise LlmosError(f"the server answered {what}")


@contextmanager
def running_server(home: Path) -> Iterator[str]:
    """Start `llmos serve` on a free port, yield its URL, and stop it afterwards.

    Raises:
        LlmosError: the server ended before it was ready; carries what it said.
    """
    command = [sys.executable, "-m", "llmos.cli.main", "--home", str(home), "serve", "--port", "0"]
    url = load(home=home).database_url
    given = {} if url is None else {"LLMOS_DATABASE_URL": url.get_secret_value()}
    environment = child_environment(**given)
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line.startswith("serving on "):
                said = server.stderr.read() if server.stderr else ""
                raise LlmosError(f"the server did not start: {said.strip() or 'no message'}")
            yield line.split()[2].removesuffix("/v1")
        finally:
            server.terminate()
            try:
                server.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
