"""A site speaks for itself, by its own keys and log, and for nobody else."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.certified import ORGANISATION, Job
from tests.lying_coordinator import Change, check, facts_of, published, reissued, restated

from llmos.crypto.certificates import PartyId
from llmos.crypto.notes import decode_base64
from llmos.errors import VerificationFailed
from llmos.federations import register, statement
from llmos.parties import authority
from llmos.parties.encoding import to_pem
from llmos.parties.peers import Anchor
from llmos.reports import site_part
from llmos.reports.federated_certificate import MEDIA_TYPE
from llmos.reports.site_part import SitePart
from llmos.workflows.ended_federations import EndedFederations


def part_of(fields: dict[str, Any], number: int = 0) -> dict[str, Any]:
    part: dict[str, Any] = list(fields["sites"].values())[number]
    return part


def swap(fields: dict[str, Any]) -> None:
    east, north, _ = fields["sites"]
    fields["sites"][east], fields["sites"][north] = fields["sites"][north], fields["sites"][east]


def cut(fields: dict[str, Any]) -> None:
    fields["sites"].popitem()


def stranger(fields: dict[str, Any]) -> None:
    fields["sites"]["spiffe://research.example/party/west"] = part_of(fields)


@pytest.mark.parametrize(
    ("outside", "why"),
    [
        (swap, "not signed by the key|another party|another site"),
        (cut, "each site that took part"),
        (stranger, "a site that the job does not name"),
        (lambda fields: part_of(fields)["records"].pop("settle"), "proves the records"),
        (
            lambda fields: part_of(fields)["records"].update(
                settle=part_of(fields, 1)["records"]["settle"]
            ),
            "other log entries",
        ),
        (lambda fields: part_of(fields).update(signature="AAAA"), "not signed by the key"),
        (lambda fields: part_of(fields).update(more=1), "other fields"),
        (
            lambda fields: part_of(fields).update(certificate=part_of(fields, 1)["certificate"]),
            "another party",
        ),
        (lambda fields: part_of(fields).update(certificate="none"), "cannot be read"),
        (lambda fields: fields["records"].pop("propose"), "other log entries"),
        (lambda fields: fields.update(mediaType=f"{MEDIA_TYPE}x"), "not a federated"),
    ],
)
def test_parts_of_other_sites_and_missing_ones_are_refused(
    job: Job, file: Path, outside: Change, why: str
) -> None:
    with pytest.raises(VerificationFailed, match=why):
        check(job, reissued(job, file, outside=outside))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"epsilon": 0.5}, "its mechanism gives"),
        ({"steps": 4}, "not the steps"),
        ({"delta": 1e-3}, "more than the job asked for"),
        ({"charged": {"notes": "1"}}, "it charged notes 1, its mechanism costs"),
        ({"orders": {"notes": 2}}, "it charged notes .* at order 2"),
        ({"orders": {}}, "does not say what its dataset was charged"),
        ({"charged": {}, "orders": {}}, "does not say what its dataset was charged"),
    ],
)
def test_a_site_that_states_less_than_it_has_run_is_refused(
    job: Job, fields: dict[str, Any], why: str
) -> None:
    kernel, manifest = job.sites["east"].kernel, job.signed.manifest
    stored = register.statements(job.coordinator.kernel.store, manifest.id)
    uri = manifest.sites[0]
    payload = json.loads(decode_base64(stored[uri]["envelope"]["payload"]))
    payload["spent"] |= fields
    said = statement.parse(payload)
    pem = stored[uri]["certificate"]
    lie = site_part.seal(said, {}, kernel.certificate_key, pem, job.credentials["east"].key)
    anchor = job.coordinator.parties.bundle()
    with pytest.raises(VerificationFailed, match=f"^east: .*{why}"):
        site_part.verify(lie | {"records": stored[uri]["records"]}, uri, (anchor,), manifest)


def test_a_site_that_was_asked_and_trained_nothing_states_that(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with ExitStack() as stack:
        job = Job(tmp_path, tiny_model_folder, stack=stack, leaver="south", leaves_after=0)
        job.fields = {"minimum_sites": 2, "aggregation": {"kind": "plain"}}
        written = job.run().coordinator.report("notes-federated")
        assert written.certificate is not None
        data = written.certificate.read_bytes()
        verified = check(job, data)
        line = verified.summary()["site"][2]
        assert line.startswith("south: nothing spent, withdrawn; trained in 0 of 2 rounds;")
        facts, given = facts_of(job)
        south = job.signed.manifest.sites[2]
        ended = EndedFederations(job.coordinator.who, job.coordinator.parts)
        restated(job, south, None)
        ended.add(job.signed.manifest.id)
        wanted = [ended.instructions(uri)[0]["statement_wanted"] for uri in given]
        assert wanted == [False, False, True]  # the others have trained beside it
        there = [{**row, "sites": list(job.signed.manifest.sites)} for row in facts.rounds]
        with pytest.raises(VerificationFailed, match="south did not train"):
            check(job, published(job, replace(facts, rounds=there), given))
        del given[south]
        without = {uri: part for uri, part in facts.parts.items() if uri != south}
        with pytest.raises(VerificationFailed, match="east trained beside south"):
            check(job, published(job, replace(facts, parts=without), given))


def test_what_was_stated_before_a_revocation_stays_stated(job: Job) -> None:
    manifest, ca = job.signed.manifest, authority.load(job.coordinator.kernel)
    uri, part = manifest.sites[2], job.state("south")
    payload = json.loads(decode_base64(part["envelope"]["payload"]))
    at = datetime.fromisoformat(payload["at"])
    serial = job.credentials["south"].certificate.serial_number

    def verified(revoked: datetime) -> SitePart:
        crl = ca.authority.list_revoked([(serial, revoked)], 99, datetime.now(UTC))
        anchor = Anchor(ORGANISATION, (ca.authority.certificate,), (crl,))
        return site_part.verify(part, uri, (anchor,), manifest)

    assert verified(at + timedelta(seconds=2)).site == "south"
    for before in (at, at - timedelta(seconds=2)):
        with pytest.raises(VerificationFailed, match=r"^south: the certificate of .* was revoked"):
            verified(before)


def test_a_site_that_is_revoked_after_its_job_takes_no_certificate_away(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with ExitStack() as stack:
        job = Job(tmp_path, tiny_model_folder, stack=stack).run()
        system, later = job.coordinator, datetime.now(UTC) + timedelta(seconds=2)
        authority.load(system.kernel).revoke("south", system.who, later)
        written = system.report("notes-federated")
        assert written.certificate is not None
        assert len(check(job, written.certificate.read_bytes()).parts) == 3


@pytest.mark.parametrize("borrowed", ["home", "party"])
def test_one_that_speaks_for_two_sites_is_refused(job: Job, borrowed: str) -> None:
    facts, given = facts_of(job)
    east, north = job.signed.manifest.sites[:2]
    home, theirs = ("east", "north") if borrowed == "home" else ("north", "east")
    key, at = job.credentials[theirs].key, datetime.now(UTC)
    party, kernel = PartyId(ORGANISATION, "north"), job.coordinator.kernel
    with kernel.store.transaction() as conn:
        issued = authority.load(kernel).issue(conn, party, key.public_key(), party.names(()), at)
    own = given[east] if borrowed == "home" else given[north]
    payload = json.loads(decode_base64(own["envelope"]["payload"]))
    said = statement.parse(payload | {"site": north, "at": at.isoformat()})
    sealed = site_part.seal(said, {}, job.sites[home].kernel.certificate_key, to_pem(issued), key)
    given[north] = sealed | {"records": own["records"]}
    anchor = job.coordinator.parties.bundle()
    part = site_part.verify(given[north], north, (anchor,), job.signed.manifest)
    lie = replace(facts, parts={**facts.parts, north: part})
    with pytest.raises(VerificationFailed, match="east and north have signed with the same key"):
        check(job, published(job, lie, given))
