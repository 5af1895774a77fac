from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.homes import checked_books, last_records, log_size
from tests.unit.reports.conftest import ALL_ANSWERS, SIGNED

import llmos
from llmos.errors import (
    DataError,
    LeakFound,
    MeasurementError,
    ModelError,
    PermissionDenied,
    StorageError,
    UnknownModel,
    VerificationFailed,
)
from llmos.kernel import accounting
from llmos.kernel.policy import Action
from llmos.reports.questions import read_answers, to_dict
from llmos.system import System
from llmos.workflows import report
from llmos.workflows.leak_report import read_report, report_path


def test_a_certificate_is_verified_with_nothing_but_the_public_keys(
    measured: System, tmp_path: Path
) -> None:
    before = checked_books(measured)
    files = measured.report("private", compare=["plain"], folder=tmp_path / "given")
    assert checked_books(measured) == before
    assert files.certificate is not None
    away = tmp_path / "away"
    away.mkdir()
    shutil.copy(files.certificate, away)
    shutil.copy(files.public_keys, away)
    shutil.move(measured.kernel.config.home, tmp_path / "gone")
    verified = llmos.verify(away / files.certificate.name)
    shutil.move(tmp_path / "gone", measured.kernel.config.home)

    entry = measured.registry.model("private")
    reservation = measured.kernel.budget.reservation(entry.card["job"])
    assert verified["model"] == "private"
    assert verified["sha256"] == entry.digest
    assert verified["epsilon"] == accounting.epsilon(reservation.mechanism, 1e-5) <= 3
    assert verified["unit"] == "patient_id"
    assert verified["production"] is True
    assert verified["log_index"] == log_size(measured) - 1
    page = files.page.read_text()
    assert "private" in page
    assert "plain" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def predicate_of(certificate: Path | None) -> dict[str, Any]:
    assert certificate is not None
    envelope = json.loads(certificate.read_bytes())["envelope"]
    predicate: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))["predicate"]
    return predicate


def test_a_certificate_names_the_log_entries_of_its_model(measured: System) -> None:
    records = predicate_of(measured.report("private").certificate)["records"]
    entries = dict(measured.log.read(limit=1000))
    of = {name: entries[record["log_index"]] for name, record in records.items()}
    job = measured.registry.model("private").card["job"]
    assert of["import"]["action"] == "import-data"
    assert of["measure"]["details"]["verdict"] == "pass"
    for name, step in (("fit", "fit"), ("settle", "settle"), ("publish", "publish")):
        assert (of[name]["details"]["step"], of[name]["details"]["job"]) == (step, job)


def test_the_newest_measurement_is_the_one_that_counts(measured: System) -> None:
    before = predicate_of(measured.report("private").certificate)["records"]["measure"]
    measured.measure("private")
    after = predicate_of(measured.report("private").certificate)["records"]["measure"]
    assert after["log_index"] > before["log_index"]


def test_answers_are_put_in_with_the_names_of_those_who_gave_them(
    measured: System, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(to_dict(ALL_ANSWERS)))
    files = measured.report("private", answers=answers)
    registry = predicate_of(files.certificate)["registry"]
    assert (files.tier, files.missing) == (3, ())
    assert files.registry is not None
    assert json.loads(files.registry.read_text()) == registry["record"]
    assert SIGNED in files.page.read_text()
    assert files.certificate is not None
    assert llmos.verify(files.certificate)["registry"] == "tier 3"


def test_an_incomplete_record_is_not_written_before_tier_1(measured: System) -> None:
    files = measured.report("private")
    assert (files.tier, files.registry) == (0, None)
    assert "curator" in files.missing
    assert not list(files.page.parent.glob("*.registry.json"))


