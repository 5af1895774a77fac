"""The kernel's tables in kernel.db (one transaction domain) and keys.db; migrations must agree.

Packages above add the tables that only they read to `KERNEL`: models, jobs and log partners.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.types import TypeEngine

from llmos.errors import IntegrityError, RequestError


class _TextRefused(RequestError, DontWrapMixin):
    """A text that cannot be stored; SQLAlchemy lets it through as it is."""


class _Exact(TypeDecorator[Any]):
    """Values of one type: SQLite returns whatever type it was made to hold."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Text
    cache_ok = True

    def __init__(self, impl: TypeEngine[Any], kind: type) -> None:
        """Store as `impl` and give back nothing but `kind`."""
        super().__init__()
        self.impl, self.kind = impl, kind

    def process_bind_param(self, value: Any, dialect: object) -> Any:  # noqa: ANN401, ARG002
        """Return the value as it is written.

        Raises:
            RequestError: PostgreSQL could not store it; so neither does SQLite.
        """
        if isinstance(value, str) and "\0" in value:
            raise _TextRefused("a text holds a NUL character")
        return value

    def process_result_value(self, value: Any, dialect: object) -> Any:  # noqa: ANN401, ARG002
        """Return the value as it was read.

        Raises:
            IntegrityError: it has another type.
        """
        if value is not None and type(value) is not self.kind:
            raise IntegrityError("a database holds a value of a type that was never written")
        return value


STR: Final = _Exact(Text(), str)
BLOB: Final = _Exact(LargeBinary(), bytes)
INT: Final = _Exact(BigInteger(), int)

KERNEL: Final = MetaData()
KEYS: Final = MetaData()

# Times are RFC 3339 text in UTC; JSON columns are canonical JSON text (RFC 8785).

settings = Table(
    "settings", KERNEL, Column("name", STR, primary_key=True), Column("value", STR, nullable=False)
)

principals = Table(
    "principals",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("name", STR, nullable=False, unique=True),
    Column("roles", STR, nullable=False),  # JSON list of role names
    Column("created_at", STR, nullable=False),
    Column("disabled_at", STR),
    Column("kind", STR, nullable=False, server_default="person"),
    Column("tenant", STR),  # none: of the whole organisation
)

api_keys = Table(
    "api_keys",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("principal_id", STR, ForeignKey("principals.id"), nullable=False),
    Column("label", STR, nullable=False),
    Column("secret_hmac", BLOB, nullable=False),  # HMAC-SHA256 under the vault's pepper
    Column("models", STR, nullable=False),  # JSON list of model names, "*" for every model
    Column("created_at", STR, nullable=False),
    Column("expires_at", STR),
    Column("revoked_at", STR),
    Column("actions", STR),  # JSON list; none: every action of the owner
    Column("purpose", STR),  # none: every purpose
    Column("last_used_at", STR),
)

policy_versions = Table(
    "policy_versions",
    KERNEL,
    Column("digest", STR, primary_key=True),
    Column("files", STR, nullable=False),  # JSON: texts by file name
)

datasets = Table(
    "datasets",
    KERNEL,
    Column("name", STR, primary_key=True),
    Column("classification", STR, nullable=False),
    Column("purposes", STR, nullable=False),  # JSON list
    Column("unit_column", STR, nullable=False),
    Column("object_id", STR, nullable=False),  # records, in the vault
    Column("fingerprint", STR, nullable=False),  # SHA-256 of the stored plaintext, hex
    Column("card", STR, nullable=False),  # JSON: counts, format, canaries; see data/datasets.py
    Column("created_at", STR, nullable=False),
    Column("parents", STR, nullable=False, server_default="[]"),  # JSON: what it was made from
    Column("block_of", STR),  # the dataset of which it has one of the disjoint parts
)

budget_pools = Table(
    "budget_pools",
    KERNEL,
    Column("id", STR, primary_key=True),  # dataset, dataset/purpose, @tenant behind either
    Column("dataset", STR, ForeignKey("datasets.name"), nullable=False),
    Column("purpose", STR),  # none: every purpose is charged here
    Column("epsilon", STR, nullable=False),  # float.hex of the total budget
    Column("delta", STR, nullable=False),  # float.hex
    Column("neighboring", STR, nullable=False),
    Column("unit_column", STR, nullable=False),
    Column("fingerprint", STR, nullable=False),
    Column("renyi_order", STR, nullable=False),  # float.hex; fixed when the pool is made
    Column("cap", INT, nullable=False),  # Renyi divergence at that order, in 1e-12 nats
    Column("spent", INT, nullable=False),
    Column("held", INT, nullable=False),
    Column("tenant", STR),  # none: every tenant is charged here
    CheckConstraint("spent >= 0 AND held >= 0 AND spent + held <= cap", name="never_overspent"),
)

budget_reservations = Table(
    "budget_reservations",
    KERNEL,
    Column("id", STR, primary_key=True),  # idempotency key: the job's id
    Column("dataset", STR, ForeignKey("datasets.name"), nullable=False),
    Column("purpose", STR, nullable=False),
    Column("mechanism", STR, nullable=False),  # JSON; after commit: the mechanism that was run
    Column("steps_done", INT, nullable=False),  # written before anything is released
    Column("state", STR, nullable=False),
    Column("tenant", STR),
    CheckConstraint("state IN ('held', 'committed', 'aborted')", name="known_state"),
    CheckConstraint("steps_done >= 0", name="not_negative"),
)

budget_costs = Table(
    "budget_costs",
    KERNEL,
    Column("reservation", STR, ForeignKey("budget_reservations.id"), primary_key=True),
    Column("pool", STR, ForeignKey("budget_pools.id"), primary_key=True),
    Column("cost", INT, nullable=False),  # held or spent, in 1e-12 nats at the pool's order
    CheckConstraint("cost >= 0", name="cost_not_negative"),
)

