from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from tests.databases import outside
from tests.homes import checked_books, last_records, log_size, record_state, write_notes

from llmos.attacks import leak
from llmos.attacks.leak import Verdict
from llmos.engines.dp.plan import Performance
from llmos.errors import (
    IntegrityError,
    MeasurementError,
    PermissionDenied,
    StorageError,
    UnknownModel,
)
from llmos.kernel.schema import datasets
from llmos.models import prefix
from llmos.models.prefix import Prefix
from llmos.system import System
from llmos.workflows import measure
from llmos.workflows.leak_report import read_report, report_path


def reports_folder(system: System) -> set[str]:
    return {path.name for path in (system.kernel.config.home / "reports").iterdir()}


def test_models_are_measured_side_by_side_and_recorded(measured: System) -> None:
    before, entries = checked_books(measured), log_size(measured)
    result = measured.measure("private", "plain")
    private, plain = result.reports

    assert (private.model, plain.model) == ("private", "plain")
    assert private.verdict is Verdict.PASS
    assert plain.verdict is Verdict.NO_GUARANTEE
    assert private.bound is not None
    assert private.epsilon_ledger is not None
    assert private.bound.lower <= private.epsilon_ledger <= 3
    assert private.guarantee is not None
    assert private.guarantee.unit.column == "patient_id"
    assert private.bound.canaries == 120
    assert plain.canaries is not None
    assert private.canaries is not None
    # The plain model knows its canaries by heart; the private one cannot tell them: by chance its
    # AUC has a standard deviation of 0.05, so 0.75 is passed in about one run of a million.
    assert plain.canaries.membership.auc > 0.85
    assert private.canaries.membership.auc < 0.75
    assert plain.records.headline.auc > 0.85
    assert private.quality.heldout_records > 0
    card = measured.datasets.card("notes")
    planted = plain.canaries.membership.members
    assert plain.quality.member_records == card.records - planted  # members are real people
    assert plain.subject.fingerprint == card.fingerprint
    assert plain.subject.digest == measured.registry.model("plain").digest

    assert [path.name for path in result.files] == ["private.leak.json", "plain.leak.json"]
    for path, report in zip(result.files, result.reports, strict=True):
        assert leak.from_json(path.read_bytes()) == report
    assert result.plot.read_text().startswith("<svg")
    assert checked_books(measured) == before
    admitted, *written = last_records(measured, log_size(measured) - entries)
    assert (admitted["action"], admitted["outcome"]) == ("measure", "admitted")
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in result.files]
    assert [r["details"]["leak_report_sha256"] for r in written] == hashes


def test_fewer_records_are_compared_where_that_is_asked_for(measured: System) -> None:
    whole = leak.from_json(report_path(measured.kernel.config.home, "private").read_bytes())
    report = measured.measure("private", records=10).reports[0]
    assert whole.quality.member_records > 10
    assert report.quality.member_records == 10
    assert report.quality.heldout_records == 10
    assert report.canaries == whole.canaries  # all of them, whatever was asked for
    measured.measure("private")  # as it was for the other tests


def test_measuring_again_gives_the_same_numbers(measured: System) -> None:
    before = report_path(measured.kernel.config.home, "plain").read_bytes()
    measured.measure("plain")
    again = report_path(measured.kernel.config.home, "plain").read_bytes()
    first, second = json.loads(before), json.loads(again)
    assert second["canaries"] == first["canaries"]
    assert second["records"]["base_minus_tuned"] == first["records"]["base_minus_tuned"]


def test_the_table_for_people_and_the_values_for_programs(measured: System) -> None:
    result = measured.measure("plain", "private")
    rows = result.rows()
    assert all(len(row) == 4 for row in rows)
    assert rows[-1] == ("verdict", "", "NO-GUARANTEE", "PASS")
    document = json.loads(json.dumps(result.to_dict()))
    assert [report["verdict"] for report in document["reports"]] == ["no-guarantee", "pass"]
    assert Path(document["plot"]).exists()


