"""People and programs: add, disable, change roles, passwords and codes; rotate their keys."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from llmos.accounts import api_keys, credentials, passwords, totp
from llmos.data.terms import check_name
from llmos.errors import AuthenticationError, ConfigError, RequestError, UnknownKey
from llmos.kernel.identity import IssuedKey, Kind, Principal, Role
from llmos.kernel.policy import Action
from llmos.kernel.store import timestamp
from llmos.workflows import login
from llmos.workflows.parts import Parts


def add(
    name: str,
    roles: frozenset[str],
    kind: Kind,
    who: Principal,
    parts: Parts,
    *,
    tenant: str | None = None,
) -> Principal:
    """Add a person, or a program, with roles.

    Raises:
        ConfigError: a role is unknown.
        DataError: the tenant's name is none.
        PrincipalExists: the name is taken.
    """
    kernel = parts.kernel
    details = {"user": name, "roles": sorted(roles), "kind": str(kind), "tenant": tenant}
    with kernel.monitor.act(who, Action.MANAGE_KEYS, kernel.home, details=details) as conn:
        added = kernel.identity.add_principal(conn, name, _roles(roles), kind)
        if tenant is not None:
            kernel.identity.set_tenant(conn, name, _tenant(tenant))
    return replace(added, tenant=tenant)


def set_roles(name: str, roles: frozenset[str], who: Principal, parts: Parts) -> None:
    """Trust a principal with these roles and no others.

    Raises:
        ConfigError: a role is unknown.
        UnknownPrincipal: there is none of this name.
        RequestError: nobody would be left who may manage users and keys.
    """
    kernel = parts.kernel
    details = {"act": "roles", "of": name, "roles": sorted(roles)}
    with kernel.monitor.act(who, Action.MANAGE_KEYS, kernel.home, details=details) as conn:
        if Role.ADMINISTRATOR not in _roles(roles):
            _require_another_administrator(name, parts)
        kernel.identity.set_roles(conn, name, _roles(roles))


def set_tenant(name: str, tenant: str | None, who: Principal, parts: Parts) -> None:
    """Let the jobs that a principal plans from now on count for a tenant, or for none.

    Raises:
        DataError: the tenant's name is none.
        UnknownPrincipal: there is none of this name.
    """
    kernel = parts.kernel
    details = {"act": "tenant", "of": name, "tenant": tenant}
    with kernel.monitor.act(who, Action.MANAGE_KEYS, kernel.home, details=details) as conn:
        kernel.identity.set_tenant(conn, name, _tenant(tenant))


def disable(name: str, who: Principal, parts: Parts) -> None:
    """Refuse a principal and all of its keys from now on; for ever.

    Raises:
        UnknownPrincipal: there is none of this name.
        RequestError: nobody would be left who may manage users and keys.
    """
    kernel = parts.kernel
    details = {"act": "disable", "of": name}
    with kernel.monitor.act(who, Action.MANAGE_KEYS, kernel.home, details=details) as conn:
        _require_another_administrator(name, parts)
        kernel.identity.disable_principal(conn, name)


def set_password(
    name: str, password: str, who: Principal, parts: Parts, *, present: str = ""
) -> None:
    """Give a person a new password; who changes their own shows the present one.

    The keys of their logins end, but for the one that asks.

    Raises:
        RequestError: it is weak, or this is no person.
        AuthenticationError: `present` is wrong.
        PermissionDenied: policy does not let `who` log in, or change others' passwords.
    """
    kernel = parts.kernel
    owner = _person(name, parts)
    password_hash = passwords.hash_password(name, password)
    action, context = _right(owner, who)
    if owner.id == who.id:
        login.prove(who, present, parts)
    details: dict[str, Any] = {"act": "password", "of": name}
    with kernel.monitor.act(who, action, kernel.home, details=details, context=context) as conn:
        credentials.set_password(conn, owner.id, password_hash)
        details["ended_logins"] = credentials.end_logins(conn, owner.id, but=who.key_id)
        credentials.end_attempts(conn, owner.id)


def set_codes(
    name: str, seed: bytes | None, code: str, who: Principal, parts: Parts, *, present: str = ""
) -> None:
    """Ask a person for codes of this seed too, or with None for none; `code` shows their app works.

    Raises:
        RequestError: the person has no password yet, or this is no person.
        AuthenticationError: the code or `present` is wrong.
        PermissionDenied: policy does not let `who` log in, or change others' passwords.
    """
    kernel = parts.kernel
    owner = _person(name, parts)
    action, context = _right(owner, who)
    at_s = datetime.now(UTC).timestamp()
    step = 0 if seed is None else totp.matching_step(seed, code, at_s, after=0)
    if step is None:
        raise AuthenticationError("this is not the present code", hint="check the clocks")
    if owner.id == who.id:
        login.prove(who, present, parts)
    details = {"act": "codes", "of": name, "asked_for": seed is not None}
    with kernel.monitor.act(who, action, kernel.home, details=details, context=context) as conn:
        if not credentials.set_seed(conn, owner.id, seed, step, kernel.vault):
            raise RequestError(f"{name} has no password", hint=f"llmos user password {name}")


def has_password(name: str, parts: Parts) -> bool:
    """Tell whether a principal has a password."""
    owner = parts.kernel.identity.principal(name)
    with parts.kernel.store.read() as conn:
        return owner.id in credentials.enrolled(conn)


def overview(parts: Parts) -> list[dict[str, Any]]:
    """Return a line for each principal that was not disabled, by name."""
    with parts.kernel.store.read() as conn:
        enrolled = credentials.enrolled(conn)
    shown = {None: "no", False: "password", True: "password and code"}
    return [
        {
            "name": principal.name,
            "kind": str(principal.kind),
            "roles": sorted(principal.roles),
            "tenant": principal.tenant,
            "login": shown[enrolled.get(principal.id)],
        }
        for principal in parts.kernel.identity.principals()
    ]


def rotate_key(key_id: str, overlap: timedelta, who: Principal, parts: Parts) -> IssuedKey:
    """Issue a key with the same rights and lifetime; the old one ends after the overlap.

    Raises:
        UnknownKey: there is no such key, or it was revoked or has expired.
        RequestError: the overlap is negative.
    """
    kernel, at = parts.kernel, datetime.now(UTC)
    if overlap < timedelta(0):
        raise RequestError("an overlap cannot be negative")
    with kernel.store.read() as conn:
        old = next((key for key in api_keys.issued(conn) if key.id == key_id), None)
    if old is None or old.revoked_at is not None or _expired(old, at):
        raise UnknownKey(f"there is no valid API key {key_id!r}", hint="`llmos key ls` lists them")
    owner = kernel.identity.principal(old.principal)
    details: dict[str, Any] = {"owner": owner.name, "rotate": old.id}
    with kernel.monitor.act(who, Action.MANAGE_KEYS, kernel.home, details=details) as conn:
        issued = kernel.identity.create_key(
            conn,
            owner,
            old.label,
            old.models,
            _expiry(old, at),
            actions=old.actions,
            purpose=old.purpose,
        )
        kernel.identity.end_key(conn, old.id, at + overlap)
        details["issued"] = issued.id
    return issued


def _expired(key: api_keys.ApiKey, at: datetime) -> bool:
    return key.expires_at is not None and key.expires_at <= timestamp(at)


def _expiry(old: api_keys.ApiKey, at: datetime) -> datetime | None:
    """Let the new key live as long as the old one was to."""
    if old.expires_at is None:
        return None
    made, expires = map(datetime.fromisoformat, (old.created_at, old.expires_at))
    return at + (expires - made)


def _right(owner: Principal, who: Principal) -> tuple[Action, dict[str, str]]:
    """Return what changing a password or codes takes: for one's own, the right to log in."""
    if owner.id == who.id:
        return Action.LOGIN, {"second_factor": "none"}
    return Action.MANAGE_KEYS, {}


def _person(name: str, parts: Parts) -> Principal:
    owner = parts.kernel.identity.principal(name)
    if owner.kind is not Kind.PERSON:
        raise RequestError(f"{name} is a service account; it has keys only, no password")
    return owner


def _tenant(tenant: str | None) -> str | None:
    return None if tenant is None else check_name(tenant, "a tenant")


def _roles(roles: frozenset[str]) -> frozenset[Role]:
    if unknown := sorted(roles - set(Role)):
        raise ConfigError(f"unknown role {unknown[0]!r}", hint=f"one of: {', '.join(Role)}")
    return frozenset(Role(role) for role in roles)


def _require_another_administrator(name: str, parts: Parts) -> None:
    others = (p for p in parts.kernel.identity.principals() if p.name != name)
    if not any(Role.ADMINISTRATOR in other.roles for other in others):
        raise RequestError(
            f"without {name} the home would have no administrator",
            hint="make someone else one first: llmos user roles NAME --role administrator",
        )
