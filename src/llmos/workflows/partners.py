"""The partners of a home's log: whom it witnesses, and who witnesses it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

from sqlalchemy import Connection, delete, insert, select

from llmos.crypto.notes import Verifier, open_note
from llmos.errors import ConfigError, PartnerExists, TamperedLog, UnknownPartner, VerificationFailed
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.schema import log_checkpoints, log_cosignatures
from llmos.kernel.store import Store, now, timestamp
from llmos.transparency import proofs
from llmos.transparency.cosignatures import verify_cosignature
from llmos.transparency.proofs import LogProof
from llmos.transparency.tables import log_partners
from llmos.workflows.parts import Parts

_FORMER: Final = "no partner any more: its key is not known, nothing was checked"


@dataclass(frozen=True, slots=True)
class Partner:
    """Another log's operator: its key, and where it takes our checkpoints."""

    name: str
    verifier: Verifier
    url: str | None  # submission prefix of C2SP tlog-witness; None: it does not witness us
    added_at: str


@dataclass(frozen=True, slots=True)
class Cosigned:
    """A size of this log that a partner cosigned; the time is the partner's."""

    size: int
    partner: str
    at: str  # or why it was not checked


def add(name: str, vkey: str, url: str | None, who: Principal, parts: Parts) -> Partner:
    """Register a partner by the log key of its home.pub.

    Raises:
        VerificationFailed: `vkey` is no Ed25519 verifier key.
        ConfigError: it is this home's own key, or the URL is not http or https.
        PartnerExists: the name or the log was added already.
        PermissionDenied: policy does not let this principal manage partners.
    """
    verifier = Verifier.parse(vkey)
    if not name.strip() or not name.isprintable():
        raise ConfigError(f"not a name of a partner: {name!r}")
    if verifier.name == parts.kernel.auditlog.key.name:
        raise ConfigError("a home is no witness of itself", hint="give the log key of another home")
    if url is not None and (
        urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).netloc
    ):
        raise ConfigError(f"not an http or https URL: {url!r}")
    partner = Partner(name, verifier, url, now())
    details = {"add": name, "vkey": vkey, "url": url}
    with parts.kernel.monitor.act(
        who, Action.MANAGE_PARTNERS, parts.kernel.home, details=details
    ) as conn:
        for known in _partners(conn):
            if name == known.name or verifier.name == known.verifier.name:
                raise PartnerExists(
                    f"{known.name} ({known.verifier.name}) is a partner already",
                    hint=f"llmos log partner remove {known.name}",
                )
        row = {"name": name, "vkey": vkey, "url": url, "added_at": partner.added_at}
        conn.execute(insert(log_partners).values(row))
    return partner


def remove(name: str, who: Principal, parts: Parts) -> None:
    """Forget a partner; what was witnessed of its log stays, so that it cannot go back later.

    Raises:
        UnknownPartner: there is none of this name.
        PermissionDenied: policy does not let this principal manage partners.
    """
    with parts.kernel.monitor.act(
        who, Action.MANAGE_PARTNERS, parts.kernel.home, details={"remove": name}
    ) as conn:
        if not conn.execute(delete(log_partners).where(log_partners.c.name == name)).rowcount:
            raise UnknownPartner(f"no partner {name!r}", hint="`llmos log partner ls` lists them")


def partners(store: Store) -> list[Partner]:
    """Return the partners in the order of their names."""
    with store.read() as conn:
        return _partners(conn)


def cosigned(parts: Parts) -> list[Cosigned]:
    """Check every kept cosignature with its partner's key; newest size first.

    Raises:
        TamperedLog: a line or its checkpoint is not what was kept.
    """
    keys = {partner.name: partner.verifier for partner in partners(parts.kernel.store)}
    with parts.kernel.store.read() as conn:
        rows = conn.execute(
            select(log_cosignatures, log_checkpoints.c.note)
            .outerjoin(log_checkpoints, log_checkpoints.c.size == log_cosignatures.c.size)
            .order_by(log_cosignatures.c.size.desc(), log_cosignatures.c.partner)
        ).all()
    return [
        Cosigned(size, partner, _checked(parts, size, partner, line, note, keys.get(partner)))
        for size, partner, line, note in rows
    ]


def prove(index: int, parts: Parts) -> LogProof:
    """Prove an entry against the newest cosigned checkpoint that has it, with its cosignatures.

    Where no partner cosigned one yet, the newest checkpoint stands alone.

    Raises:
        RequestError: there is no such entry.
        TamperedLog: the stored hashes do not lead from the entry to the signed root.
    """
    log = parts.kernel.auditlog
    with parts.kernel.store.read() as conn:
        rows = conn.execute(
            select(log_checkpoints.c.note, log_cosignatures.c.line)
            .join(log_cosignatures, log_cosignatures.c.size == log_checkpoints.c.size)
            .where(log_checkpoints.c.size > index)
            .order_by(log_checkpoints.c.size.desc(), log_cosignatures.c.partner)
        ).all()
    if index < 0 or not rows:
        return proofs.prove(log, index)
    proof = proofs.prove(log, index, kept=rows[0].note)
    lines = "".join(line for note, line in rows if note == rows[0].note)
    return LogProof(index, proof.size, proof.hashes, proof.checkpoint_note + lines, proof.entry)


def _partners(conn: Connection) -> list[Partner]:
    rows = conn.execute(select(log_partners).order_by(log_partners.c.name))
    return [Partner(row.name, Verifier.parse(row.vkey), row.url, row.added_at) for row in rows]


def _checked(
    parts: Parts, size: int, partner: str, line: str, note: str | None, cosigner: Verifier | None
) -> str:
    if cosigner is None:
        return _FORMER
    try:
        text = open_note(note or "", parts.kernel.auditlog.key.verifier)
        at_s = verify_cosignature(line, text, cosigner)
        return timestamp(datetime.fromtimestamp(at_s, UTC))
    except (VerificationFailed, ValueError, OverflowError, OSError) as error:
        raise TamperedLog(
            f"the log was changed: {partner}'s cosignature of {size} entries: {error}",
            hint="compare with what the partner witnessed; restore kernel.db",
        ) from error
