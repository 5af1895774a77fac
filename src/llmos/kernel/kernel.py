"""The kernel of one home: made once by `create`, opened by `open_kernel`, passed down from it."""

from __future__ import annotations

import errno
import secrets
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import MetaData, insert, select

from llmos.config import Config
from llmos.crypto import keys
from llmos.crypto.notes import NoteKey
from llmos.crypto.root_keys import KeyFile, Passphrase, RootKeyProvider
from llmos.errors import HomeExists, IntegrityError, StorageError, TamperedObject, WrongPassphrase
from llmos.kernel import policy_versions, root, schema
from llmos.kernel.approvals import Approvals
from llmos.kernel.auditlog import AuditLog
from llmos.kernel.budget import Budget
from llmos.kernel.identity import Identity, Principal, Role
from llmos.kernel.monitor import Monitor
from llmos.kernel.policy import DEFAULTS, Policy, Resource
from llmos.kernel.store import Database, Store, now
from llmos.kernel.vault import Vault

_CERTIFICATE_KEY: Final = "certificate-key"
_LOG_KEY: Final = "log-key"
_PEPPER: Final = "api-key-pepper"
_SCHEMA: Final = "schema"  # file of a home on PostgreSQL: how the names of its schemas begin


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
    approvals: Approvals
    certificate_key: NoteKey

    def principal(self) -> Principal:
        """Return who the command line acts as: the holder of the API key that was given, if any.

        Otherwise the configured name; access to the home's root key is then the authentication.

        Raises:
            AuthenticationError: the key is none of this home's, revoked or expired.
            UnsafeKeyFile: others can reach the file with the key.
            ConfigError: the file with the key cannot be read.
        """
        if (file := self.config.api_key_file) is None:
            return self.identity.principal(self.config.principal)
        return self.identity.authenticate(root.first_line(file, "API key", keys.read_private))

    @property
    def home(self) -> Resource:
        """The home itself, as what an act is done to."""
        return Resource("Home", self.home_id)

    @property
    def public_keys(self) -> str:
        """The two lines of home.pub: certificate key and log key as signed-note vkeys."""
        return f"{self.certificate_key.vkey}\n{self.auditlog.key.vkey}\n"


def create(
    config: Config, *, passphrase: str | None = None, provider: RootKeyProvider | None = None
) -> Kernel:
    """Make a new home: root key, signing keys, databases, policies and the first administrator.

    The home appears whole or not at all: it is built beside its place and renamed into it. The root
    key is kept by `provider`, else under the passphrase, else in a key file.

    Raises:
        HomeExists: there is a home, or another non-empty folder, at this place.
        StorageError: the place cannot be written.
        WrongPassphrase: the passphrase is empty, or `key_file` names a file that is no key file.
    """
    place = config.home.resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise _home_exists(config.home)
    building = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with ExitStack() as undo:
            building.mkdir(mode=0o700, parents=True)
            undo.callback(shutil.rmtree, building)
            inside, root_key = config.model_copy(update={"home": building}), keys.generate_key()
            if provider is None:
                provider = root.key_file(inside) if passphrase is None else Passphrase(passphrase)
            if isinstance(provider, KeyFile) and provider.path.exists():
                root_key = provider.open({})
            elif isinstance(provider, KeyFile):
                undo.callback(provider.path.unlink, missing_ok=True)
            root.write(building, provider, root_key)
            if config.database_url is not None:
                from llmos.databases import postgresql  # noqa: PLC0415 - psycopg is an extra

                postgresql.create(config.database_url, building / _SCHEMA, undo)
            _build(inside, root_key)
            building.rename(place)
            undo.pop_all()  # the home is there
        keys.sync_directory(place.parent)
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise _home_exists(config.home) from error
        raise StorageError.of(error, f"the home {config.home}") from error
    return _opened(config, root_key)


def open_kernel(
    config: Config, *, passphrase: str | None = None, ask: root.Ask | None = None
) -> Kernel:
    """Open a home and check its log before anything else is done with it.

    Raises:
        HomeMissing: there is no home at this place.
        WrongPassphrase, TokenUnavailable: the root key cannot be had.
        TamperedLog: the log's newest checkpoint and its rows do not agree.
        IntegrityError: root.json or another part of the home is not what was written.
    """
    return _opened(config, root.unlock(config, passphrase=passphrase, ask=ask))


