"""Which policies are in force: kernel.db keeps every version, the settings name one by its digest.

The files in the home's folder `policy` are a draft: to change one of them changes nothing until two
people have put it in force (`workflows.change_policy`).
"""

from __future__ import annotations

import json
from typing import Final

from sqlalchemy import Connection, delete, insert, select

from llmos.errors import IntegrityError
from llmos.kernel.policy import Policy
from llmos.kernel.schema import policy_versions, settings

_SETTING: Final = "policy"


def keep(conn: Connection, policy: Policy) -> None:
    """Keep a version, so that it can be put in force and read for ever."""
    known = select(policy_versions).where(policy_versions.c.digest == policy.digest)
    if conn.execute(known).first() is None:
        files = json.dumps(dict(policy.files))
        conn.execute(insert(policy_versions).values(digest=policy.digest, files=files))


def enact(conn: Connection, digest: str) -> None:
    """Put a version that is kept in force; a running process goes on with its own until it ends."""
    conn.execute(delete(settings).where(settings.c.name == _SETTING))
    conn.execute(insert(settings).values(name=_SETTING, value=digest))


def in_force(conn: Connection) -> Policy | None:
    """Return the policies in force; None in a home made before there were versions.

    Raises:
        IntegrityError: they are not those of the digest.
        PolicyError: they do not fit the schema of this version of LLMOS.
    """
    named = select(settings.c.value).where(settings.c.name == _SETTING)
    digest = conn.execute(named).scalar()
    return None if digest is None else version(conn, digest)


def version(conn: Connection, digest: str) -> Policy:
    """Return the version of a digest.

    Raises:
        IntegrityError: there is none, or it is not what was kept.
        PolicyError: it does not fit the schema of this version of LLMOS.
    """
    kept = select(policy_versions.c.files).where(policy_versions.c.digest == digest)
    policy = Policy.parse(json.loads(conn.execute(kept).scalar() or "{}"))
    if policy.digest != digest:
        raise IntegrityError("the policies in kernel.db were changed", hint="restore a backup")
    return policy
