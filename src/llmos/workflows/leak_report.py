"""A model's leak report: where it is kept, how it is written, and whether it is the newest one.

One file holds all that was measured. What a site's messages betray is part of it, and a file of its
own only until the model itself is measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmos.attacks import inversion, leak
from llmos.attacks.inversion import InversionReport
from llmos.attacks.leak import LeakReport
from llmos.attacks.subject import MeasuredModel
from llmos.data.datasets import DatasetCard
from llmos.errors import MeasurementError
from llmos.kernel.identity import Principal
from llmos.kernel.policy import Action
from llmos.models.registry import ModelEntry
from llmos.workflows import logged, outputs
from llmos.workflows.parts import Parts


def report_path(home: Path, model: str) -> Path:
    """Return where a model's leak report is kept."""
    return home / "reports" / f"{model}.leak.json"


def inversion_path(home: Path, model: str) -> Path:
    """Return where a model's inversion report is kept as long as there is no leak report."""
    return home / "reports" / f"{model}.inversion.json"


def subject(entry: ModelEntry, card: DatasetCard) -> MeasuredModel:
    """Say what a measurement is of: a model, and the data that it has learnt as they are now."""
    return MeasuredModel(
        model=entry.name,
        digest=entry.digest,
        base=entry.base or "",
        dataset=card.name,
        fingerprint=card.fingerprint,
    )


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
    if hashlib.sha256(data).hexdigest() != _newest(model, "leak_report_sha256", parts):
        raise MeasurementError(
            f"the leak report of {model} is not its newest one in the log",
            hint="measure the model again",
        )
    return leak.from_json(data)


def read_inversion(measured: MeasuredModel, parts: Parts) -> InversionReport | None:
    """Return the newest inversion report on a model, checked like a leak report; None without one.

    Raises:
        MeasurementError: the log knows of one, and what is kept is another or none, or is of
            another model or of other data.
    """
    model, again = measured.model, f"llmos measure {measured.model} --inversion"
    newest = _newest(model, "inversion_report_sha256", parts)
    if newest is None:
        return None
    try:
        data = inversion_path(parts.kernel.config.home, model).read_bytes()
    except FileNotFoundError:
        data = _within(model, parts)
    if hashlib.sha256(data).hexdigest() != newest:
        raise MeasurementError(
            f"the inversion report of {model} is gone, or is not its newest one in the log",
            hint=again,
        )
    try:
        report = inversion.from_json(data)
    except MeasurementError as error:
        raise MeasurementError(
            f"the inversion report of {model} is not one of this version", hint=again
        ) from error
    if report.subject != measured:
        raise MeasurementError(
            f"the inversion report of {model} is of another model or of data as they were before",
            hint=again,
        )
    return report


def write(
    report: LeakReport, who: Principal, parts: Parts, *, found: Mapping[str, Any] | None = None
) -> Path:
    """Write a leak report and record its hash; the file appears whole or not at all.

    Args:
        report: with the inversion report, if there is one.
        who: acts.
        parts: of the system.
        found: what else the act's record is to say.

    Raises:
        PermissionDenied: policy forbids it; nothing is written.
        StorageError: the file cannot be written; what was there before is unchanged.
    """
    details = {
        "leak_report_sha256": hashlib.sha256(leak.to_json(report)).hexdigest(),
        "verdict": str(report.verdict),
        "epsilon_lower_bound": None if report.bound is None else report.bound.lower,
        **(found or {}),
    }
    home = parts.kernel.config.home
    path = report_path(home, report.model)
    _record(path, leak.to_json(report), report.model, details, who, parts)
    # Only now: until the log knows of the leak report, this file is the one that counts.
    outputs.remove(inversion_path(home, report.model))
    return path


def write_inversion(report: InversionReport, who: Principal, parts: Parts) -> Path:
    """Write an inversion report into the model's leak report, or alone where there is none of it.

    Raises:
        PermissionDenied: policy forbids it; nothing is written.
        StorageError: the file cannot be written; what was there before is unchanged.
    """
    data = inversion.to_json(report)
    found = {
        "inversion_report_sha256": hashlib.sha256(data).hexdigest(),
        "inversion_verdict": str(report.verdict),
    }
    try:
        measured = read_report(report.model, parts)
    except MeasurementError:  # none, or none that counts
        measured = None
    if measured is not None and measured.subject == report.subject:
        return write(replace(measured, inversion=report), who, parts, found=found)
    path = inversion_path(parts.kernel.config.home, report.model)
    _record(path, data, report.model, found, who, parts)
    return path


def _within(model: str, parts: Parts) -> bytes:
    """Return the inversion report inside the leak report; nothing if that one does not count."""
    try:
        report = read_report(model, parts).inversion
    except MeasurementError:
        return b""
    return b"" if report is None else inversion.to_json(report)


def _newest(model: str, name: str, parts: Parts) -> str | None:
    """Return the hash under a name in the newest record of an act on the model that has one."""
    newest: str | None = None
    for entry in logged.entries(parts):
        fields = entry.fields
        if fields["resource"] == f"Model::{model}" and fields["outcome"] == "done":
            newest = fields["details"].get(name, newest)
    return newest


def _record(
    path: Path,
    data: bytes,
    model: str,
    details: Mapping[str, Any],
    who: Principal,
    parts: Parts,
) -> None:
    resource = parts.registry.model(model).resource
    with parts.kernel.monitor.act(who, Action.MEASURE, resource, details=details, context={}):
        outputs.write(path, data)