def _opened(config: Config, root_key: bytes) -> Kernel:
    with ExitStack() as opened:
        kernel = _assemble(config, _open_stores(config, opened), root_key)
        kernel.auditlog.check()
        opened.pop_all()
    return kernel


def _build(config: Config, root_key: bytes) -> None:
    """Fill a new home, whose root key is there already, with all else."""
    home = config.home
    for folder in ("objects", "models", "reports", "run", "policy"):
        (home / folder).mkdir(mode=0o700)
    for policy in DEFAULTS.iterdir():
        keys.write_private(home / "policy" / policy.name, policy.read_bytes())
    home_id = secrets.token_hex(8)
    with ExitStack() as opened:
        store, keys_store = _open_stores(config, opened)
        vault = Vault(home, keys_store, root_key)
        for name in (_CERTIFICATE_KEY, _LOG_KEY, _PEPPER):
            vault.seal_secret(name, secrets.token_bytes(keys.KEY_BYTES))
        vault.keyring.begin()
        shipped = Policy.load(DEFAULTS)
        with store.transaction() as conn:
            conn.execute(insert(schema.settings).values(name="home_id", value=home_id))
            policy_versions.keep(conn, shipped)
            policy_versions.enact(conn, shipped.digest)
        kernel = _assemble(config, (store, keys_store), root_key)
        with store.transaction() as conn:
            admin = kernel.identity.add_principal(
                conn, config.principal, frozenset({Role.ADMINISTRATOR})
            )
            details = {"public_keys": kernel.public_keys, "policy_digest": shipped.digest}
            entry = {"v": 1, "at": now(), "actor": admin.name, "action": "init", "outcome": "done"}
            made = {"resource": f"Home::{home_id}", "details": details}
            kernel.auditlog.append(conn, {**entry, **made, "state": schema.standing_digest(conn)})
        keys.write_private(home / "home.pub", kernel.public_keys.encode())


def _assemble(config: Config, stores: tuple[Store, Store], root_key: bytes) -> Kernel:
    store, keys_store = stores
    vault = Vault(config.home, keys_store, root_key)
    try:
        certificate_seed = vault.secret(_CERTIFICATE_KEY)
    except TamperedObject as error:
        raise WrongPassphrase(
            "the root key does not open keys.db",
            hint="name this home's own key file with LLMOS_KEY_FILE, or restore keys.db",
        ) from error
    with store.read() as conn:
        home_id = conn.execute(
            select(schema.settings.c.value).where(schema.settings.c.name == "home_id")
        ).scalar()
        # A home made before there were versions has its policies in files; `adopt` records them.
        policy = policy_versions.in_force(conn) or Policy.load(config.home / "policy")
    if home_id is None:
        raise IntegrityError("kernel.db does not name its home", hint="restore it from a backup")
    origin = f"llmos.local/{home_id}"
    auditlog = AuditLog(store, NoteKey(origin, vault.secret(_LOG_KEY)))
    budget = Budget(store)
    certificate_key = NoteKey(f"{origin}/certificates", certificate_seed)
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
        approvals=Approvals(store, certificate_key),
        certificate_key=certificate_key,
    )


def _open_stores(config: Config, opened: ExitStack) -> tuple[Store, Store]:
    """Open both databases; `opened` closes them."""

    def open_store(name: str, metadata: MetaData) -> Store:
        store = Store.open(locate(config, name), metadata, busy_timeout_s=config.busy_timeout_s)
        opened.callback(store.close)
        return store

    return open_store("kernel", schema.KERNEL), open_store("keys", schema.KEYS)


def locate(config: Config, name: str) -> Path | Database:
    """Return where the home has "kernel" or "keys": in a file of its own, or on PostgreSQL.

    Raises:
        ConfigError: the home and LLMOS_DATABASE_URL do not go together, or it is no such URL.
        IntegrityError: the home's file `schema` is damaged.
    """
    file = config.home / _SCHEMA
    if config.database_url is None and not file.exists():
        return config.home / f"{name}.db"
    from llmos.databases import postgresql  # noqa: PLC0415 - psycopg is an extra

    return postgresql.find(config.database_url, file, name)


def _home_exists(home: Path) -> HomeExists:
    return HomeExists(
        f"{home} exists and is not empty",
        hint="choose another place with --home, or use the home that is there",
    )
