"""A coordinator that signs, logs and certifies whatever it likes, with its own key and log."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from tests.certified import Job

from llmos.crypto import dsse
from llmos.crypto.notes import decode_base64
from llmos.federations import register
from llmos.federations.tables import federated_statements
from llmos.kernel.policy import Action
from llmos.reports import certificate, federated_certificate, federated_rounds
from llmos.reports.federated_certificate import FederatedFacts
from llmos.reports.federated_verification import VerifiedFederation, verify_file
from llmos.workflows import federated_report, logged

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    """Return a job of three sites, one of which withdrew after the first round."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("certified")
        made = Job(folder, tiny_model_folder, stack=stack, leaver="south")
        made.fields = {"minimum_sites": 2, "aggregation": {"kind": "plain"}}
        yield made.run()


@pytest.fixture(scope="session")
def file(job: Job) -> Path:
    """Certify the model."""
    written = job.coordinator.report("notes-federated")
    assert written.certificate is not None
    assert written.page.read_text().count("<td>done</td>") == 2
    return written.certificate


def check(job: Job, data: bytes, **options: Any) -> VerifiedFederation:
    return verify_file(data, job.coordinator.kernel.public_keys, **options)


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


def facts_of(job: Job) -> tuple[FederatedFacts, dict[str, dict[str, Any]]]:
    """Return what an honest coordinator would certify."""
    system = job.coordinator
    entry = system.registry.model("notes-federated")
    return federated_report._facts(
        entry, register.job(system.kernel.store, job.signed.manifest.id), system.who, system.parts
    )


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
    return federated_certificate.bundle(
        federated_certificate.contents(envelope, facts, given), proof
    )


def restated(job: Job, site: str, part: dict[str, Any] | None) -> None:
    """Let the coordinator have this statement of a site, or none."""
    kernel, manifest = job.coordinator.kernel, job.signed.manifest
    with kernel.store.transaction() as conn:
        if part is None:
            this = federated_statements.c.site == site
            conn.execute(federated_statements.delete().where(this))
        else:
            register.keep_statement(conn, manifest.id, site, part)
