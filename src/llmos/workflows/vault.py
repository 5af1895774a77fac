"""Rotate the vault's tenant key, change how the root key is kept, show the keys' versions."""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import func, select

from llmos.config import Config
from llmos.crypto.root_keys import KeyFile, RootKeyProvider
from llmos.kernel import root
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.schema import object_keys, tenant_keys
from llmos.workflows.parts import Parts


def rotate(who: Principal, parts: Parts) -> dict[str, int]:
    """Wrap every object's key under a new version of the tenant key and destroy the old ones.

    The log says that it was begun and that it has ended; in between other work goes on, and what
    was cut off has no end there. Then this finishes it, and does not begin another one.

    Raises:
        PermissionDenied: policy does not allow it; the denial is recorded.
        TamperedObject: an object's key cannot be opened; the old version stays.
        StorageError: someone is reading, so that the old keys are on the disk still; run it again.
    """
    keyring, home = parts.kernel.vault.keyring, parts.kernel.home
    begun: dict[str, Any] = {"act": "rotate", "stage": "begin"}
    with parts.kernel.monitor.act(who, Action.MANAGE_VAULT, home, details=begun):
        begun["version"] = keyring.begin()
    ended: dict[str, Any] = {"act": "rotate", "stage": "end", "version": begun["version"]}
    ended["rewrapped"] = sum(iter(keyring.rewrap, 0))
    ended["retired"] = keyring.retire()  # outside of a transaction: it waits until all have ended
    with parts.kernel.monitor.act(who, Action.MANAGE_VAULT, home, details=ended):
        pass
    return {name: ended[name] for name in ("version", "rewrapped", "retired")}


def rekey(
    to: RootKeyProvider, who: Principal, parts: Parts, *, ask: root.Ask | None = None
) -> None:
    """Let another provider keep the root key; all that it opens stays as it is.

    A failure leaves no key file in the clear behind. After a crash `llmos doctor` finds one, and
    this, done again, uses or removes it.

    Raises:
        PermissionDenied: policy does not allow it; the denial is recorded.
        WrongPassphrase, TokenUnavailable: the old or the new provider does not open.
        HomeExists, IntegrityError, StorageError: the new one cannot keep it; the old one does.
    """
    config = parts.kernel.config
    root_key = root.unlock(config, ask=ask)
    details = {"act": "rekey", "to": type(to).__name__}
    with parts.kernel.monitor.act(who, Action.MANAGE_VAULT, parts.kernel.home, details=details):
        is_new = isinstance(to, KeyFile) and not to.path.exists()
        try:
            root.write(config.home, to, root_key)
        except BaseException:
            if isinstance(to, KeyFile) and is_new and way(config) != "key-file":
                to.path.unlink(missing_ok=True)
            raise


def way(config: Config) -> str:
    """Return what keeps the root key of a home that opens: key-file, passphrase or pkcs11."""
    return str(json.loads((config.home / "root.json").read_bytes())["provider"])


def versions(parts: Parts) -> list[dict[str, Any]]:
    """Return each version of a tenant's key and how many objects it opens, oldest first."""
    columns = [tenant_keys.c[name] for name in ("tenant", "version", "created_at", "retired_at")]
    objects = func.count(object_keys.c.object_id).label("objects")
    counted = select(*columns, objects).outerjoin(object_keys).group_by(*columns)
    with parts.kernel.vault.keyring.store.read() as conn:
        rows = conn.execute(counted.order_by(*columns[:2])).mappings()
        return [dict(row) for row in rows]
