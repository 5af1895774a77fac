"""A coordinator that a site's agent talks to: a network peer without a network."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.x509 import load_pem_x509_csr
from tests.certified import adapter_of
from tests.homes import until
from tests.parties import Pki
from tests.unit.federations.test_manifest import FIELDS, KEY

from llmos.crypto import dsse
from llmos.crypto.notes import decode_base64
from llmos.errors import LlmosError
from llmos.federations import manifest as manifests
from llmos.parties import memberships
from llmos.parties.encoding import crl_to_pem
from llmos.workflows import consent, renew_parties, site_channel
from llmos.workflows.federated_round import ROUND_TYPE
from llmos.workflows.site_agent import SiteAgent

if TYPE_CHECKING:
    from pathlib import Path

    from llmos.crypto.notes import NoteKey
    from llmos.kernel.budget import Reservation
    from llmos.parties.tls import Credentials
    from llmos.system import System

ORGANISATION = "research.example"
NAME = "north"
MONTH = timedelta(days=30)


@dataclass
class FakeCoordinator:
    """Answers the calls of one site's agent; what it says and refuses is set by the test."""

    organisation: str = ORGANISATION
    key: NoteKey = KEY
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    instructions: list[Any] = field(default_factory=list)
    fails: dict[str, LlmosError] = field(default_factory=dict)  # by the path's last part
    answers: list[dict[str, Any]] = field(default_factory=list)
    statements: list[bytes] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # paths
    revoked: tuple[Credentials, ...] = ()

    def __post_init__(self) -> None:
        self.pki = Pki(self.organisation, self.at)
        self.url = f"https://{self.organisation}:8443"

    def invite(self, site: System, *, at: datetime | None = None) -> None:
        """Make a home a member by a certificate of a month and a list of a day from then on."""
        at = at or self.at
        anchor, party = self.pki.anchor(at=at), self.pki.id(NAME)
        member, asked = memberships.begin(party, self.url, anchor, site.who, site.kernel)
        key = load_pem_x509_csr(asked).public_key()
        assert isinstance(key, EllipticCurvePublicKey)
        issued = self.pki.authority.issue(key, member.id.names(()), at, MONTH)
        memberships.finish(member, issued, site.who, site.kernel, at)

    def manifest(self, **fields: Any) -> manifests.SignedManifest:
        """Sign a job of this coordinator."""
        sites = [f"spiffe://{self.organisation}/party/{one}" for one in ("east", NAME, "south")]
        own = {"coordinator": f"spiffe://{self.organisation}/authority", "sites": sites}
        return manifests.sign(manifests.parse(FIELDS | own | fields), self.key)

    def propose(self, **fields: Any) -> None:
        """Say that there is a job of which nothing was answered."""
        signed = self.manifest(**fields)
        said = {"job": signed.manifest.id, "kind": "manifest", "envelope": signed.envelope}
        self.instructions = [said]

    def task(self, **fields: Any) -> dict[str, Any]:
        """Sign anything as a task."""
        return dsse.sign(json.dumps(fields).encode(), ROUND_TYPE, self.key)

    def call(
        self, url: str, _context: object, path: str, body: bytes | None = None, **_: Any
    ) -> bytes:
        """Stand in for `llmos.parties.exchange.call`."""
        assert url == self.url
        self.asked.append(path)
        what = path.rpartition("/")[2]
        if what in self.fails:
            raise self.fails[what]
        match what:
            case "keys":
                return f"{self.key.vkey}\n{self.key.vkey}\n".encode()
            case "poll":
                threading.Event().wait(0.02)
                told = {"instance": "one", "version": 1, "instructions": self.instructions}
                return json.dumps(told).encode()
            case "answer":
                assert body is not None
                self.answers.append(json.loads(decode_base64(json.loads(body)["payload"])))
            case "statement":
                assert body is not None
                self.statements.append(body)
            case "crl":
                now = datetime.now(UTC)
                return crl_to_pem(self.pki.crl(*self.revoked, number=2, at=now)).encode()
        return b""

    def accepted(self) -> list[bool]:
        return [one["accepted"] for one in list(self.answers)]

    def heard(self, kind: str, times: int = 2) -> None:
        """Wait until a site has asked so often again."""
        before = self.asked.count(kind)
        until(lambda: self.asked.count(kind) >= before + times)


@dataclass
class Working:
    """An agent at work in a thread of this process."""

    agent: SiteAgent
    told: list[str]
    thread: threading.Thread = field(init=False)
    error: LlmosError | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.agent.run()
        except LlmosError as error:
            self.error = error

    def said(self, text: str) -> str:
        """Wait until the agent has said something, and return it."""
        until(lambda: any(text in one for one in list(self.told)) or not self.thread.is_alive())
        found = [one for one in self.told if text in one]
        assert found, (text, self.told, self.error)
        return found[-1]

    def ended(self) -> LlmosError | None:
        """Wait until the agent has ended by itself; return by which error."""
        self.thread.join(60)
        assert not self.thread.is_alive(), self.told
        return self.error


@contextmanager
def at_work(
    site: System, coordinator: FakeCoordinator, patch: pytest.MonkeyPatch
) -> Iterator[Working]:
    """Let the site's agent work for the time of the block."""
    for module in (site_channel, renew_parties):
        patch.setattr(module, "call", coordinator.call)
    member = memberships.membership(coordinator.organisation, site.kernel)
    told: list[str] = []
    stop = threading.Event()
    working = Working(SiteAgent(member, site.who, site.parts, told.append, stop), told)
    try:
        yield working
    finally:
        stop.set()
        asking = [thread for thread in threading.enumerate() if thread.name == "poll"]
        for thread in (working.thread, *asking):  # none may ask the next coordinator
            thread.join(60)
    assert not working.thread.is_alive()


def runnable_fields(site: System, model: Path) -> dict[str, Any]:
    """Return the fields of a manifest that a home with this model can run."""
    _, fields = adapter_of(model)
    return fields | {"model_digest": site.registry.model("tiny").digest}


def admitted(
    site: System,
    coordinator: FakeCoordinator,
    patch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> Reservation:
    """Let a job be admitted, and the agent end."""
    coordinator.propose(**fields)
    with at_work(site, coordinator, patch) as agent:
        agent.said("waits for a steward")
        consent.approve(FIELDS["id"], site.who, site.parts)
        agent.said("is admitted")
    return site.kernel.budget.reservation(FIELDS["id"])
