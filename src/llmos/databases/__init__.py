"""Databases other than SQLite for the kernel's stores; a home on SQLite loads none of them."""

from __future__ import annotations

from typing import Final

WAIT: Final = "llmos_wait"  # execution option: whether a writer waits for the one before
