"""Who is asking: principals with roles, and the API keys that stand for them."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import string
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Connection, Row, insert, select, update

from llmos.errors import (
    AuthenticationError,
    PrincipalExists,
    RequestError,
    StorageError,
    UnknownKey,
    UnknownPrincipal,
)
from llmos.kernel.schema import api_keys, principals
from llmos.kernel.store import Store, now, timestamp

ALL_MODELS: Final = "*"
_BASE62: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_DIGITS: Final = 8
_SECRET_DIGITS: Final = 43  # 62**43 > 2**256
_TOKEN: Final = re.compile(r"llmos_([0-9A-Za-z]{8})_[0-9A-Za-z]{43}")
_PEPPER_BYTES: Final = 32
_NOBODY: Final = bytes(32)  # compared with when the id is unknown; no HMAC is ever all zeros
_USE_PRECISION: Final = timedelta(minutes=1)  # uses within it are not written again


class Role(StrEnum):
    """What a principal is trusted with; the policies say what that means."""

    ADMINISTRATOR = "administrator"
    STEWARD = "steward"
    ENGINEER = "engineer"
    DEVELOPER = "developer"
    AUDITOR = "auditor"
    SITE = "site"  # a partner organisation


class Kind(StrEnum):
    """Who is behind a principal; only people count where two people are needed."""

    PERSON = "person"
    SERVICE = "service"


@dataclass(frozen=True, slots=True)
class Principal:
    """Someone who acts. Only the API key that was used narrows models, actions and purpose."""

    id: str
    name: str
    roles: frozenset[Role]
    models: frozenset[str] | None = None  # None means every model
    key_id: str | None = None  # the API key that was used, if one was
    actions: frozenset[str] | None = None  # None means every action
    purpose: str | None = None  # None means every purpose
    kind: Kind = Kind.PERSON
    tenant: str | None = None  # the part of the organisation whose budget their jobs use as well


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """A new API key; the token is shown once and stored nowhere."""

    id: str
    token: str = field(repr=False)


class Identity:
    """The principals and API keys of one home.

    A token is 32 random bytes, so its HMAC-SHA256 under a secret pepper is enough to store: unlike
    a password it cannot be guessed, and without the pepper the table cannot even be searched.
    """

    def __init__(self, store: Store, pepper: bytes) -> None:
        """Keep the 32-byte pepper under which token digests are stored.

        Raises:
            AuthenticationError: the pepper does not have 32 bytes.
        """
        if len(pepper) != _PEPPER_BYTES:
            raise AuthenticationError(f"the pepper must have {_PEPPER_BYTES} bytes")
        self._store = store
        self._pepper = pepper

    def add_principal(
        self, conn: Connection, name: str, roles: frozenset[Role], kind: Kind = Kind.PERSON
    ) -> Principal:
        """Add a person, or a program, who may act.

        Raises:
            PrincipalExists: the name is taken, also by someone who was disabled.
        """
        if conn.execute(select(principals.c.id).where(principals.c.name == name)).first():
            raise PrincipalExists(
                f"there is a principal {name!r} already", hint="choose another name"
            )
        principal = Principal(secrets.token_hex(8), name, roles, kind=kind)
        row = {"id": principal.id, "name": name, "kind": kind, "created_at": now()}
        conn.execute(insert(principals).values(**row, roles=json.dumps(sorted(roles))))
        return principal

    def disable_principal(self, conn: Connection, name: str) -> None:
        """Refuse this principal, and all of its keys, from now on.

        Raises:
            UnknownPrincipal: there is none of this name.
        """
        _change_principal(conn, name, disabled_at=now())

    def set_roles(self, conn: Connection, name: str, roles: frozenset[Role]) -> None:
        """Trust a principal with these roles and no others from now on.

        Raises:
            UnknownPrincipal: there is none of this name.
        """
        _change_principal(conn, name, roles=json.dumps(sorted(roles)))

    def set_tenant(self, conn: Connection, name: str, tenant: str | None) -> None:
        """Count the jobs that a principal plans from now on for this tenant, or for none.

        Raises:
            UnknownPrincipal: there is none of this name.
        """
        _change_principal(conn, name, tenant=tenant)

    def principal(self, name: str) -> Principal:
        """Return a principal by name, for callers whom the home's own key has authenticated.

        Raises:
            UnknownPrincipal: there is none of this name.
            AuthenticationError: it was disabled.
        """
        with self._store.read() as conn:
            row = conn.execute(select(principals).where(principals.c.name == name)).one_or_none()
        if row is None:
            raise _unknown(name)
        if row.disabled_at is not None:
            raise AuthenticationError(f"{name} was disabled", hint="ask an administrator")
        return _principal(row)

    def principals(self) -> tuple[Principal, ...]:
        """Return all principals that were not disabled, by name."""
        enabled = select(principals).where(principals.c.disabled_at.is_(None))
        with self._store.read() as conn:
            return tuple(_principal(row) for row in conn.execute(enabled.order_by("name")))

    def create_key(
        self,
        conn: Connection,
        principal: Principal,
        label: str,
        models: frozenset[str] | None,
        expires_at: datetime | None,
        *,
        actions: frozenset[str] | None = None,
        purpose: str | None = None,
    ) -> IssuedKey:
        """Issue an API key; `models`, `actions` and `purpose` narrow what its owner may do with it.

        Raises:
            RequestError: the expiry has no time zone.
        """
        if expires_at is not None and expires_at.tzinfo is None:
            raise RequestError("the expiry of a key needs a time zone, such as a Z at its end")
        key_id = "".join(secrets.choice(_BASE62) for _ in range(_ID_DIGITS))
        token = f"llmos_{key_id}_{_base62(secrets.token_bytes(32))}"
        conn.execute(
            insert(api_keys).values(
                id=key_id,
                principal_id=principal.id,
                label=label,
                secret_hmac=self._digest(token),
                models=json.dumps([ALL_MODELS] if models is None else sorted(models)),
                actions=None if actions is None else json.dumps(sorted(actions)),
                purpose=purpose,
                created_at=now(),
                expires_at=None if expires_at is None else timestamp(expires_at),
            )
        )
        return IssuedKey(key_id, token)

    def authenticate(self, token: str) -> Principal:
        """Return who holds this token.

        Raises:
            AuthenticationError: it is malformed, unknown, revoked or expired, or its principal was
                disabled; the message is the same for all of them.
        """
        match = _TOKEN.fullmatch(token)
        row = None if match is None else self._key_row(match.group(1))
        genuine = hmac.compare_digest(
            _NOBODY if row is None else row.secret_hmac, self._digest(token)
        )
        if (
            row is None
            or not genuine
            or row.revoked_at is not None
            or row.disabled_at is not None
            or (row.expires_at is not None and row.expires_at <= now())
        ):
            raise AuthenticationError(
                "the API key is not valid", hint="`llmos key create` makes a new one"
            )
        self._note_use(row)
        return _principal(row, key_id=row.key_id, **narrowed(row))

    def _note_use(self, row: Row[*tuple[Any, ...]]) -> None:
        """Write when a key was used, coarsely; waits for nobody and fails no request."""
        if (row.last_used_at or "") > timestamp(datetime.now(UTC) - _USE_PRECISION):
            return
        with suppress(StorageError), self._store.transaction(wait=False) as conn:
            used = update(api_keys).where(api_keys.c.id == row.key_id)
            conn.execute(used.values(last_used_at=now()))

    def end_key(self, conn: Connection, key_id: str, at: datetime) -> None:
        """Let a key expire at `at`, if it does not expire before."""
        end, expires = timestamp(at), api_keys.c.expires_at
        later = (api_keys.c.id == key_id) & (expires.is_(None) | (expires > end))
        conn.execute(update(api_keys).where(later).values(expires_at=end))

    def revoke_key(self, conn: Connection, key_id: str) -> None:
        """Refuse this key from now on; revoking again changes nothing.

        Raises:
            UnknownKey: there is no key of this id.
        """
        known = conn.execute(select(api_keys.c.id).where(api_keys.c.id == key_id)).first()
        if known is None:
            raise UnknownKey(f"there is no API key {key_id!r}", hint="`llmos key ls` lists them")
        still_valid = (api_keys.c.id == key_id) & api_keys.c.revoked_at.is_(None)
        conn.execute(update(api_keys).where(still_valid).values(revoked_at=now()))

    def _key_row(self, key_id: str) -> Row[*tuple[Any, ...]] | None:
        own = ("secret_hmac", "models", "actions", "purpose")
        times = ("expires_at", "revoked_at", "last_used_at")
        of_key = [api_keys.c.id.label("key_id"), *(api_keys.c[name] for name in own + times)]
        query = select(*of_key, *principals.c).join(principals).where(api_keys.c.id == key_id)
        with self._store.read() as conn:
            return conn.execute(query).one_or_none()

    def _digest(self, token: str) -> bytes:
        return hmac.digest(self._pepper, token.encode(errors="surrogatepass"), "sha256")


def _principal(row: Row[*tuple[Any, ...]], **limits: Any) -> Principal:  # noqa: ANN401
    roles = frozenset(Role(role) for role in json.loads(row.roles))
    return Principal(row.id, row.name, roles, kind=Kind(row.kind), tenant=row.tenant, **limits)


def _change_principal(conn: Connection, name: str, **values: str | None) -> None:
    changed = conn.execute(update(principals).where(principals.c.name == name).values(**values))
    if not changed.rowcount:
        raise _unknown(name)


def narrowed(row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    """Return what a key covers; None is everything."""
    models = frozenset(json.loads(row.models))
    actions = None if row.actions is None else frozenset(json.loads(row.actions))
    everything = ALL_MODELS in models
    return {"models": None if everything else models, "actions": actions, "purpose": row.purpose}


def _unknown(name: str) -> UnknownPrincipal:
    return UnknownPrincipal(f"there is no principal {name!r}", hint="`llmos user ls` lists them")


def _base62(secret: bytes) -> str:
    """Write 32 bytes as 43 base-62 digits."""
    number, digits = int.from_bytes(secret, "big"), []
    for _ in range(_SECRET_DIGITS):
        number, digit = divmod(number, len(_BASE62))
        digits.append(_BASE62[digit])
    return "".join(digits)
