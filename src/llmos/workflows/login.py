"""Log in: a password, and a code where one is asked for, become an API key for some hours.

Whatever is wrong, the answer is the same and takes the same work: names cannot be guessed by it.
Failures are counted for each person, and for all unknown names in a few buckets, so that neither
guessing nor filling the log goes on for long.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from llmos.accounts import credentials, passwords, totp
from llmos.accounts.credentials import Credential
from llmos.crypto import keys
from llmos.errors import AuthenticationError, StorageError, UnknownPrincipal
from llmos.kernel.identity import IssuedKey, Kind, Principal
from llmos.kernel.policy import Action
from llmos.kernel.schema import standing_digest
from llmos.kernel.store import now
from llmos.workflows.parts import Parts

LIFETIME: Final = timedelta(hours=12)
_TOKEN_PREFIX: Final = b"llmos_"
_BUCKETS: Final = 64  # of names that nobody has


def run(name: str, password: str, code: str, parts: Parts) -> IssuedKey:
    """Return an API key that expires after `LIFETIME`.

    Raises:
        AuthenticationError: name, password or code is wrong, or there were too many attempts;
            recorded, unless it is barred already.
        PermissionDenied: policy does not let this person log in.
    """
    kernel, at = parts.kernel, datetime.now(UTC)
    name = name.encode(errors="replace").decode()  # halves of characters can come out of JSON
    who, credential = _look_up(name, parts)
    subject = _bucket(name) if who is None else who.id
    with kernel.store.transaction() as conn:
        failures = credentials.begin_attempt(conn, subject, at)
    right = passwords.verify(None if credential is None else credential.password_hash, password)
    step = _step(credential, code, at)
    if failures is None:
        raise refusal()
    if who is None or credential is None or step is None or not right:
        _record_failure(who, failures, parts)
        raise refusal()
    factor = {"second_factor": "none" if credential.totp_seed is None else "totp"}
    details: dict[str, Any] = {"act": "login", **factor}
    with kernel.monitor.act(
        who, Action.LOGIN, kernel.home, details=details, context=factor
    ) as conn:
        _use(conn, who, credential, step)
        credentials.end_attempts(conn, subject)
        issued = kernel.identity.create_key(conn, who, credentials.LOGIN, None, at + LIFETIME)
        details["issued"] = issued.id
    return issued


def check_place(file: Path) -> None:
    """Refuse a place for a key where something else lies already.

    Raises:
        StorageError: it cannot be read, or holds no API key.
    """
    try:
        if file.exists() and not file.read_bytes().startswith(_TOKEN_PREFIX):
            raise StorageError(f"{file} is there and holds no API key", hint="name another file")
    except OSError as error:
        raise StorageError.of(error, str(file)) from error


def write_key(file: Path, issued: IssuedKey) -> None:
    """Write a key into a file that only its owner can read, in the place of an older one.

    Raises:
        StorageError: it cannot be written; what was there before is unchanged.
    """
    draft = file.with_name(f".{file.name}.{issued.id}")
    try:
        keys.write_private(draft, f"{issued.token}\n".encode())
        draft.replace(file)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise StorageError.of(error, str(file)) from error


def prove(who: Principal, password: str, parts: Parts) -> None:
    """Check the present password of someone who changes it; they may have none yet.

    Raises:
        AuthenticationError: it is another one, or there were too many attempts.
    """
    _, credential = _look_up(who.name, parts)
    if credential is None:
        return
    with parts.kernel.store.transaction() as conn:
        failures = credentials.begin_attempt(conn, who.id, datetime.now(UTC))
    right = passwords.verify(credential.password_hash, password)
    if failures is None:
        raise refusal()
    if not right:
        _record_failure(who, failures, parts)
        raise refusal()
    with parts.kernel.store.transaction() as conn:
        credentials.end_attempts(conn, who.id)


def refusal() -> AuthenticationError:
    """Return the one error of every login that fails."""
    return AuthenticationError(
        "name, password or code is not right, or there were too many attempts",
        hint="wait and try again; an administrator can set a new password: `llmos user password`",
    )


def _look_up(name: str, parts: Parts) -> tuple[Principal | None, Credential | None]:
    """Return a person and how they show who they are; nothing for those who cannot log in."""
    kernel = parts.kernel
    try:
        who = kernel.identity.principal(name)
    except (UnknownPrincipal, AuthenticationError):
        return None, None
    if who.kind is not Kind.PERSON:
        return None, None
    with kernel.store.read() as conn:
        return who, credentials.find(conn, who.id, kernel.vault)


def _step(credential: Credential | None, code: str, at: datetime) -> int | None:
    """Return the time step of a right code, 0 where none is asked for, None when it is wrong."""
    if credential is None or credential.totp_seed is None:
        return 0
    seed, used = credential.totp_seed, credential.totp_step
    return totp.matching_step(seed, code, at.timestamp(), after=used)


def _use(conn: Connection, who: Principal, credential: Credential, step: int) -> None:
    """Use the code up; two processes may have been given the same one at once."""
    if credential.totp_seed is not None and not credentials.use_step(conn, who.id, step):
        raise refusal()


def _record_failure(who: Principal | None, failures: int, parts: Parts) -> None:
    """Record that someone could not log in; a name that nobody has is not written down."""
    kernel = parts.kernel
    entry = {
        "v": 1,
        "at": now(),
        "actor": "unknown" if who is None else who.name,
        "action": str(Action.LOGIN),
        "resource": str(kernel.home),
        "outcome": "denied",
        "details": {"failures": failures, "policies": []},
    }
    with kernel.store.transaction() as conn:
        kernel.auditlog.append(conn, entry | {"state": standing_digest(conn)})


def _bucket(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return f"unknown-{digest[0] % _BUCKETS}"
