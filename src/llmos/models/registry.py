"""The models of one home: names, lineage and cards in kernel.db, adapters in the vault."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import rfc8785
from sqlalchemy import Connection, Row, insert, select

from llmos.errors import HashMismatch, ModelError, ModelExists, UnknownModel
from llmos.kernel.policy import Resource
from llmos.kernel.store import Store, now
from llmos.kernel.vault import ObjectGrant, Vault
from llmos.models import container, tables
from llmos.privacy import Classification

ADAPTER_OBJECT: Final = "adapter"  # the vault's kind of object
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ModelKind(StrEnum):
    """Whether a model stands alone or adapts another one."""

    BASE = "base"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """What the registry knows about one model."""

    name: str
    kind: ModelKind
    base: str | None  # adapters only
    location: str  # base: folder inside the home; adapter: vault object id
    digest: str  # SHA-256, hex: of a base's files, or of an adapter's container
    card: dict[str, Any]  # source and licence, or job, dataset, classification and epsilon
    created_at: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return asdict(self)

    @property
    def resource(self) -> Resource:
        """The model as policies see it; an adapter whose card is silent counts as sensitive."""
        unknown = Classification.PUBLIC if self.kind is ModelKind.BASE else Classification.SENSITIVE
        purpose = self.card.get("request", {}).get("purpose")
        return Resource(
            "Model",
            self.name,
            {
                "kind": str(self.kind),
                "classification": str(self.card.get("classification", unknown)),
                # canonical JSON writes 3.0 as 3
                "private": isinstance(self.card.get("epsilon"), int | float),
                "purposes": () if purpose is None else (purpose,),
            },
        )


class Registry:
    """Finds, registers and opens models; every write happens in the caller's transaction."""

    def __init__(self, store: Store, vault: Vault, home: Path) -> None:
        """Look at the models of the home that these belong to."""
        self._store = store
        self._vault = vault
        self._home = home

    def register_base(
        self, conn: Connection, name: str, location: str, digest: str, card: Mapping[str, Any]
    ) -> None:
        """Enter a base model whose files lie in the folder `location` inside the home.

        Raises:
            ModelExists: the name is taken.
            ModelError: the name is not lower-case letters, digits, `.`, `_` and `-`.
        """
        _insert(
            conn,
            ModelKind.BASE,
            name=name,
            base=None,
            location=location,
            digest=digest,
            card=card,
        )

    def publish_adapter(
        self,
        conn: Connection,
        *,
        name: str,
        base: str,
        object_id: str,
        digest: str,
        card: Mapping[str, Any],
    ) -> None:
        """Enter an adapter that lies in the vault; `digest` is the SHA-256 of its container.

        Raises:
            UnknownModel: `base` is not a base model of this home.
            ModelExists: the name is taken.
            ModelError: the name is not lower-case letters, digits, `.`, `_` and `-`.
        """
        if _select(conn, base, ModelKind.BASE) is None:
            raise UnknownModel(f"there is no base model {base!r} for the adapter {name!r}")
        _insert(
            conn,
            ModelKind.ADAPTER,
            name=name,
            base=base,
            location=object_id,
            digest=digest,
            card=card,
        )

    def store_adapter(self, files: Mapping[str, bytes]) -> tuple[str, str]:
        """Put an adapter's files into the vault and return its object id and digest."""
        packed = container.pack(files)
        return self._vault.put(ADAPTER_OBJECT, packed), hashlib.sha256(packed).hexdigest()

    def open_adapter(self, name: str, grant: ObjectGrant) -> dict[str, bytes]:
        """Return an adapter's files (PEFT format) by name, with their digest checked.

        Raises:
            UnknownModel: there is no model of this name.
            ModelError: the model is no adapter.
            PermissionDenied: the grant does not cover the adapter.
            HashMismatch: the object is not the one that was published.
        """
        entry = self.model(name)
        if entry.kind is not ModelKind.ADAPTER:
            raise ModelError(f"{name} is a base model and has no adapter")
        packed = self._vault.read(entry.location, ADAPTER_OBJECT, grant)
        if hashlib.sha256(packed).hexdigest() != entry.digest:
            raise HashMismatch(
                f"the stored adapter of {name} is not the one that was published",
                hint="restore kernel.db and the objects from the same backup",
            )
        return container.unpack(packed)

    def folder(self, entry: ModelEntry) -> Path:
        """Return the folder of a base model's files."""
        return self._home / entry.location

    def model(self, name: str) -> ModelEntry:
        """Return one model.

        Raises:
            UnknownModel: there is none of this name; the hint lists those with near names.
        """
        with self._store.read() as conn:
            row = _select(conn, name)
            names = list(conn.execute(select(tables.models.c.name)).scalars())
        if row is not None:
            return _entry(row)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UnknownModel(
            f"there is no model {name!r}",
            hint=f"did you mean {', '.join(near)}?" if near else "see `llmos model ls`",
        )

    def models(self) -> list[ModelEntry]:
        """Return all models, oldest first."""
        order = (tables.models.c.created_at, tables.models.c.name)
        with self._store.read() as conn:
            return [_entry(row) for row in conn.execute(select(tables.models).order_by(*order))]


def check_name(name: str) -> None:
    """Refuse what cannot name a model; folders and files are called after it.

    Raises:
        ModelError: the name is not lower-case letters, digits, `.`, `_` and `-`.
    """
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name!r} cannot be the name of a model",
            hint="use up to 64 lower-case letters, digits, `.`, `_` and `-`",
        )


def _insert(
    conn: Connection, kind: ModelKind, *, name: str, card: Mapping[str, Any], **columns: str | None
) -> None:
    check_name(name)
    if _select(conn, name) is not None:
        raise ModelExists(f"a model {name!r} exists already", hint="choose another name")
    row = {**columns, "name": name, "kind": str(kind), "created_at": now()}
    conn.execute(insert(tables.models).values(**row, card=rfc8785.dumps(dict(card)).decode()))


def _select(conn: Connection, name: str, kind: ModelKind | None = None) -> Row[Any] | None:
    query = select(tables.models).where(tables.models.c.name == name)
    if kind is not None:
        query = query.where(tables.models.c.kind == str(kind))
    return conn.execute(query).one_or_none()


def _entry(row: Row[Any]) -> ModelEntry:
    return ModelEntry(
        name=row.name,
        kind=ModelKind(row.kind),
        base=row.base,
        location=row.location,
        digest=row.digest,
        card=json.loads(row.card),
        created_at=row.created_at,
    )
