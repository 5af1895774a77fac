"""One file holds what was measured of a model and of the messages that made it, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import rfc8785
from tests.certified import with_adapter
from tests.homes import last_records, log_size

from llmos.attacks import inversion
from llmos.attacks.inversion import InversionReport, Uniformity
from llmos.attacks.leak import LeakReport
from llmos.attacks.subject import MeasuredModel
from llmos.errors import MeasurementError, PermissionDenied, StorageError
from llmos.kernel.policy import Action
from llmos.reports.arms import at_most
from llmos.system import System
from llmos.workflows import leak_report
from llmos.workflows.leak_report import (
    inversion_path,
    read_inversion,
    read_report,
    report_path,
    write,
    write_inversion,
)


@pytest.fixture(scope="module")
def east(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[System]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("job")
        yield with_adapter(folder, tiny_model_folder, stack, holdout=0.4).sites["east"]


@pytest.fixture(scope="module")
def measured(east: System) -> LeakReport:
    """Attack, then measure: the leak report takes in what there is."""
    assert read_inversion(subject(east), east.parts) is None
    attacked = east.measure_inversion("real")
    assert attacked.file == alone(east)
    assert read_inversion(subject(east), east.parts) == attacked.report
    result = east.measure("real")
    assert result.files == (report_path(east.kernel.config.home, "real"),)
    assert not alone(east).exists()
    (report,) = result.reports
    assert report.inversion == attacked.report
    assert read_report("real", east.parts) == report
    return report


@pytest.fixture(params=["alone", "within"])
def kept(request: pytest.FixtureRequest, east: System, measured: LeakReport) -> Path:
    """Keep the inversion report alone or in the leak report, and return the file."""
    home = east.kernel.config.home
    report_path(home, "real").unlink(missing_ok=True)
    if request.param == "within":
        return write(measured, east.who, east.parts, found=logged_now(measured))
    return write_inversion(attacked(measured), east.who, east.parts)


def logged_now(report: LeakReport) -> dict[str, str]:
    data = inversion.to_json(attacked(report))
    return {"inversion_report_sha256": hashlib.sha256(data).hexdigest()}


def attacked(report: LeakReport) -> InversionReport:
    assert report.inversion is not None
    return report.inversion


def another(report: LeakReport) -> InversionReport:
    return replace(attacked(report), uniformity=Uniformity(1000, 0.25))


def alone(system: System) -> Path:
    return inversion_path(system.kernel.config.home, "real")


def subject(system: System) -> MeasuredModel:
    card = system.datasets.card("notes")
    return leak_report.subject(system.registry.model("real"), card)


def test_an_attack_after_measuring_goes_into_the_leak_report_in_one_act(
    east: System, measured: LeakReport
) -> None:
    write(measured, east.who, east.parts)
    entries = log_size(east)
    found = east.measure_inversion("real")
    path = report_path(east.kernel.config.home, "real")
    assert found.file == path
    assert not alone(east).exists()
    now = read_report("real", east.parts)
    assert now == replace(measured, inversion=found.report)
    _admitted, written = last_records(east, log_size(east) - entries)
    assert (
        written["details"].items()
        >= {
            "leak_report_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "verdict": str(measured.verdict),
            "epsilon_lower_bound": None,
            "inversion_report_sha256": hashlib.sha256(inversion.to_json(found.report)).hexdigest(),
            "inversion_verdict": "pass",
        }.items()
    )
    assert read_inversion(subject(east), east.parts) == found.report
    east.kernel.auditlog.verify()


def test_it_is_read_where_it_is_kept(east: System, measured: LeakReport, kept: Path) -> None:
    assert kept.exists()
    assert read_inversion(subject(east), east.parts) == attacked(measured)


@pytest.mark.parametrize("change", ["changed", "gone", "older"])
def test_what_is_not_the_newest_in_the_log_is_refused_until_it_is_made_again(
    east: System, measured: LeakReport, kept: Path, change: str
) -> None:
    older = kept.read_bytes()
    if change == "older":
        write_inversion(another(measured), east.who, east.parts)
        assert read_inversion(subject(east), east.parts) == another(measured)
    if change == "gone":
        kept.unlink()
    else:
        kept.write_bytes(older if change == "older" else older.replace(b'"pass"', b'"fail"'))
    with pytest.raises(MeasurementError, match="is gone, or is not its newest") as refused:
        read_inversion(subject(east), east.parts)
    assert refused.value.hint == "llmos measure real --inversion"
    with pytest.raises(MeasurementError, match="is gone, or is not its newest"):
        east.measure("real")
    write_inversion(attacked(measured), east.who, east.parts)
    assert read_inversion(subject(east), east.parts) == attacked(measured)
    write(measured, east.who, east.parts)
    assert read_report("real", east.parts) == measured


def test_of_another_model_or_of_other_data_it_is_refused(
    east: System, measured: LeakReport, kept: Path
) -> None:
    other = replace(attacked(measured).subject, digest="ab" * 32)
    place = write_inversion(replace(attacked(measured), subject=other), east.who, east.parts)
    assert place == alone(east)  # it does not belong into the leak report
    with pytest.raises(MeasurementError, match="of another model or of data as they were"):
        read_inversion(subject(east), east.parts)
    assert kept.exists()


def test_one_of_an_earlier_version_is_refused_until_it_is_made_again(
    east: System, measured: LeakReport
) -> None:
    report_path(east.kernel.config.home, "real").unlink(missing_ok=True)
    earlier = inversion.to_document(attacked(measured))
    del earlier["sample"]
    data = rfc8785.dumps(earlier)
    details = {"inversion_report_sha256": hashlib.sha256(data).hexdigest()}
    resource = east.registry.model("real").resource
    with east.kernel.monitor.act(east.who, Action.MEASURE, resource, details=details, context={}):
        alone(east).write_bytes(data)
    with pytest.raises(MeasurementError, match="real is not one of this version") as refused:
        read_inversion(subject(east), east.parts)
    assert refused.value.hint == "llmos measure real --inversion"
    write_inversion(attacked(measured), east.who, east.parts)
    assert read_inversion(subject(east), east.parts) == attacked(measured)


def test_what_was_never_written_does_not_count(
    east: System, measured: LeakReport, kept: Path
) -> None:
    draft = kept.with_name(f".{kept.name}.tmp")
    draft.mkdir()
    developer = east.access.add_user(f"dev-{kept.suffixes[0][1:]}", ["developer"])
    try:
        with pytest.raises(StorageError):
            write_inversion(another(measured), east.who, east.parts)
        with pytest.raises(PermissionDenied):
            write_inversion(another(measured), developer, east.parts)
    finally:
        draft.rmdir()
    assert read_inversion(subject(east), east.parts) == attacked(measured)


def test_a_site_has_a_page_and_its_coordinator_the_certificate(
    east: System, measured: LeakReport
) -> None:
    write(measured, east.who, east.parts, found=logged_now(measured))
    files = east.report("real")
    assert files.certificate is None
    assert files.reason == (
        "real was trained by a federation, and its coordinator certifies it (llmos report there)"
    )
    page = files.page.read_text()
    assert "No guarantee." not in page
    assert "No certificate." in page
    assert files.reason in page
    assert measured.guarantee is not None
    assert at_most(measured.guarantee.epsilon) in page
    assert "What this site's messages betray: real" in page
    assert "The coordinator of this job sees: gradient behind the mask" in page
