"""Report: a signed and logged certificate and an HTML page for a model that was trained here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from llmos.attacks import leak
from llmos.attacks.leak import LeakReport
from llmos.data.datasets import DatasetCard
from llmos.errors import DataError, ModelError
from llmos.kernel import accounting
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.kernel.store import now
from llmos.models.registry import ModelEntry, ModelKind
from llmos.privacy import Neighboring, PrivacyLoss
from llmos.reports import certificate as certificates
from llmos.reports import page, questions, verification
from llmos.reports.facts import (
    BudgetFacts,
    CertificateFacts,
    DatasetFacts,
    GuaranteeFacts,
    LeakageFacts,
    ModelFacts,
    TrainingFacts,
)
from llmos.reports.questions import Answer, read_answers
from llmos.transparency.proofs import LogProof
from llmos.workflows import federated_report, logged, outputs
from llmos.workflows.leak_report import read_report
from llmos.workflows.origin import guarantee, origin
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import TrainRequest

_LARGEST_ANSWERS_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where a report's files are; some models get a page and no certificate, and why."""

    certificate: Path | None
    page: Path
    public_keys: Path
    registry: Path | None = None  # the record for the deployments registry, from tier 1 upwards
    tier: int | None = None  # of that record; none for a federated model, which has none
    missing: tuple[str, ...] = ()  # questions that keep it from tier 3
    reason: str | None = None  # why there is no certificate

    def to_dict(self) -> dict[str, Any]:
        """Return the paths as text, and what the registry's record lacks."""
        return {
            "certificate": None if self.certificate is None else str(self.certificate),
            "page": str(self.page),
            "public_keys": str(self.public_keys),
            "registry": None if self.registry is None else str(self.registry),
            "registry_tier": self.tier,
            "open_questions": list(self.missing),
            "no_certificate": self.reason,
        }


def run(
    model: str,
    who: Principal,
    parts: Parts,
    *,
    compare: Sequence[str] = (),
    folder: Path | None = None,
    answers: Path | None = None,
) -> ReportFiles:
    """Write the certificate, the registry's record, the page and the public keys into a folder.

    Raises:
        UnknownModel: a name is not known.
        ModelError: the model is a base model.
        MeasurementError: a model has not been measured.
        DataError: the answers cannot be used; nothing was written.
        LeakFound: the measurement refutes the guarantee; nothing is certified.
    """
    entry = parts.registry.model(model)
    if entry.kind is not ModelKind.ADAPTER:
        raise ModelError(f"{model} is a base model: nothing of this home was trained into it")
    if "sites" in entry.card:  # a coordinator's; a site's model is reported like any other
        return ReportFiles(*federated_report.run(entry, who, parts, folder))
    said = {} if answers is None else open_answers(answers)
    reports = [read_report(name, parts) for name in (model, *compare)]
    home = parts.kernel.config.home
    folder = folder or home / "reports"
    public_keys = folder / "home.pub"
    outputs.write(public_keys, parts.kernel.public_keys.encode())
    card = parts.datasets.card(entry.card["dataset"])
    loss = guarantee(origin(entry), parts)
    documents = [leak.to_document(report) for report in reports]
    html = folder / f"{model}.report.html"
    if (reason := _uncertified(entry, loss)) is not None or loss is None:
        outputs.write(html, page.render(None, documents, reason=reason).encode())
        return ReportFiles(None, html, public_keys, tier=0, reason=reason)
    data = _certify(_facts(entry, card, loss, reports[0], said, who, parts), entry, who, parts)
    verified = verification.verify_bundle(data, parts.kernel.public_keys, model_digest=entry.digest)
    path = folder / f"{model}.certificate.json"
    outputs.write(path, data)
    outputs.write(html, page.render(verified, documents).encode())
    registry = verified.predicate["registry"]
    record = _write_record(registry, folder / f"{model}.registry.json")
    return ReportFiles(
        path, html, public_keys, record, registry["tier"], tuple(registry["missing"])
    )


def _uncertified(entry: ModelEntry, loss: PrivacyLoss | None) -> str | None:
    """Say why a model gets no certificate: no guarantee, two trainings, or somebody else's."""
    if loss is None:
        return f"{entry.name} has no guarantee"
    if "federated" in entry.card:
        return (
            f"{entry.name} was trained by a federation, and its coordinator certifies it "
            "(llmos report there)"
        )
    if (start := entry.card["request"].get("start")) is not None:
        return f"{entry.name} starts from {start['model']}, and a certificate is of one training"
    return None


def _write_record(registry: Mapping[str, Any], path: Path) -> Path | None:
    """Write the registry's record if it reaches a tier; take that of an earlier report away."""
    if not registry["tier"]:
        outputs.remove(path)
        return None
    text = json.dumps(registry["record"], ensure_ascii=False, indent=2)
    outputs.write(path, f"{text}\n".encode())
    return path