budget_events = Table(
    "budget_events",
    KERNEL,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("pool", STR, ForeignKey("budget_pools.id"), nullable=False),
    Column("kind", STR, nullable=False),  # create, raise, reserve, commit or abort
    Column("reference", STR, nullable=False),  # the reservation, the approval of a raise, or ""
    Column("mechanism", STR),  # JSON; none when the cap changed
    Column("cap_change", INT, nullable=False),
    Column("held_change", INT, nullable=False),
    Column("spent_change", INT, nullable=False),
    Column("at", STR, nullable=False),
    sqlite_autoincrement=True,
)

approvals = Table(
    "approvals",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("act", STR, nullable=False),
    Column("subject", STR, nullable=False),
    Column("request", STR, nullable=False),  # JSON: what is done when it is approved
    Column("reason", STR, nullable=False),
    Column("proposer", STR, ForeignKey("principals.id"), nullable=False),
    Column("proposed_at", STR, nullable=False),
    Column("state", STR, nullable=False),
    Column("decider", STR, ForeignKey("principals.id")),
    Column("decided_at", STR),
    Column("record", STR),  # DSSE envelope of what was approved, signed by the home
    Column("used_at", STR),  # of an act that is done later, once
    CheckConstraint("state IN ('open', 'approved', 'refused')", name="known_approval_state"),
    CheckConstraint("proposer != decider", name="four_eyes"),
)

log_entries = Table(
    "log_entries",
    KERNEL,
    Column("idx", INT, primary_key=True, autoincrement=False),
    Column("data", BLOB, nullable=False),  # canonical JSON (RFC 8785)
)

log_nodes = Table(
    "log_nodes",
    KERNEL,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("idx", INT, primary_key=True, autoincrement=False),
    Column("hash", BLOB, nullable=False),  # RFC 6962 hash of a complete subtree
)

log_checkpoints = Table(
    "log_checkpoints",
    KERNEL,
    Column("size", INT, primary_key=True, autoincrement=False),
    Column("note", STR, nullable=False),  # C2SP signed note
)

log_cosignatures = Table(
    "log_cosignatures",
    KERNEL,
    Column("size", INT, primary_key=True, autoincrement=False),  # its checkpoint is kept
    Column("partner", STR, primary_key=True),
    Column("line", STR, nullable=False),  # C2SP tlog-cosignature
)

tenant_keys = Table(
    "tenant_keys",
    KEYS,
    Column("tenant", STR, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("wrapped_key", BLOB),  # NULL: destroyed, or version 0, which the root key gives
    Column("created_at", STR, nullable=False),
    Column("retired_at", STR),
)

object_keys = Table(
    "object_keys",
    KEYS,
    Column("object_id", STR, primary_key=True),
    Column("kind", STR, nullable=False),
    Column("tenant", STR, nullable=False),
    Column("key_version", Integer, nullable=False),
    Column("wrapped_key", BLOB, nullable=False),  # nonce 12 | AES-256-GCM of the 32-byte key
    Column("created_at", STR, nullable=False),
    ForeignKeyConstraint(["tenant", "key_version"], [tenant_keys.c.tenant, tenant_keys.c.version]),
    Index("object_keys_of_version", "tenant", "key_version"),
)

unit_keys = Table(
    "unit_keys",
    KEYS,
    Column("object_id", STR, ForeignKey("object_keys.object_id"), primary_key=True),
    Column("name", STR, primary_key=True),  # a keyed hash of the dataset and the unit, hex
    Column("tenant", STR, nullable=False),
    Column("key_version", Integer, nullable=False),
    Column("wrapped_key", BLOB),  # as in object_keys; NULL: destroyed
    Column("destroyed_sha256", STR),  # of the wrapped key that was destroyed, hex
    ForeignKeyConstraint(["tenant", "key_version"], [tenant_keys.c.tenant, tenant_keys.c.version]),
    Index("unit_keys_of_version", "tenant", "key_version"),
    sqlite_with_rowid=False,  # the rows lie in their primary key: half the size
)

sealed_secrets = Table(
    "sealed_secrets",
    KEYS,
    Column("name", STR, primary_key=True),
    # nonce 12 | AES-256-GCM under a key derived from the root key
    Column("sealed", BLOB, nullable=False),
)

# Who may do what, which data and models there are and what they may still spend: small tables,
# changed only by acts. The others grow with every job; `workflows.books` compares those.
_WHOLE: Final = (
    *("approvals", "budget_pools", "credentials", "datasets", "erasures", "log_partners"),
    *("models", "policy_versions", "principals", "settings", "witnessed"),
)
_KEYS: Final = ", ".join(sorted({*api_keys.columns.keys()} - {"last_used_at"}))  # by no act
STANDING: Final = dict.fromkeys(_WHOLE, "*") | {"api_keys": _KEYS}
_SCHEMA_ROWS: Final = {"sqlite": {"sqlite_master": "type, name, sql"}}


def standing_digest(conn: Connection) -> dict[str, str]:
    """Return SHA-256, in hex, over the rows of `STANDING`, under the schema's revision.

    Every act's entry in the log has it, so that rows changed without an act are found; so is a
    changed schema, where the database has it as rows too.
    """
    rows: dict[str, list[str]] = {}
    for name, wanted in (STANDING | _SCHEMA_ROWS.get(conn.dialect.name, {})).items():
        found = conn.exec_driver_sql(f"SELECT {wanted} FROM {name}")  # noqa: S608 - our own names
        rows[name] = sorted(json.dumps([*row], default=list) for row in found)  # bytes: numbers
    revision = conn.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one()
    return {revision: hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
