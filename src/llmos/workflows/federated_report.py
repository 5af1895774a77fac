"""Certify a federated model at its coordinator, from what its sites have stated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmos.errors import JobError, ModelError
from llmos.federations import register
from llmos.federations.manifest import Manifest
from llmos.federations.register import FederatedJob
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.store import now
from llmos.models.registry import ModelEntry
from llmos.parties import authority
from llmos.reports import (
    certificate,
    federated_certificate,
    federated_page,
    federated_rounds,
    federated_verification,
    site_part,
)
from llmos.reports.federated_certificate import FederatedFacts
from llmos.reports.site_part import SitePart
from llmos.workflows import logged, outputs
from llmos.workflows.parts import Parts


def run(
    entry: ModelEntry, who: Principal, parts: Parts, folder: Path | None
) -> tuple[Path, Path, Path]:
    """Write the certificate of a model whose training this home coordinated, its page and the keys.

    Raises:
        ModelError: it has no guarantee.
        JobError: a site that took part has not stated yet what it spent.
        VerificationFailed: the sites have stated what the coordinator's rounds do not say.
    """
    kernel = parts.kernel
    job = register.job(kernel.store, entry.card["job"])
    if job.manifest.privacy is None:
        raise ModelError(f"{entry.name} has no guarantee, so there is nothing to certify")
    facts, given = _facts(entry, job, who, parts)
    folder = folder or kernel.config.home / "reports"
    keys, path = folder / "home.pub", folder / f"{entry.name}.certificate.json"
    envelope = federated_certificate.seal(facts, kernel.certificate_key)
    fields = federated_certificate.contents(envelope, facts, given)
    # before the log has it: an entry of a certificate that nobody can verify would stay for ever
    federated_verification.examine(fields, kernel.public_keys)
    outputs.write(keys, kernel.public_keys.encode())
    details = certificate.log_details(envelope)
    with kernel.monitor.act(who, Action.REPORT, entry.resource, details=details, context={}):
        pass
    own = logged.prove(parts, {"own": {"/action": "report", **logged.details(details)}})["own"]
    data = federated_certificate.bundle(fields, own)
    verified = federated_verification.verify_file(
        data, kernel.public_keys, model_digest=entry.digest
    )
    html = folder / f"{entry.name}.report.html"
    outputs.write(path, data)
    outputs.write(html, federated_page.render(verified).encode())
    return path, html, keys


def _facts(
    entry: ModelEntry, job: FederatedJob, who: Principal, parts: Parts
) -> tuple[FederatedFacts, dict[str, dict[str, Any]]]:
    kernel, manifest = parts.kernel, job.manifest
    rounds = register.rounds(kernel.store, job.id)
    given = register.statements(kernel.store, job.id)
    anchor = authority.load(kernel).anchor(who, datetime.now(UTC))
    checked = {
        uri: site_part.verify(part, uri, (anchor,), manifest) for uri, part in sorted(given.items())
    }
    missing = _took_part(rounds, checked, manifest) - set(given)
    if missing:
        names = ", ".join(sorted(site.rpartition("/")[2] for site in missing))
        raise JobError(
            f"{names} took part in {job.id} and has not stated yet what it spent",
            hint="a site states it when its job has ended: let `llmos site up` run there",
        )
    coordinate = {"/action": "coordinate", "/outcome": "done"}
    wanted = {
        "propose": coordinate | logged.details({"propose": job.id}),
        "publish": coordinate
        | logged.details(
            {
                "job": job.id,
                "digest": entry.digest,
                "rounds_sha256": federated_rounds.rounds_sha256(rounds),
            }
        ),
    }
    facts = FederatedFacts(
        issued_at=now(),
        issued_by=who.name,
        model=entry.name,
        digest=entry.digest,
        signed=job.signed,
        rounds=rounds,
        authority=anchor.pem.decode(),
        parts=checked,
        evidence=logged.prove(parts, wanted),
    )
    return facts, given


def _took_part(
    rounds: Iterable[Mapping[str, Any]], checked: Mapping[str, SitePart], manifest: Manifest
) -> set[str]:
    """Return who is in a round, and whom a site trained beside, also where that was in vain."""
    found = {site for row in rounds for site in row["sites"]}
    for part in checked.values():
        found |= set(federated_rounds.named(part.statement.rounds.participants, manifest))
    return found
