"""Measure what trained models leak, side by side; the result is written, hashed and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from llmos.attacks import leak
from llmos.attacks.leak import LeakReport
from llmos.attacks.scores import Scores
from llmos.attacks.scoring import score
from llmos.attacks.subject import MeasuredModel
from llmos.data.datasets import DatasetCard
from llmos.data.records import Record, RecordFormat
from llmos.engines.dp.plan import Performance
from llmos.errors import MeasurementError
from llmos.kernel.identity import Principal
from llmos.kernel.monitor import Grant
from llmos.kernel.policy import Action
from llmos.models import lora, prefix
from llmos.models.blocks import find_blocks
from llmos.models.devices import resolve_device
from llmos.models.encoding import Encoded, encode, encode_continuation
from llmos.models.loading import LoadedModel, load_base
from llmos.models.prefix import Prefix
from llmos.models.registry import ModelEntry, ModelKind
from llmos.privacy import PrivacyLoss
from llmos.reports import page, plots
from llmos.reports.arms import read_arm
from llmos.workflows import leak_report, outputs
from llmos.workflows.origin import guarantee, origin
from llmos.workflows.parts import Parts

MOST_RECORDS: Final = 200  # members and held-out records, of each, the first in stored order
_BATCH_TOKENS: Final = 2048  # padded tokens in one pass through the blocks below the adapters


@dataclass(frozen=True, slots=True)
class Measured:
    """Reports of one or more models and where they were written."""

    reports: tuple[LeakReport, ...]
    files: tuple[Path, ...]
    plot: Path

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table that sets the models side by side: label, chance, a value a model."""
        lines = page.comparison([read_arm(leak.to_document(report)) for report in self.reports])
        verdicts = ("verdict", "", *(str(report.verdict).upper() for report in self.reports))
        return [*((line.label, line.chance, *line.values) for line in lines), verdicts]

    def to_dict(self) -> dict[str, Any]:
        """Return the reports and the files as JSON values."""
        return {
            "reports": [leak.to_document(report) for report in self.reports],
            "files": [str(path) for path in self.files],
            "plot": str(self.plot),
        }


@dataclass(frozen=True, slots=True)
class _Begun:
    """Records, and what the blocks below every measured adapter make of them, if that is kept."""

    records: tuple[Encoded, ...]
    prefix: Prefix | None

    def score(self, model: nn.Module) -> Scores:
        """Score the records under a model with the base's own first blocks."""
        return score(model, self.records, prefix=self.prefix)


@dataclass(frozen=True, slots=True)
class _Probe:
    """A dataset's records and canaries as one tokenizer sees them."""

    members: tuple[Encoded, ...]
    heldout: tuple[Encoded, ...]
    canaries: tuple[Encoded, ...]
    planted: np.ndarray[Any, np.dtype[np.bool_]]
    category_tokens: tuple[int, ...] | None


def run(
    models: Sequence[str], who: Principal, parts: Parts, most_records: int = MOST_RECORDS
) -> Measured:
    """Measure adapters; models of one base, dataset and purpose share a pass.

    Args:
        models: names of adapters.
        who: asks.
        parts: of the home.
        most_records: members and held-out records that are compared, of each; all canaries are.

    Raises:
        UnknownModel: a name is not known.
        MeasurementError: a model is not a trained adapter, or the data are too few.
        IntegrityError: the canary book is not the one committed to before training.
    """
    entries = [parts.registry.model(name) for name in models]
    for entry in entries:
        if entry.kind is not ModelKind.ADAPTER:
            raise MeasurementError(
                f"{entry.name} is a base model: nothing of this home was trained into it",
                hint="measure a model that `llmos train` made",
            )
    reports: dict[str, LeakReport] = {}
    for shared in sorted({_shared(entry) for entry in entries}):
        same = [entry for entry in entries if _shared(entry) == shared]
        for report in _measure_together(same, who, parts, most_records):
            reports[report.model] = report
    ordered = tuple(reports[entry.name] for entry in entries)
    files = tuple(leak_report.write(report, who, parts) for report in ordered)
    plot = parts.kernel.config.home / "reports" / f"{'-'.join(models)}.leak.svg"
    svg = plots.leak_comparison([read_arm(leak.to_document(r)) for r in ordered])
    outputs.write(plot, svg.encode())
    return Measured(ordered, files, plot)


def _shared(entry: ModelEntry) -> tuple[str, str, str]:
    """Return base, dataset and purpose: adapters that share them are measured in one pass."""
    trained = origin(entry)
    return entry.base or "", trained.dataset, trained.purpose


