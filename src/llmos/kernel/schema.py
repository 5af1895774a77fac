"""The tables of kernel.db (one transaction domain) and of keys.db; migrations must agree."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    text,
)

KERNEL: Final = MetaData()
KEYS: Final = MetaData()

# Times are RFC 3339 text in UTC; JSON columns are canonical JSON text (RFC 8785).

settings = Table(
    "settings",
    KERNEL,
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

principals = Table(
    "principals",
    KERNEL,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("roles", Text, nullable=False),  # JSON list of role names
    Column("created_at", Text, nullable=False),
    Column("disabled_at", Text),
)

api_keys = Table(
    "api_keys",
    KERNEL,
    Column("id", Text, primary_key=True),
    Column("principal_id", Text, ForeignKey("principals.id"), nullable=False),
    Column("label", Text, nullable=False),
    Column("secret_hmac", LargeBinary, nullable=False),  # HMAC-SHA256 under the vault's pepper
    Column("models", Text, nullable=False),  # JSON list of model names, "*" for every model
    Column("created_at", Text, nullable=False),
    Column("expires_at", Text),
    Column("revoked_at", Text),
)

datasets = Table(
    "datasets",
    KERNEL,
    Column("name", Text, primary_key=True),
    Column("classification", Text, nullable=False),
    Column("purposes", Text, nullable=False),  # JSON list
    Column("unit_column", Text, nullable=False),
    Column("object_id", Text, nullable=False),  # records, in the vault
    Column("fingerprint", Text, nullable=False),  # SHA-256 of the stored plaintext, hex
    Column("card", Text, nullable=False),  # JSON: counts, format, canaries; see data/datasets.py
    Column("created_at", Text, nullable=False),
    Column("parents", Text, nullable=False, server_default="[]"),  # JSON: what it was made from
)

models = Table(
    "models",
    KERNEL,
    Column("name", Text, primary_key=True),
    Column("kind", Text, nullable=False),  # "base" or "adapter"
    Column("base", Text, ForeignKey("models.name")),  # adapters only
    Column("location", Text, nullable=False),  # base: folder in the home; adapter: vault object id
    Column("digest", Text, nullable=False),  # SHA-256 over the model's files, hex
    Column("card", Text, nullable=False),  # JSON: source, licence, job, dataset, mechanism
    Column("created_at", Text, nullable=False),
)

budget_pools = Table(
    "budget_pools",
    KERNEL,
    Column("id", Text, primary_key=True),  # the dataset's name, or dataset/purpose
    Column("dataset", Text, ForeignKey("datasets.name"), nullable=False),
    Column("purpose", Text),  # none: every purpose is charged here
    Column("epsilon", Text, nullable=False),  # float.hex of the total budget
    Column("delta", Text, nullable=False),  # float.hex
    Column("neighboring", Text, nullable=False),
    Column("unit_column", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("renyi_order", Text, nullable=False),  # float.hex; fixed when the pool is made
    Column("cap", BigInteger, nullable=False),  # Renyi divergence at that order, in 1e-12 nats
    Column("spent", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    CheckConstraint("spent >= 0 AND held >= 0 AND spent + held <= cap", name="never_overspent"),
)

budget_reservations = Table(
    "budget_reservations",
    KERNEL,
    Column("id", Text, primary_key=True),  # idempotency key: the job's id
    Column("dataset", Text, ForeignKey("datasets.name"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("mechanism", Text, nullable=False),  # JSON; after commit: the mechanism that was run
    Column("steps_done", BigInteger, nullable=False),  # written before anything is released
    Column("state", Text, nullable=False),
    CheckConstraint("state IN ('held', 'committed', 'aborted')", name="known_state"),
    CheckConstraint("steps_done >= 0", name="not_negative"),
)

budget_costs = Table(
    "budget_costs",
    KERNEL,
    Column("reservation", Text, ForeignKey("budget_reservations.id"), primary_key=True),
    Column("pool", Text, ForeignKey("budget_pools.id"), primary_key=True),
    Column("cost", BigInteger, nullable=False),  # held or spent, in 1e-12 nats at the pool's order
    CheckConstraint("cost >= 0", name="cost_not_negative"),
)

budget_events = Table(
    "budget_events",
    KERNEL,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("pool", Text, ForeignKey("budget_pools.id"), nullable=False),
    Column("kind", Text, nullable=False),  # create, raise, reserve, commit or abort
    Column("reference", Text, nullable=False),  # the reservation, the approval of a raise, or ""
    Column("mechanism", Text),  # JSON; none when the cap changed
    Column("cap_change", BigInteger, nullable=False),
    Column("held_change", BigInteger, nullable=False),
    Column("spent_change", BigInteger, nullable=False),
    Column("at", Text, nullable=False),
    sqlite_autoincrement=True,
)

approvals = Table(
    "approvals",
    KERNEL,
    Column("id", Text, primary_key=True),
    Column("act", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("request", Text, nullable=False),  # JSON: what is done when it is approved
    Column("reason", Text, nullable=False),
    Column("proposer", Text, ForeignKey("principals.id"), nullable=False),
    Column("proposed_at", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("decider", Text, ForeignKey("principals.id")),
    Column("decided_at", Text),
    Column("record", Text),  # DSSE envelope of what was approved, signed by the home
    CheckConstraint("state IN ('open', 'approved', 'refused')", name="known_approval_state"),
    CheckConstraint("proposer != decider", name="four_eyes"),
)

jobs = Table(
    "jobs",
    KERNEL,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("principal", Text, nullable=False),
    Column("request", Text, nullable=False),  # JSON; the worker needs nothing else
    Column("state", Text, nullable=False),  # queued, running, done, failed, cancelled
    Column("cancel_requested", Integer, nullable=False),
    Column("checkpoint", Text),  # vault object id of the newest complete checkpoint
    Column("result", Text),  # JSON
    Column("error", Text),
    Column("created_at", Text, nullable=False),
    Column("updated_at", Text, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),  # runs begun so far
    CheckConstraint(
        "state IN ('queued', 'running', 'done', 'failed', 'cancelled')", name="known_job_state"
    ),
)

job_steps = Table(
    "job_steps",
    KERNEL,
    Column("job", Text, ForeignKey("jobs.id"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("result", Text, nullable=False),  # JSON
    Column("at", Text, nullable=False),
)

log_entries = Table(
    "log_entries",
    KERNEL,
    Column("idx", BigInteger, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),  # canonical JSON (RFC 8785)
)

log_nodes = Table(
    "log_nodes",
    KERNEL,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("idx", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),  # RFC 6962 hash of a complete subtree
)

log_checkpoints = Table(
    "log_checkpoints",
    KERNEL,
    Column("size", BigInteger, primary_key=True, autoincrement=False),
    Column("note", Text, nullable=False),  # C2SP signed note
)

log_partners = Table(
    "log_partners",
    KERNEL,
    Column("name", Text, primary_key=True),
    Column("vkey", Text, nullable=False),  # of the partner's log; its cosignatures have that key
    Column("url", Text),  # where it takes checkpoints; none: it is only witnessed
    Column("added_at", Text, nullable=False),
)

witnessed = Table(
    "witnessed",
    KERNEL,
    Column("origin", Text, primary_key=True),  # stays when the partner is removed
    Column("vkey", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("root", LargeBinary, nullable=False),
    Column("at", Text, nullable=False),
)

log_cosignatures = Table(
    "log_cosignatures",
    KERNEL,
    Column("size", BigInteger, primary_key=True, autoincrement=False),  # its checkpoint is kept
    Column("partner", Text, primary_key=True),
    Column("line", Text, nullable=False),  # C2SP tlog-cosignature
)

tenant_keys = Table(
    "tenant_keys",
    KEYS,
    Column("tenant", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("wrapped_key", LargeBinary),  # NULL: destroyed, or version 0, which the root key gives
    Column("created_at", Text, nullable=False),
    Column("retired_at", Text),
)

object_keys = Table(
    "object_keys",
    KEYS,
    Column("object_id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key_version", Integer, nullable=False),
    Column("wrapped_key", LargeBinary, nullable=False),  # nonce 12 | AES-256-GCM of the 32-byte key
    Column("created_at", Text, nullable=False),
    ForeignKeyConstraint(["tenant", "key_version"], [tenant_keys.c.tenant, tenant_keys.c.version]),
    Index("object_keys_of_version", "tenant", "key_version"),
)

sealed_secrets = Table(
    "sealed_secrets",
    KEYS,
    Column("name", Text, primary_key=True),
    # nonce 12 | AES-256-GCM under a key derived from the root key
    Column("sealed", LargeBinary, nullable=False),
)
