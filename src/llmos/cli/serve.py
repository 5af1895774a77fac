"""`llmos serve`: the OpenAI-compatible API."""

from __future__ import annotations

from pathlib import Path

import click

from llmos.cli.session import Session, device_option, with_session


@click.command()
@click.option("--host", help="Address to bind.  [LLMOS_HOST; 127.0.0.1]")
@click.option("--port", type=int, help="Port to bind; 0 picks one.  [LLMOS_PORT; 8080]")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Certificate chain (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Private key (PEM).")
@device_option
@with_session
def serve(
    session: Session,
    host: str | None,
    port: int | None,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> None:
    """Serve this home's models until Ctrl-C; an API key is always required.

    Any address but loopback needs TLS files: keys and prompts never travel in the clear.
    """
    from llmos.server.lifecycle import serve_system

    serve_system(
        session.system(),
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        on_ready=lambda url: click.echo(f"serving on {url}/v1 (stop with Ctrl-C)"),
    )
