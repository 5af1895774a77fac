"""Report: a signed and logged certificate and an HTML page for a model that was trained here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from llmos.attacks import leak
from llmos.attacks.leak import LeakReport
from llmos.data.datasets import DatasetCard
from llmos.errors import MeasurementError, ModelError
from llmos.kernel import accounting
from llmos.kernel.auditlog import LogEntry
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.store import now
from llmos.models.registry import ModelEntry, ModelKind
from llmos.privacy import Neighboring, PrivacyLoss
from llmos.reports import certificate as certificates
from llmos.reports import page, verification
from llmos.reports.certificate import (
    BudgetFacts,
    CertificateFacts,
    DatasetFacts,
    GuaranteeFacts,
    LeakageFacts,
    ModelFacts,
    TrainingFacts,
)
from llmos.reports.theorems import THEOREMS
from llmos.transparency import proofs
from llmos.workflows import outputs
from llmos.workflows.measure import guarantee, report_path
from llmos.workflows.parts import Parts
from llmos.workflows.training_plan import TrainRequest

_PAGE_OF_LOG: Final = 1000


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report's files are; a model without a guarantee gets a page and no certificate."""

    certificate: Path | None
    page: Path
    public_keys: Path

    def to_dict(self) -> dict[str, str | None]:
        """Return the paths as text."""
        return {
            "certificate": None if self.certificate is None else str(self.certificate),
            "page": str(self.page),
            "public_keys": str(self.public_keys),
        }


def run(
    model: str,
    who: Principal,
    parts: Parts,
    *,
    compare: Sequence[str] = (),
    folder: Path | None = None,
) -> ReportFiles:
    """Write the certificate, the page and the public keys into a folder.

    Raises:
        UnknownModel: a name is not known.
        ModelError: the model is a base model.
        MeasurementError: a model has not been measured.
        LeakFound: the measurement refutes the guarantee; nothing is certified.
    """
    entry = parts.registry.model(model)
    if entry.kind is not ModelKind.ADAPTER:
        raise ModelError(f"{model} is a base model: nothing of this home was trained into it")
    reports = [read_report(name, parts) for name in (model, *compare)]
    home = parts.kernel.config.home
    folder = folder or home / "reports"
    public_keys = folder / "home.pub"
    outputs.write(public_keys, parts.kernel.public_keys.encode())
    card = parts.datasets.card(entry.card["dataset"])
    loss = guarantee(entry, card, parts)
    verified = path = None
    if loss is not None:
        data = _certify(entry, card, loss, reports[0], who, parts)
        verified = verification.verify_bundle(
            data, parts.kernel.public_keys, model_digest=entry.digest
        )
        path = folder / f"{model}.certificate.json"
        outputs.write(path, data)
    html = folder / f"{model}.report.html"
    outputs.write(html, page.render(verified, [leak.to_document(r) for r in reports]).encode())
    return ReportFiles(path, html, public_keys)


def read_report(model: str, parts: Parts) -> LeakReport:
    """Return a model's newest leak report, checked against the hash in the log.

    Raises:
        MeasurementError: the model was not measured, or the file is not what was logged last.
    """
    path = report_path(parts.kernel.config.home, model)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MeasurementError(
            f"{model} has not been measured", hint=f"llmos measure {model}"
        ) from None
    logged: str | None = None
    for entry in _entries(parts):
        if entry.fields["resource"] == f"Model::{model}":
            logged = entry.fields["details"].get("leak_report_sha256", logged)
    if logged != hashlib.sha256(data).hexdigest():
        raise MeasurementError(
            f"the leak report of {model} is not its newest one in the log",
            hint="measure the model again",
        )
    return leak.from_json(data)


def _certify(
    entry: ModelEntry,
    card: DatasetCard,
    loss: PrivacyLoss,
    report: LeakReport,
    who: Principal,
    parts: Parts,
) -> bytes:
    """Sign the certificate, log its hash and return it with the proof that it is logged."""
    kernel = parts.kernel
    facts = _facts(entry, card, loss, report, who, parts)
    envelope = certificates.seal(facts, kernel.certificate_key)
    details = certificates.log_details(envelope)
    with kernel.monitor.act(who, Action.REPORT, entry.resource, details=details, context={}):
        pass
    index = _newest(
        parts,
        lambda e: (
            e["action"] == Action.REPORT
            and e["details"].get(certificates.DIGEST_FIELD) == details[certificates.DIGEST_FIELD]
        ),
    )
    if index is None:
        raise MeasurementError("the certificate's own log entry is missing")
    return certificates.bundle(envelope, proofs.prove(kernel.auditlog, index))


