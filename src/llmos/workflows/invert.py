"""Test whether a federated job's messages betray a site's records, by gradient inversion.

The site attacks itself: it alone has the records to compare the guesses with. What it attacks is
made by the code that makes its messages, at the weights of the job's first round.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from llmos.attacks import inversion, inversion_arms
from llmos.attacks.inversion import InversionReport
from llmos.attacks.observations import Sending
from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import GaussianClipping, Performance
from llmos.errors import MeasurementError
from llmos.federations import invitations
from llmos.federations import manifest as manifests
from llmos.federations.manifest import Manifest, Masked, Plain
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Grant
from llmos.kernel.policy import Action
from llmos.models.encoding import encode
from llmos.models.registry import ModelEntry
from llmos.reports import inversions
from llmos.reports.inversions import Inversion
from llmos.workflows import federated_adapter, leak_report
from llmos.workflows.parts import Parts
from llmos.workflows.site_plan import training_plan

_RECORDS: Final = 8  # the first in stored order; each is attacked by itself


@dataclass(frozen=True, slots=True)
class Inverted:
    """The report on one model, and where it was written."""

    report: InversionReport
    file: Path

    @property
    def shown(self) -> Inversion:
        """Return what people read of it."""
        return inversions.read(inversion.to_document(self.report))

    def to_dict(self) -> dict[str, Any]:
        """Return the report and its file as JSON values."""
        return {"report": inversion.to_document(self.report), "file": str(self.file)}


def run(model: str, who: Principal, parts: Parts) -> Inverted:
    """Attack the messages of the federated job that made a model, and write what was recovered.

    Raises:
        UnknownModel: no model has this name.
        MeasurementError: no federation trained it on data of this home, or the attack does not
            apply to its adapter.
        PermissionDenied: policy forbids to measure on these data.
        ModelError: this home no longer makes the job's adapter of the base model.
    """
    entry = parts.registry.model(model)
    if "federated" not in entry.card or "dataset" not in entry.card:
        raise MeasurementError(
            f"no federation trained {model} on data of this home: nothing was sent",
            hint="run it at a site, on a model that a federated job has made",
        )
    manifest = manifests.parse(entry.card["federated"])
    if manifest.shared_noise is not None:
        raise MeasurementError(
            f"the sites of {manifest.id} sent sums of gradients under shared noise, which this "
            "attack knows nothing of",
            hint="`llmos measure` without --inversion tells what the model itself gives away",
        )
    card = parts.datasets.card(entry.card["dataset"])
    with parts.kernel.monitor.admit(
        who,
        Action.MEASURE,
        card.resource,
        key=f"invert-{model}",
        objects=frozenset({card.object_id}),
        charge=None,
        context={"purpose": manifest.purpose},
        details={"models": [model], "purpose": manifest.purpose, "attack": "inversion"},
    ) as grant:
        report = _measure(entry, manifest, card, grant, parts)
    return Inverted(report, leak_report.write_inversion(report, who, parts))


def _measure(
    entry: ModelEntry, manifest: Manifest, card: DatasetCard, grant: Grant, parts: Parts
) -> InversionReport:
    loaded, adapter = federated_adapter.load(manifest, parts)
    most = manifest.local.max_tokens
    records = [
        encode(record.prompt, record.completion, loaded.tokenizer, most)
        for record in islice(parts.datasets.open_records(card, grant), _RECORDS)
    ]
    aggregation = manifest.aggregation
    return inversion_arms.measure(
        leak_report.subject(entry, card),
        adapter,
        records,
        Sending(
            learning_rate=manifest.local.learning_rate,
            bits=(aggregation if isinstance(aggregation, Plain) else Plain()).bits,
            mask_bits=(
                aggregation.bits
                if isinstance(aggregation, Masked)
                else Masked.model_fields["bits"].default
            ),
            privacy=_privacy(manifest, parts),
        ),
        aggregation=aggregation.kind,
        performance=Performance(threads=parts.kernel.config.threads, device=str(loaded.device)),
    )


def _privacy(manifest: Manifest, parts: Parts) -> GaussianClipping | None:
    """Return clipping and noise as this site admitted them."""
    plan = invitations.invitation(parts.kernel.store, manifest.id).plan
    if plan is None:
        raise MeasurementError(f"{manifest.id} was never admitted here")
    return training_plan(manifest, plan).privacy
