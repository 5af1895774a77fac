"""The tables of credentials, in the kernel's transaction domain."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table

from llmos.kernel.schema import BLOB, INT, KERNEL, STR

credentials = Table(
    "credentials",
    KERNEL,
    Column("principal_id", STR, ForeignKey("principals.id"), primary_key=True),
    Column("password_hash", STR, nullable=False),  # PHC string
    Column("totp_seed", BLOB),  # wrapped under a key of the vault; none: no codes are asked for
    Column("totp_step", INT, nullable=False),  # the newest that was used
)

login_attempts = Table(
    "login_attempts",
    KERNEL,
    Column("subject", STR, primary_key=True),  # a principal's id, or one of few for all other names
    Column("failures", INT, nullable=False),  # in a row
    Column("barred_until", STR),
)
