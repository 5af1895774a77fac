"""The tables of kernel.db about parties; migration kernel_0006 must agree."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table

from llmos.kernel.schema import BLOB, INT, KERNEL, STR

party_authority = Table(
    "party_authority",
    KERNEL,
    Column("organisation", STR, primary_key=True),  # a home has one CA
    Column("certificate", STR, nullable=False),  # PEM
    Column("key", STR, nullable=False),  # the vault's secret: PKCS#8 DER
    Column("pepper", STR, nullable=False),  # the vault's secret under which tokens are kept
    Column("crl", STR, nullable=False),  # PEM; the newest
    Column("crl_number", INT, nullable=False),
    Column("clock", STR, nullable=False),  # the latest time at which anything was signed
)

parties = Table(
    "parties",
    KERNEL,
    Column("name", STR, primary_key=True),
    Column("dns", STR, nullable=False),  # JSON list: DNS names that its certificates have
    Column("invited_at", STR, nullable=False),
    Column("revoked_at", STR),
)

party_certificates = Table(
    "party_certificates",
    KERNEL,
    Column("serial", STR, primary_key=True),  # hex
    Column("party", STR, ForeignKey("parties.name"), nullable=False),
    Column("certificate", STR, nullable=False),  # PEM
    Column("issued_at", STR, nullable=False),
    Column("expires_at", STR, nullable=False),
    Column("revoked_at", STR),
    Column("successor", STR, ForeignKey("party_certificates.serial")),  # it is renewed once
)

join_tokens = Table(
    "join_tokens",
    KERNEL,
    Column("id", STR, primary_key=True),
    Column("party", STR, ForeignKey("parties.name"), nullable=False),
    Column("token_hmac", BLOB, nullable=False),  # HMAC-SHA256 under the pepper
    Column("expires_at", STR, nullable=False),
    Column("serial", STR, ForeignKey("party_certificates.serial")),  # none: not used yet
)

trusted_organisations = Table(
    "trusted_organisations",
    KERNEL,
    Column("organisation", STR, primary_key=True),
    Column("bundle", STR, nullable=False),  # PEM: CA certificates and their revocation lists
    Column("added_at", STR, nullable=False),
)

memberships = Table(
    "memberships",
    KERNEL,
    Column("organisation", STR, primary_key=True),
    Column("party", STR, nullable=False),  # this home's name there
    Column("url", STR, nullable=False),
    Column("authority", STR, nullable=False),  # PEM; pinned by the join token
    Column("crl", STR, nullable=False),  # PEM; the newest that was fetched
    Column("key", STR, nullable=False),  # the vault's secret: PKCS#8 DER
    Column("certificate", STR),  # PEM; none: asked for, not received yet
    Column("next_key", STR),  # the vault's secret of a renewal that was begun
)