def write_questions(path: Path) -> None:
    """Write the form of all questions for people to fill in.

    Raises:
        DataError: there is a file, or the name has another suffix than .toml.
        StorageError: it cannot be written.
    """
    if path.suffix != ".toml" or path.exists():
        raise DataError(f"{path} is there already or no .toml file", hint="name a new .toml file")
    outputs.write(path, questions.form().encode())


def open_answers(path: Path) -> dict[str, Answer]:
    """Read people's answers from a TOML or JSON file, by its suffix.

    Raises:
        DataError: it cannot be read, or an answer in it cannot be used.
    """
    if path.suffix not in {".toml", ".json"}:
        raise DataError(
            f"{path} is neither .toml nor .json",
            hint="`llmos report MODEL --questions FILE.toml` writes a form",
        )
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_ANSWERS_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST_ANSWERS_BYTES:
        raise DataError(f"{path} is larger than {_LARGEST_ANSWERS_BYTES} bytes")
    return read_answers(data, toml=path.suffix == ".toml")


def _certify(facts: CertificateFacts, entry: ModelEntry, who: Principal, parts: Parts) -> bytes:
    """Sign the certificate, log its hash and return it with the proof that it is logged."""
    kernel = parts.kernel
    envelope = certificates.seal(facts, kernel.certificate_key)
    details = certificates.log_details(envelope)
    with kernel.monitor.act(who, Action.REPORT, entry.resource, details=details, context={}):
        pass
    own = {"own": {"/action": str(Action.REPORT), **logged.details(details)}}
    return certificates.bundle(envelope, logged.prove(parts, own)["own"], facts.evidence)


def _facts(
    entry: ModelEntry,
    card: DatasetCard,
    loss: PrivacyLoss,
    report: LeakReport,
    answers: Mapping[str, Answer],
    who: Principal,
    parts: Parts,
) -> CertificateFacts:
    request = TrainRequest.model_validate(entry.card["request"])
    reservation = parts.kernel.budget.reservation(entry.card["job"])
    base = parts.registry.model(entry.base or "")
    return CertificateFacts(
        issued_at=now(),
        issued_by=who.name,
        purpose=request.purpose,
        model=ModelFacts(
            name=entry.name,
            digest=entry.digest,
            kind="LoRA adapter",
            base=base.name,
            base_digest=base.digest,
            base_licence=str(base.card.get("licence", "unknown")),
        ),
        guarantee=GuaranteeFacts(
            loss=loss,
            mechanism=reservation.mechanism,
            accountant=f"privacy loss distribution, dp-accounting {version('dp-accounting')}",
            discretization=accounting.FINE_INTERVAL,
            replace_one_epsilon=accounting.epsilon(
                reservation.mechanism, loss.delta, Neighboring.REPLACE_ONE
            ),
        ),
        training=_training_facts(entry, request),
        dataset=DatasetFacts(
            name=card.name,
            fingerprint=card.fingerprint,
            classification=card.classification,
            purposes=card.purposes,
            units=TrainRequest.model_validate(entry.card["request"]).units,
            records=card.records,
            block=None if card.block is None else card.block._asdict(),
        ),
        budget=_budget_facts(card.name, reservation.costs, parts),
        evidence=_evidence(entry, card, report, parts),
        leakage=LeakageFacts(leak.to_document(report)),
        answers=answers,
    )


def _evidence(
    entry: ModelEntry, card: DatasetCard, report: LeakReport, parts: Parts
) -> dict[str, LogProof]:
    """Prove the newest log entry of each act that the certificate rests on."""
    job = {"job": entry.card["job"]}
    digest = hashlib.sha256(leak.to_json(report)).hexdigest()
    wanted: dict[str, dict[str, object]] = {
        "import": {
            "/action": str(Action.IMPORT_DATA),
            "/outcome": "done",
            "/resource": str(card.resource),
            **logged.details({"fingerprint": card.fingerprint}),
        },
        "fit": {"/outcome": "admitted", **logged.details(job | {"step": "fit"})},
        "settle": {"/outcome": "settled", **logged.details(job)},
        "publish": {"/outcome": "done", **logged.details(job | {"step": "publish"})},
        "measure": {
            "/outcome": "done",
            "/resource": str(entry.resource),
            **logged.details({"leak_report_sha256": digest}),
        },
    }
    return logged.prove(parts, wanted)


def _training_facts(entry: ModelEntry, request: TrainRequest) -> TrainingFacts:
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
        job=entry.card["job"],
    )


def _budget_facts(dataset: str, charged: Mapping[str, int], parts: Parts) -> BudgetFacts:
    pool = parts.kernel.budget.pool(dataset)
    return BudgetFacts(
        epsilon=pool.epsilon,
        delta=pool.delta,
        renyi_order=pool.renyi_order,
        cap=pool.cap,
        spent=pool.spent,
        held=pool.held,
        charged=charged,
    )
