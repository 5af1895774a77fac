"""The kernel of one home: made once by `create`, opened by `open_kernel`, passed down from it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import rfc8785
from sqlalchemy import insert, select

from llmos.config import Config
from llmos.crypto import keys
from llmos.crypto.notes import NoteKey
from llmos.errors import ConfigError, HomeExists, HomeMissing, IntegrityError, WrongPassphrase
from llmos.kernel import schema
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.budget import Budget
from llmos.kernel.identity import Identity, Principal, Role
from llmos.kernel.jobs import Jobs
from llmos.kernel.monitor import Monitor
from llmos.kernel.policy import Policy
from llmos.kernel.store import Store, now
from llmos.kernel.vault import Vault

_CERTIFICATE_KEY: Final = "certificate-key"
_LOG_KEY: Final = "log-key"
_PEPPER: Final = "api-key-pepper"
_ROOT_DESCRIPTION: Final = "root.json"


@dataclass(frozen=True, slots=True)
class Kernel:
    """Everything that decides, pays and records for one home."""

    config: Config
    home_id: str
    store: Store
    identity: Identity
    policy: Policy
    budget: Budget
    vault: Vault
    auditlog: AuditLog
    monitor: Monitor
    jobs: Jobs
    certificate_key: NoteKey

    def principal(self) -> Principal:
        """Return who the command line acts as; access to the home's key is the authentication."""
        return self.identity.principal(self.config.principal)

    @property
    def public_keys(self) -> str:
        """The two lines of home.pub: certificate key and log key as signed-note vkeys."""
        return f"{self.certificate_key.vkey}\n{self.auditlog.key.vkey}\n"


def create(config: Config, *, passphrase: str | None = None) -> Kernel:
    """Make a new home: root key, signing keys, databases, policies and the first administrator.

    The home appears whole or not at all: it is built beside its place and renamed into it.

    Raises:
        HomeExists: there is a home, or another non-empty folder, at this place.
    """
    home = config.home
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise HomeExists(
            f"{home} exists and is not empty",
            hint="choose another place with --home, or use the home that is there",
        )
    building = home.with_name(f".{home.name}.{secrets.token_hex(4)}")
    building.mkdir(mode=0o700, parents=True)
    _write_root(building, config, passphrase)
    for folder in ("objects", "models", "reports", "run", "policy"):
        (building / folder).mkdir(mode=0o700)
    for policy in resources.files("llmos.kernel").joinpath("policies").iterdir():
        _write(building / "policy" / policy.name, policy.read_bytes())
    draft = config.model_copy(update={"home": building})
    root_key = _root_key(draft, passphrase)
    stores = _open_stores(draft)
    home_id = secrets.token_hex(8)
    vault = Vault(building, stores[1], root_key)
    for name in (_CERTIFICATE_KEY, _LOG_KEY):
        vault.seal_secret(name, os.urandom(32))
    vault.seal_secret(_PEPPER, os.urandom(32))
    with stores[0].transaction() as conn:
        conn.execute(insert(schema.settings).values(name="home_id", value=home_id))
    kernel = _assemble(draft, stores, vault)
    with kernel.store.transaction() as conn:
        admin = kernel.identity.add_principal(
            conn, config.principal, frozenset({Role.ADMINISTRATOR})
        )
        kernel.auditlog.append(
            conn,
            {
                "v": 1,
                "at": now(),
                "actor": admin.name,
                "action": "init",
                "resource": f"Home::{home_id}",
                "outcome": "done",
                "details": {"public_keys": kernel.public_keys},
            },
        )
    _write(building / "home.pub", kernel.public_keys.encode(), mode=0o644)
    for store in stores:
        store.close()
    with suppress(FileNotFoundError):
        home.rmdir()
    building.rename(home)
    return open_kernel(config, passphrase=passphrase)


