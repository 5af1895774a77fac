"""A federated certificate holds against a coordinator that cheats, with its own key and log."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from tests.certified import DIGEST, NAMES, Job
from tests.unit.federations.test_manifest import SHARED

from llmos.crypto import dsse
from llmos.crypto.notes import decode_base64
from llmos.errors import JobError, ModelError, VerificationFailed
from llmos.federations import register, statement
from llmos.federations.register import FederatedJob
from llmos.federations.tables import federated_statements
from llmos.kernel import accounting
from llmos.kernel.policy import Action
from llmos.privacy import PoissonSampledGaussian
from llmos.reports import certificate, federated_certificate, federated_rounds, site_part
from llmos.reports.federated_certificate import MEDIA_TYPE, MEDIA_TYPE_1, FederatedFacts
from llmos.reports.federated_verification import VerifiedFederation, verify_file
from llmos.workflows import federated_report, logged

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    """Return a job of three sites, one of which withdrew after the first round."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("certified")
        made = Job(folder, tiny_model_folder, stack=stack, leaver="south")
        made.fields = {"minimum_sites": 2, "aggregation": {"kind": "plain"}}
        yield made.run()


@pytest.fixture(scope="module")
def file(job: Job) -> Path:
    """Certify the model."""
    written = job.coordinator.report("notes-federated")
    assert written.certificate is not None
    assert written.page.read_text().count("<td>done</td>") == 2
    return written.certificate


def keys(job: Job) -> str:
    return job.coordinator.kernel.public_keys


def check(job: Job, data: bytes, **options: Any) -> VerifiedFederation:
    return verify_file(data, keys(job), **options)


def record(job: Job) -> FederatedJob:
    return register.job(job.coordinator.kernel.store, job.signed.manifest.id)


def reissued(
    job: Job, file: Path, change: Change = lambda _: None, outside: Change = lambda _: None
) -> bytes:
    """Let the coordinator change what it says, and sign, log and prove it as if it were true."""
    kernel, who = job.coordinator.kernel, job.coordinator.who
    fields = json.loads(file.read_bytes())
    said = json.loads(decode_base64(fields["envelope"]["payload"]))
    change(said)
    envelope = dsse.sign(rfc8785.dumps(said), dsse.IN_TOTO, kernel.certificate_key)
    details = certificate.log_details(envelope)
    resource = job.coordinator.registry.model("notes-federated").resource
    with kernel.monitor.act(who, Action.REPORT, resource, details=details, context={}):
        pass
    wanted = {"own": {"/action": "report", **logged.details(details)}}
    proof = logged.prove(job.coordinator.parts, wanted)["own"]
    fields |= {"envelope": envelope, "log_proof": proof.to_dict()}
    outside(fields)
    return rfc8785.dumps(fields)


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
    assert [one.steps for one in spent.values()] == [8, 8, 4]
    assert said["epsilon"] == max(one.epsilon for one in spent.values()) <= 3
    assert [part.statement.ended for part in verified.parts.values()] == [
        "done",
        "done",
        "withdrawn",
    ]
    assert "; published this very model; 2 rounds as it saw them; 4 entries" in said["site"][0]
    assert (
        "4 steps, withdrawn; never saw the model; 1 rounds as it saw them; "
        "3 entries of its log proven"
    ) in said["site"][2]
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
        ({"charged": {"notes": "1"}}, "'settle' says otherwise"),
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


def test_keys_of_another_site_another_model_and_a_revoked_site_are_refused(
    job: Job, file: Path
) -> None:
    north = job.sites["north"].kernel.public_keys
    with pytest.raises(VerificationFailed, match="east has signed with other keys"):
        check(job, file.read_bytes(), site_keys={"east": north})
    with pytest.raises(VerificationFailed, match="no site 'west'"):
        check(job, file.read_bytes(), site_keys={"west": north})
    with pytest.raises(VerificationFailed, match="the model at hand"):
        check(job, file.read_bytes(), model_digest="0" * 64)
    with pytest.raises(VerificationFailed):
        verify_file(file.read_bytes(), north)


def restated(job: Job, site: str, part: dict[str, Any] | None) -> None:
    """Let the coordinator have this statement of a site, or none."""
    kernel, manifest = job.coordinator.kernel, job.signed.manifest
    with kernel.store.transaction() as conn:
        if part is None:
            this = federated_statements.c.site == site
            conn.execute(federated_statements.delete().where(this))
        else:
            register.keep_statement(conn, manifest.id, site, part)


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
    with pytest.raises(ModelError, match="its coordinator certifies it"):
        job.sites["east"].report("notes-federated")


def test_a_certificate_of_the_first_version_is_refused(job: Job, file: Path) -> None:
    first = json.loads(file.read_bytes()) | {"mediaType": MEDIA_TYPE_1}
    with pytest.raises(VerificationFailed, match="of version 1: its sites did not state"):
        check(job, rfc8785.dumps(first))


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
        assert line.startswith("south: nothing spent, withdrawn; never saw the model; 0 rounds")
        facts, given = facts_of(job)
        south = job.signed.manifest.sites[2]
        there = [{**row, "sites": list(job.signed.manifest.sites)} for row in facts.rounds]
        with pytest.raises(VerificationFailed, match="south did not train"):
            check(job, published(job, replace(facts, rounds=there), given))
        del given[south]
        without = {uri: part for uri, part in facts.parts.items() if uri != south}
        with pytest.raises(VerificationFailed, match="east trained beside south"):
            check(job, published(job, replace(facts, parts=without), given))


def facts_of(job: Job) -> tuple[FederatedFacts, dict[str, dict[str, Any]]]:
    """Return what an honest coordinator would certify."""
    system = job.coordinator
    entry = system.registry.model("notes-federated")
    return federated_report._facts(entry, record(job), system.who, system.parts)


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
        said = [line.split("; ")[1] for line in verified.summary()["site"]]
        assert said == ["published this very model", *["never saw the model"] * 2]
        with pytest.raises(VerificationFailed, match="east has published another model"):
            check(job, published(job, replace(facts, digest="0" * 64), given))


def published(job: Job, facts: FederatedFacts, given: dict[str, dict[str, Any]]) -> bytes:
    """Log other facts as if they had been published, and certify them."""
    kernel, who = job.coordinator.kernel, job.coordinator.who
    details = {
        "job": facts.signed.manifest.id,
        "model": facts.model,
        "digest": facts.digest,
        "weights": facts.rounds[-1]["weights_after"],
        "rounds_sha256": federated_rounds.rounds_sha256(facts.rounds),
    }
    with kernel.monitor.act(who, Action.COORDINATE, kernel.home, details=details):
        pass
    wanted = {"publish": {"/action": "coordinate", **logged.details(details)}}
    proofs = dict(facts.evidence) | logged.prove(job.coordinator.parts, wanted)
    facts = replace(facts, evidence=proofs)
    envelope = federated_certificate.seal(facts, kernel.certificate_key)
    own = certificate.log_details(envelope)
    resource = job.coordinator.registry.model("notes-federated").resource
    with kernel.monitor.act(who, Action.REPORT, resource, details=own, context={}):
        pass
    proof = logged.prove(
        job.coordinator.parts, {"own": {"/action": "report", **logged.details(own)}}
    )["own"]
    return federated_certificate.bundle(envelope, proof, facts, given)


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
