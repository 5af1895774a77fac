"""What a site does for a coordinator that does not follow the protocol: nothing that harms it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from tests.certified import ORGANISATION, adapter_of
from tests.homes import TRAINING, until
from tests.parties import Pki
from tests.unit.federations.test_manifest import FIELDS, KEY, SITES

from llmos.engines.federated.codec import decode_update
from llmos.errors import RequestError, UpdateRefused
from llmos.federations import invitations
from llmos.federations import manifest as manifests
from llmos.federations.invitations import InvitationState
from llmos.parties import signatures, trust
from llmos.parties.tls import Credentials
from llmos.system import System
from llmos.workflows import consent, federated_round, masked_round, site_plan
from llmos.workflows.federated_round import UPLOAD, Task, Vector, encode, header
from llmos.workflows.federated_state import start_sha256
from llmos.workflows.masked_round import MaskedAttempt, MaskedPart
from llmos.workflows.site_rounds import SiteRounds
from llmos.workflows.site_training import Happened, SiteTraining

JOB = FIELDS["id"]
ALL = (*SITES, "spiffe://research.example/party/west")
NORTH, VICTIM = ALL[1], ALL[2]
UNITS = dict.fromkeys(ALL, 24)


@dataclass
class Coordinator:
    """Answers a site's calls as it likes."""

    uri: str
    credentials: Credentials
    start: Vector
    sent: list[tuple[int, int, str, bytes]] = field(default_factory=list)

    @property
    def member(self) -> Any:
        return SimpleNamespace(id=SimpleNamespace(uri=self.uri))

    def weights(self, *_: object) -> Vector:
        return self.start

    def send(self, task: Task, phase: str, body: bytes) -> None:
        self.sent.append((task.round, task.attempt, phase, body))


@dataclass
class Site:
    """North, at work; the others are played by the tests."""

    system: System
    rounds: SiteRounds
    coordinator: Coordinator
    credentials: dict[str, Credentials]
    pki: Pki
    told: list[Happened]

    def task(self, number: int, attempt: int = 1, **fields: Any) -> Task:
        manifest = self.rounds.manifest
        start = start_sha256(manifest.parameters)
        usual = Task(JOB, manifest.digest, number, attempt, start, UNITS)
        return Task(**{**usual.to_dict(), **fields})

    def asked(self, phase: str, task: Task, message: object) -> bytes | None:
        """Let the agent do what it is told; return what it sends for it, once it has."""
        self.rounds.check(task)
        self.rounds.do(phase, task, message)
        if phase == UPLOAD:
            self.trained(task.round)
            self.rounds.upload()
        sent = {one[:3]: one[3] for one in self.coordinator.sent}
        return sent.get((task.round, task.attempt, phase))

    def trained(self, number: int) -> None:
        until(lambda: self.rounds.training.update(number) is not None)

    @property
    def certificates(self) -> dict[str, str]:
        return {uri: pem(one) for uri, one in self.credentials.items()}

    def attempt(self, task: Task) -> MaskedAttempt:
        verify = signatures.verifier(
            self.certificates, trust.anchors(self.system.kernel), datetime.now(UTC)
        )
        return MaskedAttempt(task, self.rounds.manifest, self.certificates, verify)

    def others(self, task: Task) -> dict[str, MaskedPart]:
        def part(uri: str) -> MaskedPart:
            key = self.credentials[uri].key
            sign = lambda text: signatures.sign(key, text)  # noqa: E731
            return MaskedPart(task, self.rounds.manifest, uri, sign)

        return {uri: part(uri) for uri in ALL if uri != NORTH}

    def run(self, task: Task, until_phase: str, without: str | None = None) -> MaskedAttempt:
        """Run an attempt up to a phase; a site may be left out of what is uploaded."""
        attempt, others = self.attempt(task), self.others(task)
        while attempt.phase != until_phase:
            phase = attempt.phase
            for uri in attempt.missing():
                if phase == UPLOAD and uri == without:
                    continue
                message = attempt.message(uri)
                if uri == NORTH:
                    body = self.asked(phase, task, message)
                else:
                    body = played(others[uri], phase, message, attempt)
                assert body is not None
                attempt.receive(uri, phase, body)
            if attempt.phase == phase:
                attempt.close_phase()
        return attempt


def pem(credentials: Credentials) -> str:
    return credentials.certificate.public_bytes(Encoding.PEM).decode()


def played(part: MaskedPart, phase: str, message: object, attempt: MaskedAttempt) -> bytes:
    match phase:
        case masked_round.ADVERTISE:
            return part.advertise(attempt.verify)
        case masked_round.SHARE:
            return part.share(message)
        case federated_round.UPLOAD:
            update = np.full(attempt.manifest.parameters, 1e-4, dtype=np.float32)
            return part.upload(message, update)
        case masked_round.CONFIRM:
            return part.confirm(message, lambda _: None)
    return part.unmask(message)


@pytest.fixture
def site(system: System, tiny_model_folder: Path) -> Iterator[Site]:
    """Let four sites be asked for a job, and north admit it."""
    yield from at_work(system, tiny_model_folder)


@pytest.fixture
def plain_site(system: System, tiny_model_folder: Path) -> Iterator[Site]:
    """The same, of updates in the clear and without privacy."""
    plain = {"privacy": None, "aggregation": {"kind": "plain"}}
    yield from at_work(system, tiny_model_folder, **plain)