def test_a_record_of_an_earlier_report_is_taken_away(measured: System, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(to_dict(ALL_ANSWERS)))
    stale = measured.report("private", answers=answers).registry
    assert stale is not None
    measured.report("private")
    assert not stale.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("answers.txt", b"", "neither .toml nor .json"),
        ("missing.toml", None, "cannot be read"),
        ("large.json", b" " * ((1 << 20) + 1), "larger than"),
        ("answers.toml", b"[nothing]", "no question"),
        ("answers.toml", b"=", "not TOML"),
    ],
)
def test_answers_that_cannot_be_used_leave_nothing_behind(
    measured: System, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    answers = tmp_path / name
    if content is not None:
        answers.write_bytes(content)
    entries = log_size(measured)
    with pytest.raises(DataError, match=reason):
        measured.report("private", folder=tmp_path / "out", answers=answers)
    assert not (tmp_path / "out").exists()
    assert log_size(measured) == entries


def test_a_form_is_never_written_over_answers(tmp_path: Path) -> None:
    form = tmp_path / "answers.toml"
    report.write_questions(form)
    assert read_answers(form.read_bytes(), toml=True) == {}
    for place in (form, tmp_path / "answers.json"):
        with pytest.raises(DataError, match="is there already or no"):
            report.write_questions(place)
    assert not (tmp_path / "answers.json").exists()


def test_a_model_whose_acts_are_not_in_the_log_is_not_certified(measured: System) -> None:
    entry = measured.registry.model("private")
    stranger = replace(entry, card={**entry.card, "job": "train-00000000"})
    with pytest.raises(MeasurementError, match="no entry of fit, publish, settle"):
        report._evidence(
            stranger,
            measured.datasets.card("notes"),
            read_report("private", measured.parts),
            measured.parts,
        )


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_changed_certificate_is_refused(place: float, measured: System) -> None:
    files = measured.report("private")
    assert files.certificate is not None
    data = bytearray(files.certificate.read_bytes())
    data[int(len(data) * place)] ^= 1
    files.certificate.write_bytes(data)
    with pytest.raises(VerificationFailed):
        llmos.verify(files.certificate)


def test_a_model_trained_from_a_seed_is_certified_as_not_for_production(measured: System) -> None:
    units = measured.datasets.card("notes").units
    measured.train(
        dataset="notes",
        model="tiny",
        output="seeded",
        epsilon=3,
        steps=8,
        batch=units,
        max_tokens=32,
        seed=1,
    )
    measured.measure("seeded")
    files = measured.report("seeded")
    assert files.certificate is not None
    assert llmos.verify(files.certificate)["production"] is False


def test_a_model_without_privacy_gets_a_page_and_no_certificate(measured: System) -> None:
    entries = log_size(measured)
    files = measured.report("plain")
    assert files.certificate is None
    assert files.to_dict()["certificate"] is None
    assert "plain has no guarantee. Nothing on this page is certified" in files.page.read_text()
    assert "No guarantee." in files.page.read_text()
    assert not list(files.page.parent.glob("*.certificate.json"))
    assert log_size(measured) == entries
    checked_books(measured)


def test_a_refuted_guarantee_is_never_certified(refuted: System) -> None:
    refuted.measure("noiseless")
    before = checked_books(refuted)
    with pytest.raises(LeakFound, match="gets no certificate"):
        refuted.report("noiseless")
    assert not list((refuted.kernel.config.home / "reports").glob("noiseless.*ificate*"))
    assert checked_books(refuted) == before


def test_a_model_that_was_not_measured_is_not_reported(measured: System) -> None:
    report_path(measured.kernel.config.home, "private").unlink()
    entries = log_size(measured)
    with pytest.raises(MeasurementError, match="private has not been measured") as caught:
        measured.report("private")
    assert caught.value.hint == "llmos measure private"
    with pytest.raises(MeasurementError, match="private has not been measured"):
        measured.report("plain", compare=["private"])
    assert log_size(measured) == entries


def test_only_the_models_own_newest_measurement_counts(measured: System) -> None:
    measured.measure("plain")  # now the newest of all is not the private model's
    home = measured.kernel.config.home
    private, plain = report_path(home, "private"), report_path(home, "plain")
    own = private.read_bytes()
    private.write_bytes(plain.read_bytes())  # another model's, which the log knows as well
    with pytest.raises(MeasurementError, match="not its newest one"):
        read_report("private", measured.parts)
    private.write_bytes(own.replace(b"120", b"121"))
    with pytest.raises(MeasurementError, match="not its newest one"):
        read_report("private", measured.parts)
    private.write_bytes(own)
    assert read_report("private", measured.parts).model == "private"
    with measured.kernel.monitor.act(
        measured.who,
        Action.MEASURE,
        measured.registry.model("private").resource,
        details={"leak_report_sha256": "0" * 64},
    ):
        pass
    with pytest.raises(MeasurementError, match="not its newest one"):  # an older one, put back
        read_report("private", measured.parts)


def test_names_and_kinds_are_checked_first(measured: System) -> None:
    entries = log_size(measured)
    with pytest.raises(UnknownModel):
        measured.report("nothing")
    with pytest.raises(ModelError, match="tiny is a base model"):
        measured.report("tiny")
    assert log_size(measured) == entries


def test_who_may_not_report_gets_no_file(measured: System) -> None:
    developer = measured.access.add_user("dev", ["developer"])
    before = {path.name for path in (measured.kernel.config.home / "reports").iterdir()}
    with pytest.raises(PermissionDenied):
        report.run("private", developer, measured.parts)
    after = {path.name for path in (measured.kernel.config.home / "reports").iterdir()}
    assert after <= before | {"home.pub"}
    assert last_records(measured, 1)[0]["outcome"] == "denied"


def test_a_folder_that_cannot_be_written(measured: System, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        measured.report("private", folder=tmp_path / "file")
    checked_books(measured)
