"""A certificate is of the rounds and the model that its sites have seen, and leaves out no site."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import rfc8785
from tests.certified import NAMES, Job
from tests.lying_coordinator import check, facts_of, published, restated
from tests.unit.federations.test_manifest import FIELDS

from llmos.crypto.notes import decode_base64
from llmos.errors import ModelError, VerificationFailed
from llmos.federations import statement
from llmos.reports import federated_certificate, site_part
from llmos.reports.bundle import LARGEST_FILE_BYTES
from llmos.reports.federated_certificate import LARGEST_BYTES


def test_rounds_that_do_not_follow_are_refused(job: Job) -> None:
    """The chain is checked by itself, also where the log's entry fits to it."""
    facts, given = facts_of(job)
    first, second = (dict(row) for row in facts.rounds)
    gap = [first, second | {"weights_before": "0" * 64}]
    with pytest.raises(VerificationFailed, match="does not start where one ended"):
        check(job, published(job, replace(facts, rounds=gap), given))
    later = [first | {"weights_before": "0" * 64}, second]  # what another job has learnt
    with pytest.raises(VerificationFailed, match="does not start from zero"):
        check(job, published(job, replace(facts, rounds=later), given))
    swapped = [first | {"weights_after": "0" * 64}, second | {"weights_before": "0" * 64}]
    with pytest.raises(VerificationFailed, match="east trained from other weights"):
        check(job, published(job, replace(facts, rounds=swapped), given))
    south = job.signed.manifest.sites[2]
    twice = [first, second | {"sites": [*second["sites"], south]}]
    with pytest.raises(VerificationFailed, match="south did not train in each round"):
        check(job, published(job, replace(facts, rounds=twice), given))


def test_a_site_that_the_model_learnt_from_cannot_be_left_out(job: Job) -> None:
    facts, given = facts_of(job)
    south = job.signed.manifest.sites[2]
    without = replace(
        facts,
        rounds=[
            {**row, "sites": [uri for uri in row["sites"] if uri != south]} for row in facts.rounds
        ],
        parts={uri: part for uri, part in facts.parts.items() if uri != south},
    )
    del given[south]
    with pytest.raises(VerificationFailed, match="east trained beside south, whose part is not"):
        check(job, published(job, without, given))


def test_a_model_that_no_site_has_published_is_not_certified(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    """A coordinator says after the last round that the job failed, and certifies what it likes."""
    with ExitStack() as stack:
        job = Job(tmp_path, tiny_model_folder, stack=stack, misled=NAMES).run()
        facts, given = facts_of(job)
        assert {part.statement.ended for part in facts.parts.values()} == {"failed"}
        other = replace(facts, digest="0" * 64)
        own = {name: system.kernel.public_keys for name, system in job.sites.items()}
        with pytest.raises(VerificationFailed, match="no site has published the model"):
            check(job, published(job, other, given), site_keys=own)


def test_one_site_that_has_seen_the_model_is_enough(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with ExitStack() as stack:
        job = Job(tmp_path, tiny_model_folder, stack=stack, misled=NAMES[1:]).run()
        facts, given = facts_of(job)
        verified = check(job, published(job, facts, given))
        said = [line.split("; ")[2] for line in verified.summary()["site"]]
        assert said == ["published this very model", *["never saw the model"] * 2]
        with pytest.raises(VerificationFailed, match="east has published another model"):
            check(job, published(job, replace(facts, digest="0" * 64), given))


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_job_of_thousands_of_rounds_is_certified(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Its file is larger than any other that is read."""
    with ExitStack() as stack:
        job = Job(tmp_path, tiny_model_folder, stack=stack)
        job.fields = {"rounds": 3000, "local": FIELDS["local"] | {"steps": 1}}
        written = job.run().coordinator.report("notes-federated")
        assert written.certificate is not None
        data = written.certificate.read_bytes()
        assert LARGEST_FILE_BYTES < len(data) < 2 * LARGEST_FILE_BYTES
        verified = check(job, data)
        assert "trained in 3000 of 3000 rounds" in verified.summary()["site"][0]


def test_the_largest_job_that_a_manifest_may_ask_for_fits(file: Path) -> None:
    rounds, sites, base64 = 10_000, 1000, 4 / 3
    fields = json.loads(file.read_bytes())
    predicate = json.loads(decode_base64(fields["envelope"]["payload"]))["predicate"]
    part, said = (next(iter(one.values())) for one in (fields["sites"], predicate["sites"]))
    row = len(rfc8785.dumps(predicate["rounds"][0])) + sites / 4
    spoken = len(rfc8785.dumps(part)) + base64 * (rounds + sites) / 4
    signed = base64 * (rounds * row + sites * len(rfc8785.dumps(said)))
    assert signed + sites * spoken < LARGEST_BYTES / 2


def test_what_nobody_could_read_is_not_logged(
    job: Job, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, size = file.read_bytes(), job.coordinator.log.verify()
    monkeypatch.setattr(federated_certificate, "LARGEST_BYTES", 1 << 16)
    with pytest.raises(ModelError, match="bytes, and at most 0 are read"):
        job.coordinator.report("notes-federated")
    assert (file.read_bytes(), job.coordinator.log.verify()) == (before, size)


def test_a_certificate_that_would_be_refused_is_not_logged(job: Job, file: Path) -> None:
    """A home that states other rounds cannot be certified, and leaves no trace."""
    north, part = job.signed.manifest.sites[1], job.state("north")
    payload = json.loads(decode_base64(part["envelope"]["payload"]))
    payload["rounds"]["starts_sha256"] = "0" * 64
    home, key = job.sites["north"].kernel.certificate_key, job.credentials["north"].key
    lie = site_part.seal(statement.parse(payload), {}, home, part["certificate"], key)
    before, size = file.read_bytes(), job.coordinator.log.verify()
    restated(job, north, lie | {"records": part["records"]})
    try:
        with pytest.raises(VerificationFailed, match="north trained from other weights"):
            job.coordinator.report("notes-federated")
        assert (file.read_bytes(), job.coordinator.log.verify()) == (before, size)
    finally:
        restated(job, north, part)
