"""What is kept of people's passwords and codes, and how often somebody failed to log in."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, delete, insert, select, update

from llmos.accounts.tables import credentials, login_attempts
from llmos.crypto import keys
from llmos.errors import StorageError
from llmos.kernel.schema import api_keys
from llmos.kernel.store import now, timestamp
from llmos.kernel.vault import Vault

LOGIN: Final = "login"  # the label of keys that a login gave
FREE_FAILURES: Final = 5
_FIRST_BAR: Final = timedelta(seconds=30)
_LONGEST_BAR: Final = timedelta(hours=1)
_MOST_DOUBLINGS: Final = 7  # 30 s * 2**7 is longer than an hour
_KEK: Final = "credentials-key"  # a secret of the vault


@dataclass(frozen=True, slots=True)
class Credential:
    """How one person shows who they are."""

    password_hash: str = field(repr=False)
    totp_seed: bytes | None = field(repr=False)
    totp_step: int


def find(conn: Connection, principal_id: str, vault: Vault) -> Credential | None:
    """Return a principal's credential, if it has one.

    Raises:
        TamperedObject: the seed is not the one that was wrapped for this principal.
    """
    query = select(credentials).where(credentials.c.principal_id == principal_id)
    row = conn.execute(query).one_or_none()
    if row is None:
        return None
    seed = row.totp_seed
    if seed is not None:
        seed = keys.unwrap(_kek(vault), seed, principal_id.encode())
    return Credential(row.password_hash, seed, row.totp_step)


def enrolled(conn: Connection) -> dict[str, bool]:
    """Return the ids of who has a password, and whether codes are asked for too."""
    query = select(credentials.c.principal_id, credentials.c.totp_seed.is_not(None))
    return {principal_id: bool(codes) for principal_id, codes in conn.execute(query)}


def set_password(conn: Connection, principal_id: str, password_hash: str) -> None:
    """Put a password in the place of the one that was there; codes stay as they are."""
    mine = credentials.c.principal_id == principal_id
    changed = conn.execute(update(credentials).where(mine).values(password_hash=password_hash))
    if not changed.rowcount:
        row = {"principal_id": principal_id, "password_hash": password_hash, "totp_step": 0}
        conn.execute(insert(credentials).values(**row))


def end_logins(conn: Connection, principal_id: str, *, but: str | None) -> int:
    """Revoke the keys that a person's logins gave, all but one; return how many there were."""
    own = (api_keys.c.principal_id == principal_id) & (api_keys.c.label == LOGIN)
    valid = own & api_keys.c.revoked_at.is_(None) & api_keys.c.id.is_distinct_from(but)
    return conn.execute(update(api_keys).where(valid).values(revoked_at=now())).rowcount


def set_seed(
    conn: Connection, principal_id: str, seed: bytes | None, step: int, vault: Vault
) -> bool:
    """Ask for codes of this seed from now on, or for none; False when there is no password.

    Args:
        conn: an open transaction.
        principal_id: whose.
        seed: as the person's app has it, or None.
        step: of the code that showed this; it is used.
        vault: has the key that wraps it.
    """
    wrapped = None if seed is None else keys.wrap(_kek(vault), seed, principal_id.encode())
    mine = update(credentials).where(credentials.c.principal_id == principal_id)
    return bool(conn.execute(mine.values(totp_seed=wrapped, totp_step=step)).rowcount)


def use_step(conn: Connection, principal_id: str, step: int) -> bool:
    """Use a time step up; False when it, or a later one, was used before."""
    fresh = (credentials.c.principal_id == principal_id) & (credentials.c.totp_step < step)
    return bool(conn.execute(update(credentials).where(fresh).values(totp_step=step)).rowcount)


def begin_attempt(conn: Connection, subject: str, at: datetime) -> int | None:
    """Count an attempt as failed before it is checked, so that attempts at once are all counted.

    After a few failures in a row a subject is barred, each time for twice as long.

    Returns:
        How many failures that makes in a row, or None when the subject is barred.
    """
    query = select(login_attempts).where(login_attempts.c.subject == subject)
    row = conn.execute(query).one_or_none()
    if row is not None and row.barred_until is not None and row.barred_until > timestamp(at):
        return None
    failures = 1 if row is None else row.failures + 1
    until = None
    if failures >= FREE_FAILURES:
        doublings = min(failures - FREE_FAILURES, _MOST_DOUBLINGS)
        until = timestamp(at + min(_FIRST_BAR * 2**doublings, _LONGEST_BAR))
    end_attempts(conn, subject)
    row_values = {"subject": subject, "failures": failures, "barred_until": until}
    conn.execute(insert(login_attempts).values(**row_values))
    return failures


def end_attempts(conn: Connection, subject: str) -> None:
    """Forget a subject's failures: somebody has logged in."""
    conn.execute(delete(login_attempts).where(login_attempts.c.subject == subject))


def _kek(vault: Vault) -> bytes:
    """Return the key that wraps seeds; a home gets it when it is needed first."""
    try:
        return vault.secret(_KEK)
    except StorageError:
        vault.seal_secret(_KEK, keys.generate_key())
        return vault.secret(_KEK)