def at_work(system: System, model: Path, **more: Any) -> Iterator[Site]:
    adapter, fields = adapter_of(model)
    digest = system.registry.model(TRAINING["model"]).digest
    asked = FIELDS | fields | {"model_digest": digest, "sites": ALL} | more
    signed = manifests.sign(manifests.parse(asked), KEY)
    with system.kernel.store.transaction() as conn:
        invitations.receive(conn, signed, ORGANISATION)
    job = consent.approve(JOB, system.who, system.parts)
    pki = Pki(ORGANISATION)
    trust.add(ORGANISATION, pki.anchor().pem, system.who, system.kernel, datetime.now(UTC))
    credentials = {uri: pki.credentials(uri.rpartition("/")[2]) for uri in ALL}
    coordinator = Coordinator(NORTH, credentials[NORTH], np.asarray(adapter.vector().numpy()))
    told: list[Happened] = []
    plan = site_plan.make_plan(job.manifest, system.datasets.card("notes"))
    training = SiteTraining(job, plan, system.parts, told.append)
    channel: Any = coordinator
    rounds = SiteRounds(training, channel, system.parts, lambda _: None, units=plan.units)
    training.start()
    until(lambda: bool(told))
    yield Site(system, rounds, coordinator, credentials, pki, told)
    training.stop()


def test_one_sum_of_a_round_is_unmasked_also_when_a_later_round_was_asked_for(site: Site) -> None:
    """With the sum of all and the sum of all but one a coordinator has the one."""
    first = site.run(site.task(0, 1), "done").result()
    assert first is not None
    assert first.sites == ALL
    second = site.run(site.task(0, 2), masked_round.CONFIRM, without=VICTIM)
    with pytest.raises(RequestError, match="was not begun here"):
        site.asked(UPLOAD, site.task(1, 1, weights_sha256="ab" * 32), {})
    assert site.rounds.training.update(1) is not None
    before = list(site.coordinator.sent)
    with pytest.raises(RequestError, match=r"round 0 of .* is over here"):
        site.asked(masked_round.CONFIRM, site.task(0, 2), second.message(NORTH))
    with pytest.raises(UpdateRefused, match="update of round 0 is not the one that is kept"):
        site.rounds.do(masked_round.CONFIRM, site.task(0, 2), second.message(NORTH))
    assert site.coordinator.sent == before


def test_another_sum_of_a_round_is_not_unmasked(site: Site) -> None:
    site.run(site.task(0, 1), "done")
    with pytest.raises(UpdateRefused, match=r"round 0 was unmasked for .* before"):
        site.run(site.task(0, 2), masked_round.UNMASK, without=VICTIM)
    assert site.run(site.task(0, 3), "done").result() is not None  # over the same sites


def test_what_is_signed_is_of_the_round_whose_update_is_kept(site: Site) -> None:
    with site.system.kernel.store.transaction() as conn:
        invitations.change(conn, JOB, InvitationState.RUNNING, update_round=5)
    with pytest.raises(UpdateRefused, match="update of round 4"):
        site.rounds.note_release(site.task(4), ALL)
    site.rounds.note_release(site.task(5), ALL)
    job = invitations.invitation(site.system.kernel.store, JOB)
    assert job.released == ALL


@pytest.mark.parametrize("number", [-1, 5, 17])
def test_a_round_that_the_job_has_not_is_refused(site: Site, number: int) -> None:
    with pytest.raises(RequestError, match=f"round {number} of"):
        site.rounds.check(site.task(number))


def test_a_job_starts_from_the_base_model(site: Site) -> None:
    """Weights that another job has learnt would be certified with this one's losses."""
    site.rounds.check(site.task(0))
    with pytest.raises(RequestError, match="does not start from the base model as it is"):
        site.rounds.check(site.task(0, weights_sha256="ab" * 32))
    site.rounds.check(site.task(1, weights_sha256="ab" * 32))


def expired() -> dict[str, Any]:
    return {"at": datetime.now(UTC) - timedelta(days=2), "life": timedelta(days=1)}


def bad_certificate(site: Site, why: str) -> object:
    match why:
        case "expired":
            return pem(site.pki.credentials("south", **expired()))
        case "stranger's":
            return pem(Pki(ORGANISATION).credentials("south"))
        case "north's":
            return pem(site.credentials[NORTH])
        case "text":
            return "no certificate"
    return 7


@pytest.mark.parametrize("why", ["expired", "stranger's", "north's", "text", "number"])
def test_anothers_bad_certificate_does_not_end_the_agent(site: Site, why: str) -> None:
    """Certificates are refused to the coordinator, who is asked again; only the own one ends it."""
    shown = {**site.certificates, VICTIM: bad_certificate(site, why)}
    with pytest.raises(RequestError, match=f"shows for {VICTIM} is no"):
        site.asked(masked_round.ADVERTISE, site.task(0), {"certificates": shown})
    assert site.coordinator.sent == []
    assert site.asked(masked_round.ADVERTISE, site.task(0), {"certificates": site.certificates})


def test_attempts_at_a_round_send_the_same_update(plain_site: Site) -> None:
    """What an aborted attempt left out of its update is no part of the next one."""
    site, manifest = plain_site, plain_site.rounds.manifest
    bodies = [site.asked(UPLOAD, task, {}) for task in (site.task(0, 1), site.task(0, 2))]
    first, second = (
        decode_update(body or b"", header(manifest, site.task(0, attempt)), NORTH)
        for attempt, body in enumerate(bodies, 1)
    )
    assert np.array_equal(first, second)
    update = site.rounds.training.update(0)
    assert update is not None
    assert not np.array_equal(first, update)  # something was left out
    third = site.task(1, 1, weights_sha256="ab" * 32)
    body = site.asked(UPLOAD, third, {})
    later = site.rounds.training.update(1)
    assert later is not None
    left = (update - first).astype(np.float32)
    expected, _ = encode(later.astype(np.float32), left, manifest, third)
    assert body == expected
