"""A real PostgreSQL 15 from Debian's package, in a temporary folder, reached by a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAMS: Final = Path("/usr/lib/postgresql/15/bin")
MISSING: Final = "needs PostgreSQL 15; on Debian: apt-get install postgresql-15"
_READY_S: Final = "60"


@dataclass(frozen=True)
class Server:
    """A running server with a database for homes; nobody needs a password on its socket."""

    folder: Path

    @property
    def url(self) -> str:
        """The URL that a home is given: its role owns the database and has no other right."""
        return f"postgresql://llmos@/llmos?host={self.folder}"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends what goes on, `immediate` is a crash."""
        self._control("stop", "-m", mode)

    def start(self, more: str = "") -> None:
        """Start it, with `more` settings as options of the command line."""
        # As quiet and small as a test wants it. What dies here are processes, never the machine:
        # nothing needs to reach the disk.
        settings = f"-k {self.folder} -c listen_addresses='' -c max_connections=200 -c fsync=off"
        settings += f" {more}"
        self._control("start", "-l", str(self.folder / "server.log"), "-o", settings)

    def _control(self, act: str, *options: str) -> None:
        command = [str(PROGRAMS / "pg_ctl"), act, "-D", str(self.data), "-w", "-t", _READY_S]
        run_as_postgres([*command, *options])


def is_installed() -> bool:
    return (PROGRAMS / "initdb").exists()


def run_as_postgres(command: list[str]) -> None:
    """Run a program of PostgreSQL, which refuses to be root: then as Debian's user for it."""
    if os.getuid() == 0:
        command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Make a cluster in a new folder, start its server, and stop it after the block.

    The folder's path must be short (a socket's name has 107 bytes) and open to other users.
    """
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Server(folder)
    command = [str(PROGRAMS / "initdb"), "-D", str(server.data), "-U", "postgres", "-A", "trust"]
    run_as_postgres([*command, "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"])
    server.start()
    try:
        for statement in ("CREATE ROLE llmos LOGIN", "CREATE DATABASE llmos OWNER llmos"):
            run_as_postgres(
                [str(PROGRAMS / "psql"), "-h", str(folder), "-U", "postgres", "-c", statement]
            )
        yield server
    finally:
        server.stop("immediate")
