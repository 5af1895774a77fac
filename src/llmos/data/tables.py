"""The tables of erasures, in the kernel's transaction domain."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, ForeignKey, Table

from llmos.kernel.schema import KERNEL, STR

erasures: Final = Table(
    "erasures",
    KERNEL,
    Column("object_id", STR, primary_key=True),  # the part of the dataset with the unit's records
    Column("unit", STR, primary_key=True),  # keyed hash
    Column("dataset", STR, ForeignKey("datasets.name"), nullable=False),
    Column("approval", STR, ForeignKey("approvals.id"), nullable=False),
)

erasure_receipts: Final = Table(
    "erasure_receipts",
    KERNEL,
    Column("approval", STR, ForeignKey("approvals.id"), primary_key=True),
    Column("envelope", STR, nullable=False),  # JSON: DSSE
)
