"""Commands typed in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.homes import close

from llmos.cli import main
from llmos.cli.session import Session


@dataclass(frozen=True)
class Said:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """Return the one JSON value that is all of standard output."""
        return json.loads(self.out)


Type = Callable[..., Said]


@pytest.fixture
def typing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], Type]]:
    """Return a function that makes the function that types commands for a home."""
    monkeypatch.setenv("LLMOS_DEVICE", "cpu")
    monkeypatch.setenv("LLMOS_THREADS", "1")
    sessions: list[Session] = []

    def typing(home: Path) -> Type:
        def type_(*arguments: str) -> Said:
            session = Session(home=str(home))
            sessions.append(session)
            capsys.readouterr()
            status = main.run(list(arguments), session)
            return Said(status, *capsys.readouterr())

        return type_

    yield typing
    for session in sessions:
        if session.opened is not None:
            close(session.opened)


@pytest.fixture
def typed(typing: Callable[[Path], Type], home: Path) -> Type:
    """Return the function that types a command for a copy of the prepared home."""
    return typing(home)
