"""The table of models, in the kernel's transaction domain."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table

from llmos.kernel.schema import KERNEL, STR

models = Table(
    "models",
    KERNEL,
    Column("name", STR, primary_key=True),
    Column("kind", STR, nullable=False),  # "base" or "adapter"
    Column("base", STR, ForeignKey("models.name")),  # adapters only
    Column("location", STR, nullable=False),  # base: folder in the home; adapter: vault object id
    Column("digest", STR, nullable=False),  # SHA-256 over the model's files, hex
    Column("card", STR, nullable=False),  # JSON: source, licence, job, dataset, mechanism
    Column("created_at", STR, nullable=False),
)
