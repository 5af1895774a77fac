"""People of a home, each with an API key in a file of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.homes import opened

from llmos.system import System


@dataclass(frozen=True)
class Person:
    """Someone with an API key in a file of their own."""

    home: Path
    key_file: Path

    @contextmanager
    def at_work(self) -> Iterator[System]:
        """Open the home as this person."""
        with opened(self.home, api_key_file=self.key_file) as system:
            yield system


def hire(home: Path, name: str, role: str, folder: Path) -> Person:
    """Add a person and give them a key."""
    with opened(home) as system:
        system.access.add_user(name, [role])
        token = system.access.create_key(user=name).token
    file = folder / f"{name}.key"
    file.write_text(f"{token}\n")
    return Person(home, file)