def test_missing_noise_raises_the_alarm(refuted: System) -> None:
    """The ledger says epsilon 1; the secrets that were planted say more. False alarms: 5 %."""
    before = checked_books(refuted)
    report = refuted.measure("noiseless").reports[0]
    assert report.bound is not None
    assert report.epsilon_ledger is not None
    assert 0.9 < report.epsilon_ledger <= 1 < report.bound.lower
    assert report.failed
    assert last_records(refuted, 1)[0]["details"]["verdict"] == "fail"
    assert checked_books(refuted) == before


def test_models_of_other_data_are_measured_in_one_call(measured: System, tmp_path: Path) -> None:
    measured.import_data(
        write_notes(tmp_path / "more.jsonl", units=40),
        name="more",
        unit="patient_id",
        text="text",
        classification="synthetic",
        epsilon=8,
        delta=1e-5,
        holdout=0.5,
    )
    measured.train(
        dataset="more", model="tiny", private=False, steps=2, max_tokens=32, output="third"
    )
    third, plain = measured.measure("third", "plain").reports
    assert (third.model, third.subject.dataset, third.canaries) == ("third", "more", None)
    assert plain.subject.dataset == "notes"
    checked_books(measured)


def test_a_base_model_cannot_be_measured(measured: System) -> None:
    entries = log_size(measured)
    with pytest.raises(MeasurementError, match="tiny is a base model"):
        measured.measure("plain", "tiny")
    assert log_size(measured) == entries


def test_an_unknown_model_is_named_before_anything_is_opened(measured: System) -> None:
    entries = log_size(measured)
    with pytest.raises(UnknownModel, match="nothing"):
        measured.measure("plain", "nothing")
    assert log_size(measured) == entries


def test_who_may_not_measure_learns_nothing(measured: System) -> None:
    developer = measured.access.add_user("dev", ["developer"])
    before, files = checked_books(measured), reports_folder(measured)
    with pytest.raises(PermissionDenied):
        measure.run(["plain"], developer, measured.parts)
    assert (checked_books(measured), reports_folder(measured)) == (before, files)


def test_a_canary_book_that_was_not_committed_to_is_refused(measured: System) -> None:
    home = measured.kernel.config.home
    with outside(home) as conn:
        card = json.loads(conn.execute(select(datasets.c.card)).scalar_one())
        card["canary_commitment"] = "0" * 64
        conn.execute(update(datasets).values(card=json.dumps(card)))
    record_state(home)
    with pytest.raises(IntegrityError, match="commitment"):
        measured.measure("plain")
    assert last_records(measured, 1)[0]["outcome"] == "failed"


def test_a_report_that_cannot_be_written_leaves_the_one_before(
    measured: System,
) -> None:
    path = report_path(measured.kernel.config.home, "plain")
    before, files = path.read_bytes(), reports_folder(measured)
    path.with_name(f".{path.name}.tmp").mkdir()  # its draft cannot be written
    with pytest.raises(StorageError):
        measured.measure("plain")
    path.with_name(f".{path.name}.tmp").rmdir()
    assert path.read_bytes() == before
    assert reports_folder(measured) == files
    assert last_records(measured, 1)[0]["outcome"] == "failed"
    assert read_report("plain", measured.parts).model == "plain"  # the newest that was written
    checked_books(measured)


def test_blocks_below_the_adapter_are_run_once_and_that_changes_no_number(
    measured: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = measured.train(
        dataset="notes",
        model="tiny",
        output="last-block",
        private=False,
        steps=3,
        last_layers=1,
        max_tokens=40,
    )["model"]
    kept: list[bool] = []
    compute = prefix.compute

    def counted(*args: Any, **named: Any) -> Prefix | None:
        found = compute(*args, **named)
        kept.append(found is not None)
        return found

    monkeypatch.setattr(prefix, "compute", counted)
    at_once = measured.measure(name).reports[0]
    assert kept == [True, True]  # members and held-out records
    monkeypatch.setattr(measure, "Performance", partial(Performance, prefix_cache_bytes=0))
    apart = measured.measure(name).reports[0]
    assert len(kept) == 2
    assert at_once.quality.heldout_loss == pytest.approx(apart.quality.heldout_loss, rel=1e-4)
    assert at_once.quality.base_heldout_loss == pytest.approx(
        apart.quality.base_heldout_loss, rel=1e-4
    )
    assert at_once.records.headline.auc == pytest.approx(apart.records.headline.auc, abs=0.02)