def _measure_together(
    entries: Sequence[ModelEntry], who: Principal, parts: Parts, most_records: int
) -> list[LeakReport]:
    kernel = parts.kernel
    base, dataset, purpose = _shared(entries[0])
    card = parts.datasets.card(dataset)
    objects = {card.object_id, card.holdout_object_id, card.canary_object_id}
    with kernel.monitor.admit(
        who,
        Action.MEASURE,
        card.resource,
        key=f"measure-{'-'.join(e.name for e in entries)}",
        objects=frozenset(objects | {entry.location for entry in entries}),
        charge=None,
        context={"purpose": purpose},
        details={"models": [entry.name for entry in entries], "purpose": purpose},
    ) as grant:
        subjects = [leak_report.subject(entry, card) for entry in entries]
        attacked = [leak_report.read_inversion(one, parts) for one in subjects]
        folder = parts.registry.folder(parts.registry.model(base))
        loaded = load_base(folder, resolve_device(kernel.config.device))
        tokens = origin(entries[0]).max_tokens
        probe = _probe(card, loaded, tokens, most_records, grant, parts)
        adapters = [parts.registry.open_adapter(entry.name, grant) for entry in entries]
        first = min(_first_adapted(loaded.model, files) for files in adapters)
        members, heldout = (
            _begun(loaded.model, records, first) for records in (probe.members, probe.heldout)
        )
        untuned = members.score(loaded.model), heldout.score(loaded.model)
        reports = []
        for entry, one, files in zip(entries, subjects, adapters, strict=True):
            adapter = lora.from_peft(loaded.model, files)
            try:
                tuned = members.score(loaded.model), heldout.score(loaded.model)
                promised = guarantee(origin(entry), parts)
                reports.append(_report(one, promised, loaded.model, probe, untuned, tuned))
            finally:
                lora.detach(adapter)
    return [
        replace(report, inversion=found) for report, found in zip(reports, attacked, strict=True)
    ]


def _first_adapted(model: nn.Module, files: Mapping[str, bytes]) -> int:
    """Return the position of the first block that an adapter changes."""
    adapter = lora.from_peft(model, files)
    lora.detach(adapter)
    return adapter.adapted_blocks.start


def _begun(model: PreTrainedModel, records: tuple[Encoded, ...], first: int) -> _Begun:
    """Run the blocks below `first` once, for the base model and all adapters, where it is exact."""
    body = model.base_model
    room = Performance().prefix_cache_bytes
    if first == 0 or not records or prefix.size_bytes(body, records) > room:
        return _Begun(records, None)
    kept = prefix.compute(find_blocks(model), first, body, records, batch_tokens=_BATCH_TOKENS)
    return _Begun(records, kept)


def _report(
    subject: MeasuredModel,
    promised: PrivacyLoss | None,
    model: nn.Module,
    probe: _Probe,
    base: tuple[Scores, Scores],
    tuned: tuple[Scores, Scores],
) -> LeakReport:
    return leak.measure(
        subject,
        promised,
        members=tuned[0],
        heldout=tuned[1],
        base_members=base[0],
        base_heldout=base[1],
        canaries=score(model, probe.canaries) if probe.canaries else None,
        planted=probe.planted if probe.canaries else None,
        category_tokens=probe.category_tokens,
    )


def _probe(
    card: DatasetCard,
    loaded: LoadedModel,
    max_tokens: int,
    most_records: int,
    grant: Grant,
    parts: Parts,
) -> _Probe:
    """Read members, held-out records and canaries; planted canaries are not members here."""
    book = parts.datasets.open_canaries(card, grant)
    canary_units = {canary.unit for canary in book.canaries}
    members = [r for r in parts.datasets.open_records(card, grant) if r.unit not in canary_units]
    heldout = list(parts.datasets.open_holdout(card, grant))
    encoded_heldout = tuple(_encoded(r, loaded, max_tokens) for r in heldout[:most_records])
    text = card.format is RecordFormat.TEXT
    return _Probe(
        members=tuple(_encoded(r, loaded, max_tokens) for r in members[:most_records]),
        heldout=encoded_heldout,
        canaries=tuple(
            encode_continuation(c.prefix, c.continuation, loaded.tokenizer, max_tokens)
            if text
            else encode(c.prefix, c.secret, loaded.tokenizer, max_tokens)
            for c in book.canaries
        ),
        planted=np.array([canary.planted for canary in book.canaries], dtype=np.bool_),
        # A completion's last label is the end token: without it, what was to be said is right.
        category_tokens=None
        if text
        else tuple(max(1, len(e.ids) - e.labels_from - 1) for e in encoded_heldout),
    )


def _encoded(record: Record, loaded: LoadedModel, max_tokens: int) -> Encoded:
    return encode(record.prompt, record.completion, loaded.tokenizer, max_tokens)
