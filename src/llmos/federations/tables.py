"""The tables of kernel.db about federated jobs; migrations kernel_0009 and 0010 must agree."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table

from llmos.kernel.schema import INT, KERNEL, STR

# What this home coordinates.
federated_jobs = Table(
    "federated_jobs",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("principal", STR, nullable=False),
    Column("envelope", STR, nullable=False),  # JSON: the signed manifest
    Column("validation", STR),  # this home's own dataset that the global model is tried on
    Column("state", STR, nullable=False),
    Column("rounds_done", INT, nullable=False),
    Column("checkpoint", STR),  # vault object id; none: before the first round
    Column("error", STR),
    Column("status", STR),  # JSON: the round under way, as far as this process has told
    Column("created_at", STR, nullable=False),
    Column("updated_at", STR, nullable=False),
)

federated_answers = Table(
    "federated_answers",
    KERNEL,
    Column("job", STR, ForeignKey("federated_jobs.id"), primary_key=True),
    Column("site", STR, primary_key=True),  # SPIFFE ID
    Column("envelope", STR, nullable=False),  # JSON: what the site signed last
    Column("at", STR, nullable=False),
)

federated_rounds = Table(
    "federated_rounds",
    KERNEL,
    Column("job", STR, ForeignKey("federated_jobs.id"), primary_key=True),
    Column("round", INT, primary_key=True),
    Column("facts", STR, nullable=False),  # JSON: sites, bytes, seconds, hashes
    Column("at", STR, nullable=False),
    Column("loss", STR),  # JSON: nats a token of the global model, on the coordinator's own data
)

federated_statements = Table(
    "federated_statements",
    KERNEL,
    Column("job", STR, ForeignKey("federated_jobs.id"), primary_key=True),
    Column("site", STR, primary_key=True),
    Column("part", STR, nullable=False),  # JSON: statement, signatures and proofs, as it was sent
    Column("at", STR, nullable=False),
)

# What this home is asked as a site.
coordinators = Table(
    "coordinators",
    KERNEL,
    Column("organisation", STR, primary_key=True),
    Column("keys", STR, nullable=False),  # its public keys as of the first contact
)

site_jobs = Table(
    "site_jobs",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("organisation", STR, nullable=False),  # whose coordinator asks
    Column("envelope", STR, nullable=False),  # JSON: the signed manifest
    Column("state", STR, nullable=False),
    Column("decider", STR),  # principal id of the steward who approved, refused or withdrew
    Column("reason", STR),
    Column("plan", STR),  # JSON: what is admitted and charged; none: nothing was held for it
    Column("update_round", INT),  # the round whose update is kept until it is delivered
    Column("update_object", STR),  # vault object id
    Column("released", STR),  # JSON: the sites of the sum that shares were given to unmask
    Column("created_at", STR, nullable=False),
    Column("updated_at", STR, nullable=False),
)
