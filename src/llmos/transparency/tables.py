"""The tables of the log's partners, in the kernel's transaction domain."""

from __future__ import annotations

from sqlalchemy import Column, Table

from llmos.kernel.schema import BLOB, INT, KERNEL, STR

log_partners = Table(
    "log_partners",
    KERNEL,
    Column("name", STR, primary_key=True),
    Column("vkey", STR, nullable=False),  # of the partner's log; its cosignatures have that key
    Column("url", STR),  # where it takes checkpoints; none: it is only witnessed
    Column("added_at", STR, nullable=False),
)

witnessed = Table(
    "witnessed",
    KERNEL,
    Column("origin", STR, primary_key=True),  # stays when the partner is removed
    Column("vkey", STR, nullable=False),
    Column("size", INT, nullable=False),
    Column("root", BLOB, nullable=False),
    Column("at", STR, nullable=False),
)