def open_kernel(
    config: Config,
    *,
    passphrase: str | None = None,
    ask_passphrase: Callable[[], str] | None = None,
) -> Kernel:
    """Open a home and check its log before anything else is done with it.

    Raises:
        HomeMissing: there is no home at this place.
        WrongPassphrase: the key file or passphrase does not open it.
        TamperedLog: the log's newest checkpoint and its rows do not agree.
    """
    if not (config.home / _ROOT_DESCRIPTION).exists():
        raise HomeMissing(
            f"there is no home at {config.home}", hint=f"make one: llmos --home {config.home} init"
        )
    root_key = _root_key(config, passphrase, ask_passphrase)
    stores = _open_stores(config)
    kernel = _assemble(config, stores, Vault(config.home, stores[1], root_key))
    kernel.auditlog.check()
    return kernel


def _assemble(config: Config, stores: tuple[Store, Store], vault: Vault) -> Kernel:
    store = stores[0]
    with store.read() as conn:
        home_id = conn.execute(
            select(schema.settings.c.value).where(schema.settings.c.name == "home_id")
        ).scalar()
    if home_id is None:
        raise IntegrityError("kernel.db does not name its home", hint="restore it from a backup")
    origin = f"llmos.local/{home_id}"
    certificate_key = NoteKey(f"{origin}/certificates", vault.secret(_CERTIFICATE_KEY))
    auditlog = AuditLog(store, NoteKey(origin, vault.secret(_LOG_KEY)))
    policy = Policy.load(config.home / "policy")
    budget = Budget(store)
    return Kernel(
        config=config,
        home_id=home_id,
        store=store,
        identity=Identity(store, vault.secret(_PEPPER)),
        policy=policy,
        budget=budget,
        vault=vault,
        auditlog=auditlog,
        monitor=Monitor(store, policy, budget, auditlog),
        jobs=Jobs(store, config.home),
        certificate_key=certificate_key,
    )


def _open_stores(config: Config) -> tuple[Store, Store]:
    busy_timeout_s = config.busy_timeout_s
    return (
        Store.open(config.home / "kernel.db", schema.KERNEL, busy_timeout_s=busy_timeout_s),
        Store.open(config.home / "keys.db", schema.KEYS, busy_timeout_s=busy_timeout_s),
    )


def _write_root(building: Path, config: Config, passphrase: str | None) -> None:
    """Write how the root key is opened: sealed under a passphrase, or kept in a key file."""
    description: dict[str, Any]
    if passphrase is not None:
        description = {
            "provider": "passphrase",
            "sealed": keys.seal_with_passphrase(os.urandom(32), passphrase),
        }
    elif config.key_file is not None:
        if not config.key_file.exists():
            keys.create_key_file(config.key_file)
        description = {"provider": "key-file"}
    else:
        keys.create_key_file(building / "root.key")
        description = {"provider": "key-file"}
    _write(building / _ROOT_DESCRIPTION, rfc8785.dumps({"v": 1, **description}))


def _root_key(
    config: Config, passphrase: str | None, ask_passphrase: Callable[[], str] | None = None
) -> bytes:
    description = json.loads((config.home / _ROOT_DESCRIPTION).read_bytes())
    if description["provider"] == "key-file":
        return keys.read_key_file(config.key_file or config.home / "root.key")
    if passphrase is None:
        passphrase = _configured_passphrase(config)
    if passphrase is None and ask_passphrase is not None:
        passphrase = ask_passphrase()
    if passphrase is None:
        raise WrongPassphrase(
            "this home is opened by a passphrase and none was given",
            hint="set LLMOS_PASSPHRASE_FILE to a file that holds it, or run in a terminal",
        )
    return keys.open_with_passphrase(description["sealed"], passphrase)


def _configured_passphrase(config: Config) -> str | None:
    if config.passphrase is not None:
        return config.passphrase.get_secret_value()
    if config.passphrase_file is None:
        return None
    try:
        return config.passphrase_file.read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        raise ConfigError(f"{config.passphrase_file} holds no passphrase") from error


def _write(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
