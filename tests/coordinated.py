"""A coordinator in this process, with a real home and CA, and sites that speak the protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import rfc8785
from tests.homes import close
from tests.unit.federations.test_manifest import FIELDS

import llmos
from llmos.crypto import dsse
from llmos.crypto.certificates import PartyId
from llmos.crypto.notes import NoteKey, decode_base64
from llmos.federations import manifest as manifests
from llmos.federations import register
from llmos.federations.manifest import ANSWER_TYPE, Manifest, SignedManifest
from llmos.parties import authority, signatures
from llmos.parties.encoding import generate_key
from llmos.parties.tls import Credentials
from llmos.workflows import federated_round, masked_round
from llmos.workflows.coordinate import Coordinator
from llmos.workflows.federated_round import Task, encode
from llmos.workflows.masked_round import MaskedPart

if TYPE_CHECKING:
    from llmos.federations.register import FederatedJob
    from llmos.system import System

ORGANISATION: Final = "research.example"
UNITS: Final = 24
Changed = Callable[[str, bytes], bytes]  # phase and message -> what is sent


def as_it_is(_phase: str, body: bytes) -> bytes:
    return body


@dataclass
class Peer:
    """One site: its certificate, its home's key, and its part of the attempt under way."""

    uri: str
    credentials: Credentials
    key: NoteKey
    part: tuple[tuple[int, int], MaskedPart] | None = None

    def envelope(self, manifest: Manifest, **said: Any) -> dict[str, Any]:
        """Sign an answer; what `said` names is said instead."""
        fields: dict[str, Any] = {
            "site": self.uri,
            "manifest_sha256": manifest.digest,
            "vkey": self.key.vkey,
            "accepted": True,
            "reason": "",
            "units": UNITS,
            "epsilon": 2.5,
        }
        return dsse.sign(rfc8785.dumps(fields | said), ANSWER_TYPE, self.key)


@dataclass
class Hall:
    """A coordinator's home and process, and its sites."""

    system: System
    peers: dict[str, Peer]
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin a coordinator, as a new process does."""
        system = self.system
        self.coordinator = Coordinator(
            system.who, system.parts, tell=self.told.append, changed=lambda: None
        )

    def propose(self, number: int = 0, **fields: Any) -> Manifest:
        """Propose a job to all sites, whatever its manifest says."""
        kernel = self.system.kernel
        sites = sorted(peer.uri for peer in self.peers.values())
        asked = FIELDS | {"id": f"fed-{number:016x}", "sites": sites} | fields
        manifest = Manifest.model_validate(asked)
        signed = manifests.sign(manifest, kernel.certificate_key)
        self.store(signed)
        return manifest

    def store(self, signed: SignedManifest) -> None:
        with self.system.kernel.store.transaction() as conn:
            register.propose(conn, signed, "admin", None)

    def answer(self, name: str, manifest: Manifest, **said: Any) -> None:
        peer = self.peers[name]
        self.coordinator.answer(peer.uri, manifest.id, peer.envelope(manifest, **said))

    def agree(self, manifest: Manifest, *names: str) -> None:
        """Let sites be heard of, and say yes."""
        self.coordinator.tick()
        for name in names or tuple(self.peers):
            self.instruction(name, manifest)
            self.answer(name, manifest)

    def job(self, manifest: Manifest) -> FederatedJob:
        return register.job(self.system.kernel.store, manifest.id)

    def instruction(self, name: str, manifest: Manifest) -> dict[str, Any]:
        """Ask as a site what there is to do for a job."""
        found = self.coordinator.instructions(self.peers[name].uri)
        (one,) = [one for one in found if one["job"] == manifest.id]
        return one

    def step(self, name: str, manifest: Manifest, change: Changed = as_it_is) -> str | None:
        """Let a site do what it is asked for now; return the phase."""
        asked = self.instruction(name, manifest)
        if asked["kind"] != "round":
            return None
        phase, task = str(asked["phase"]), task_of(asked)
        body = change(phase, self._body(self.peers[name], manifest, phase, task, asked["message"]))
        self.send(name, task, phase, body)
        return phase

    def send(self, name: str, task: Task, phase: str, body: bytes) -> None:
        uri = self.peers[name].uri
        self.coordinator.receive(uri, task.job, task.round, task.attempt, phase, body)

    def phase(self, manifest: Manifest, *names: str, change: Changed = as_it_is) -> None:
        """Let sites take one step each."""
        for name in names or tuple(self.peers):
            self.step(name, manifest, change)

    def round(self, manifest: Manifest, *names: str) -> None:
        """Let sites do all of an attempt."""
        for _ in range(1 if manifest.aggregation.kind == "plain" else 5):
            self.phase(manifest, *names)

    def revoke(self, name: str) -> None:
        ca = authority.load(self.system.kernel)
        ca.revoke(name, self.system.who, datetime.now(UTC))

    def records(self, key: str) -> list[Any]:
        """Return what the log says under one key of its details."""
        entries = self.system.kernel.auditlog.entries(-1, 1000)
        details = [entry.fields["details"] for entry in entries]
        return [one[key] for one in details if key in one]

    def _body(self, peer: Peer, manifest: Manifest, phase: str, task: Task, message: Any) -> bytes:
        update = np.full(manifest.parameters, 0.001, dtype=np.float32)
        if manifest.aggregation.kind == "plain":
            return encode(update, None, manifest, task)[0]
        attempt = (task.round, task.attempt)
        if phase == masked_round.ADVERTISE:
            sign = peer.credentials.key
            part = MaskedPart(task, manifest, peer.uri, lambda text: signatures.sign(sign, text))
            peer.part = attempt, part
            at = datetime.now(UTC)
            anchor = authority.load(self.system.kernel).anchor(self.system.who, at)
            return part.advertise(signatures.verifier(message["certificates"], (anchor,), at))
        assert peer.part is not None
        assert peer.part[0] == attempt
        part = peer.part[1]
        match phase:
            case masked_round.SHARE:
                return part.share(message)
            case federated_round.UPLOAD:
                return part.upload(message, update)
            case masked_round.CONFIRM:
                return part.confirm(message, lambda _sites: None)
        return part.unmask(message)


def task_of(instruction: dict[str, Any]) -> Task:
    """Read the task of a round."""
    return Task(**json.loads(decode_base64(instruction["task"]["payload"])))


@contextmanager
def hall(
    folder: Path, names: tuple[str, ...] = ("east", "north", "south", "west")
) -> Iterator[Hall]:
    """Make the home of a coordinator, and sites with certificates of its CA."""
    system = llmos.create(folder / "coordinator", device="cpu", threads=1)
    try:
        system.parties.create_authority(ORGANISATION)
        kernel, at = system.kernel, datetime.now(UTC)
        ca, peers = authority.load(kernel), {}
        for place, name in enumerate(names):
            key, party = generate_key(), PartyId(ORGANISATION, name)
            system.parties.invite(name)
            with kernel.store.transaction() as conn:
                issued = ca.issue(conn, party, key.public_key(), party.names(()), at)
            own = NoteKey(name, bytes([place + 1] * 32))
            peers[name] = Peer(party.uri, Credentials(issued, key), own)
        yield Hall(system, peers)
    finally:
        close(system)
