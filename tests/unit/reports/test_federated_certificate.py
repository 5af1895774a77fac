"""A federated certificate holds against a coordinator that cheats, with its own key and log."""

from __future__ import annotations

import base64
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from tests.certified import DIGEST, NAMES, Job
from tests.lying_coordinator import Change, check, reissued, restated
from tests.unit.federations.test_manifest import SHARED

from llmos.crypto.notes import decode_base64
from llmos.errors import JobError, MeasurementError, VerificationFailed
from llmos.federations import register, statement
from llmos.kernel import accounting
from llmos.privacy import PoissonSampledGaussian
from llmos.reports import site_part
from llmos.reports.federated_certificate import MEDIA_TYPE_1
from llmos.reports.federated_verification import verify_file
from llmos.workflows import verify


def test_what_everybody_states_is_verified_without_any_home(job: Job, file: Path) -> None:
    own = {name: system.kernel.public_keys for name, system in job.sites.items()}
    verified = check(job, file.read_bytes(), site_keys=own, model_digest=DIGEST)
    assert verified.compared == set(NAMES)
    said = verified.summary()
    assert (said["model"], said["sha256"], said["model_files"]) == (
        "notes-federated",
        DIGEST,
        "match",
    )
    spent = {part.site: part.statement.spent for part in verified.parts.values()}
    assert [one and one.steps for one in spent.values()] == [8, 8, 4]
    assert said["epsilon"] == max(one.epsilon for one in spent.values() if one) <= 3
    assert [part.statement.ended for part in verified.parts.values()] == [
        "done",
        "done",
        "withdrawn",
    ]
    cost = r"8 steps, charged 0\.\d+ nats of Renyi divergence at order \d+, done; "
    ran = "trained in 2 of 2 rounds; published this very model; 4 entries"
    assert re.search(cost + ran, said["site"][0])
    assert "trained in 1 of 2 rounds; never saw the model; 3 entries of its log" in said["site"][2]
    assert not any("secure aggregation" in line for line in said["protected"])  # it was not used
    alone = check(job, reissued(job, file))
    assert "rest on the coordinator's certificate authority" in alone.summary()["site"][0]


def sites_of(said: dict[str, Any]) -> dict[str, Any]:
    sites: dict[str, Any] = said["predicate"]["sites"]
    return sites


def first(said: dict[str, Any]) -> dict[str, Any]:
    site: dict[str, Any] = next(iter(sites_of(said).values()))
    return site


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: first(said).update(epsilon=0.1), "otherwise about its sites"),
        (lambda said: said["predicate"]["guarantee"].update(epsilon=0.1), "does not follow"),
        (lambda said: said["predicate"]["rounds"].pop(), "has not the 2 rounds"),
        (lambda said: said["predicate"]["rounds"][0].update(sites="3"), "says otherwise"),
        (lambda said: said["predicate"]["rounds"][0].update(sites="1"), "fewer sites"),
        (lambda said: said["predicate"]["rounds"][0].update(sites="f"), "the job has not"),
        (lambda said: said["predicate"]["rounds"][0].update(sites="07"), "canonical form"),
        (lambda said: said["predicate"]["rounds"][0].update(more=1), "canonical form"),
        (lambda said: said["predicate"]["not_protected"].pop(), "conceals"),
        (lambda said: said["predicate"]["protected"].append({}), "does not follow"),
        (lambda said: said["predicate"]["manifest"].update(rounds=1), "another job"),
        (lambda said: said["subject"][0]["digest"].update(sha256="0" * 64), "says otherwise"),
        (lambda said: said["subject"][0].update(name="other"), "something else"),
        (lambda said: said["predicate"].update(issued_by="eve"), "something else"),
        (lambda said: said["predicate"].update(issuer="eve"), "another issuer"),
        (lambda said: said["predicate"].update(more=1), "other sections"),
        (lambda said: said["predicate"].pop("sites"), "other sections"),
        (lambda said: said.update(predicateType="x"), "not a federated certificate"),
        (lambda said: said.pop("subject"), "lacks or misuses"),
    ],
)
def test_a_coordinator_that_signs_and_logs_a_lie_is_refused(
    job: Job, file: Path, change: Change, why: str
) -> None:
    with pytest.raises(VerificationFailed, match=why):
        check(job, reissued(job, file, change))


def test_keys_of_another_site_and_another_model_are_refused(job: Job, file: Path) -> None:
    north = job.sites["north"].kernel.public_keys
    with pytest.raises(VerificationFailed, match="east has signed with other keys"):
        check(job, file.read_bytes(), site_keys={"east": north})
    with pytest.raises(VerificationFailed, match="no site 'west'"):
        check(job, file.read_bytes(), site_keys={"west": north})
    with pytest.raises(VerificationFailed, match="the model at hand"):
        check(job, file.read_bytes(), model_digest="0" * 64)
    with pytest.raises(VerificationFailed):
        verify_file(file.read_bytes(), north)


