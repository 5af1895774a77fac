"""A site tests what its own messages betray; the answer is written, hashed and recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.certified import Job, with_adapter
from tests.homes import last_records, log_size

from llmos.attacks.inversion import Observation, Verdict
from llmos.errors import MeasurementError, PermissionDenied, UnknownModel
from llmos.system import System
from llmos.workflows import invert


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    with ExitStack() as stack:
        yield with_adapter(tmp_path_factory.mktemp("job"), tiny_model_folder, stack)


def reports(system: System) -> list[str]:
    folder = system.kernel.config.home / "reports"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_site_sees_that_masks_and_noise_hide_what_its_gradient_tells(job: Job) -> None:
    site, name = job.sites["east"], job.signed.manifest.output
    entries = log_size(site)
    found = site.measure_inversion(name)
    report = found.report
    assert (report.verdict, report.aggregation, report.rank) == (Verdict.PASS, "masked", 12)
    control = report.arm(Observation.GRADIENT)
    assert control is not None
    assert (control.records, control.recall) == (8, 1.0)
    masked = report.arm(Observation.MASKED)
    assert masked is not None
    assert masked.p_value > 1e-6
    privacy = job.signed.manifest.privacy
    assert privacy is not None
    assert report.clip_norm == privacy.clip
    assert report.noise_multiplier is not None
    assert report.noise_multiplier > 0.3
    assert report.subject.fingerprint == site.datasets.card("notes").fingerprint
    data = found.file.read_bytes()
    assert json.loads(data)["schema"] == "llmos.inversion-report/v1"
    assert found.to_dict()["report"] == json.loads(data)
    assert [row[0] for row in found.shown.rows] == [
        "gradient, in the clear (control)",
        "one step's update, in the clear",
        "gradient as integers, before the mask",
        "gradient behind the mask",
        "one private step's update, in the clear",
    ]
    assert log_size(site) > entries
    details = [record["details"] for record in last_records(site, log_size(site) - entries)]
    assert details[0]["models"] == [name]
    assert details[0]["purpose"] == job.signed.manifest.purpose
    assert details[-1]["inversion_report_sha256"] == hashlib.sha256(data).hexdigest()


def test_what_sent_nothing_is_refused_and_nothing_is_written(job: Job) -> None:
    site, name = job.sites["north"], job.signed.manifest.output
    with pytest.raises(MeasurementError, match="no federation trained tiny"):
        site.measure_inversion("tiny")
    with pytest.raises(MeasurementError, match="on data of this home"):
        job.coordinator.measure_inversion(name)  # it has trained on nobody
    with pytest.raises(UnknownModel):
        site.measure_inversion("none")
    developer = site.access.add_user("dev", ["developer"])
    with pytest.raises(PermissionDenied):
        invert.run(name, developer, site.parts)
    assert reports(site) == []
