"""A home that is a CA, and one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.parties import NOW, ORGANISATION, kernel_at

from llmos.kernel.kernel import Kernel
from llmos.parties import authority
from llmos.parties.authority import PartyAuthority


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    """Return a fresh home."""
    with kernel_at(tmp_path / "home") as made:
        yield made


@pytest.fixture
def ca(tmp_path: Path) -> Iterator[PartyAuthority]:
    """Return the CA of another fresh home."""
    with kernel_at(tmp_path / "ca") as made:
        yield authority.create(ORGANISATION, made.principal(), made, NOW)