def test_without_every_statement_there_is_no_certificate(job: Job, file: Path) -> None:
    kernel, manifest = job.coordinator.kernel, job.signed.manifest
    north = manifest.sites[1]
    given = register.statements(kernel.store, manifest.id)[north]
    payload = json.loads(decode_base64(given["envelope"]["payload"]))
    before, size = file.read_bytes(), job.coordinator.log.verify()
    older = rfc8785.dumps(payload | {"type": "llmos.federated-statement/v1"})
    old = given | {"envelope": {"payload": base64.b64encode(older).decode()}}
    for part in (None, old):  # an older statement has no list of rounds: the site is asked again
        restated(job, north, part)
        try:
            assert north not in register.statements(kernel.store, manifest.id)
            with pytest.raises(JobError, match=r"north took part .* has not stated"):
                job.coordinator.report("notes-federated")
            assert file.read_bytes() == before
            assert job.coordinator.log.verify() == size
        finally:
            restated(job, north, job.state("north"))
    assert register.statements(kernel.store, manifest.id)[north]["certificate"]
    restated(job, north, given)
    with pytest.raises(MeasurementError, match="has not been measured"):
        job.sites["east"].report("notes-federated")  # a site has a page of what it measured


def test_a_certificate_of_the_first_version_is_refused(file: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    first.write_bytes(rfc8785.dumps(json.loads(file.read_bytes()) | {"mediaType": MEDIA_TYPE_1}))
    with pytest.raises(VerificationFailed, match="of version 1: its sites did not state"):
        verify.run(first, file.with_name("home.pub"))


def test_losses_of_a_person_at_several_sites_add_up_with_their_deltas(job: Job, file: Path) -> None:
    verified = check(job, file.read_bytes())
    guarantee = verified.predicate["guarantee"]
    spent = [part.statement.spent for part in verified.parts.values()]
    assert guarantee["epsilon_of_all_sites"] == sum(one.epsilon for one in spent if one)
    assert guarantee["delta_of_all_sites"] == 3 * job.signed.manifest.privacy.delta  # type: ignore[union-attr]
    assert verified.summary()["several sites"].endswith("at delta 3e-05")
    assert "the sum of their epsilons at the sum of their deltas" in (
        file.with_name("notes-federated.report.html").read_text()
    )


def test_under_shared_noise_a_person_at_several_sites_loses_more_than_the_sum() -> None:
    """One step of the Gaussian mechanism: k records move the one sum k times as far."""
    one = PoissonSampledGaussian(sampling_probability=1.0, noise_multiplier=1.0, steps=1)
    three = replace(one, noise_multiplier=1.0 / 3)
    each = accounting.epsilon(one, 1e-5)
    assert each == pytest.approx(4.38, abs=0.01)
    assert accounting.epsilon(three, 3e-5) > 3 * each + 2


def test_shared_noise_is_charged_and_said(tmp_path: Path, tiny_model_folder: Path) -> None:
    with ExitStack() as stack:
        fields = SHARED | {"privacy": SHARED["privacy"] | {"epsilon": 4.0}}  # of 18 units too
        job = Job(tmp_path, tiny_model_folder, stack=stack, fields=fields).run()
        written = job.coordinator.report("notes-federated")
        assert written.certificate is not None
        verified = check(job, written.certificate.read_bytes())
        spent = verified.parts[job.signed.manifest.sites[0]].statement.spent
        assert spent is not None
        assert spent.mechanism["noise_multiplier"] == 1.5
        said = verified.summary()
        units = next(line for line in said["protected"] if "differential privacy" in line)
        assert "a round's sum, also together with 1 of the other sites" in units
        assert "as much as 2 of them need together" in units
        envelope = json.loads(written.certificate.read_bytes())["envelope"]
        predicate = json.loads(decode_base64(envelope["payload"]))["predicate"]
        assert "invents sites: then a sum has less noise" in predicate["not_protected"][0]
        assert "no bound is stated, it may be more than the sum" in said["several sites"]
        assert predicate["guarantee"]["epsilon_of_all_sites"] is None
        assert "A person whom several sites know: no bound" in predicate["not_protected"][1]
        assert (
            written.page.read_text().count("no bound is stated, it may be more than the sum") == 2
        )
        # a site that charges for more noise than there is
        uri, system = job.signed.manifest.sites[0], job.sites["east"]
        part = register.statements(job.coordinator.kernel.store, job.signed.manifest.id)[uri]
        payload = json.loads(decode_base64(part["envelope"]["payload"]))
        payload["spent"]["mechanism"]["noise_multiplier"] = 2.0
        lie = site_part.seal(
            statement.parse(payload),
            {},
            system.kernel.certificate_key,
            part["certificate"],
            job.credentials["east"].key,
        )
        anchor = job.coordinator.parties.bundle()
        with pytest.raises(VerificationFailed, match="other noise than the sites share"):
            site_part.verify(
                lie | {"records": part["records"]}, uri, (anchor,), job.signed.manifest
            )