def _facts(
    entry: ModelEntry,
    card: DatasetCard,
    loss: PrivacyLoss,
    report: LeakReport,
    who: Principal,
    parts: Parts,
) -> CertificateFacts:
    job = entry.card["job"]
    reservation = parts.kernel.budget.reservation(job)
    base = parts.registry.model(entry.base or "")
    document = leak.to_document(report)
    digest = hashlib.sha256(leak.to_json(report)).hexdigest()

    def found(step: str) -> int | None:
        return _newest(
            parts, lambda e: e["details"].get("step") == step and _concerns(e, job, entry)
        )

    return CertificateFacts(
        issued_at=now(),
        curator=f"home {parts.kernel.home_id}, {who.name}",
        intended_use=", ".join(card.purposes),
        model=ModelFacts(
            name=entry.name,
            digest=entry.digest,
            kind="LoRA adapter",
            base=base.name,
            base_digest=base.digest,
            base_licence=str(base.card.get("licence", "unknown")),
            log_index=found("publish"),
        ),
        guarantee=GuaranteeFacts(
            loss=loss,
            mechanism=reservation.mechanism,
            accountant=f"privacy loss distribution, dp-accounting {version('dp-accounting')}",
            discretization=accounting.FINE_INTERVAL,
            theorem=THEOREMS["pld"],
            replace_one_epsilon=accounting.epsilon(
                reservation.mechanism, loss.delta, Neighboring.REPLACE_ONE
            ),
            log_index=found("settle"),
        ),
        training=_training_facts(entry, job, found("fit")),
        dataset=DatasetFacts(
            name=card.name,
            fingerprint=card.fingerprint,
            classification=card.classification,
            purposes=card.purposes,
            units=card.units,
            records=card.records,
            log_index=_newest(
                parts, lambda e: e["details"].get("canary_commitment") == card.canary_commitment
            ),
        ),
        budget=_budget_facts(card.name, parts),
        leakage=LeakageFacts(
            document,
            _newest(parts, lambda e: e["details"].get("leak_report_sha256") == digest),
        ),
    )


def _training_facts(entry: ModelEntry, job: str, log_index: int | None) -> TrainingFacts:
    request = TrainRequest.model_validate(entry.card["request"])
    plan = request.plan
    parameters = {
        "expected_batch_units": plan.expected_batch_units,
        "max_records_per_unit": plan.max_records_per_unit,
        "learning_rate": plan.optimizer.learning_rate,
        "lora_rank": request.rank,
        "lora_last_layers": request.last_layers or "all",
        "max_tokens": request.max_tokens,
    }
    return TrainingFacts(
        clip_norm=request.clip,
        sampler="Poisson over privacy units; batches of any size, empty ones included",
        parameters=parameters,
        randomness=entry.card["randomness"],
        production=request.seed is None,
        dtype_path=entry.card["dtype_path"],
        self_test=entry.card["self_test"],
        released=("the adapter after the last step",),
        engine="llmos.engines.dp",
        llmos_version=version("llmos"),
        job=job,
        log_index=log_index,
    )


def _budget_facts(dataset: str, parts: Parts) -> BudgetFacts:
    pool = parts.kernel.budget.pool(dataset)
    return BudgetFacts(
        epsilon=pool.epsilon,
        delta=pool.delta,
        renyi_order=pool.renyi_order,
        cap=pool.cap,
        spent=pool.spent,
        held=pool.held,
        theorem=THEOREMS["filter"],
    )


def _concerns(entry: dict[str, Any], job: str, model: ModelEntry) -> bool:
    details = entry["details"]
    return bool(details.get("job") == job or details.get("output") == model.name)


def _newest(parts: Parts, matches: Callable[[dict[str, Any]], bool]) -> int | None:
    """Return the index of the newest log entry that matches."""
    found = None
    for logged in _entries(parts):
        if matches(logged.fields):
            found = logged.index
    return found


def _entries(parts: Parts) -> Iterator[LogEntry]:
    after = -1
    while batch := parts.kernel.auditlog.entries(after, _PAGE_OF_LOG):
        yield from batch
        after = batch[-1].index
