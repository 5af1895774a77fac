"""`llmos federate` and `llmos site`: what people read, and what they are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.certified import Job
from tests.parties import kernel_at
from tests.unit.cli.conftest import Type

from llmos.federations import invitations

Typing = Callable[[Path], Type]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    """Return a job of three sites that is done; one of them withdrew."""
    with ExitStack() as stack:
        made = Job(tmp_path_factory.mktemp("job"), tiny_model_folder, stack=stack, leaver="south")
        made.fields = {"minimum_sites": 2, "aggregation": {"kind": "plain"}}
        yield made.run()


def test_a_coordinator_sees_sites_rounds_loss_and_epsilon(job: Job, typing: Typing) -> None:
    typed, job_id = typing(job.folder / "coordinator"), job.signed.manifest.id
    listed = typed("federate", "ls")
    assert f"{job_id}  done   2/2" in " ".join(listed.out.split()).replace("done", " done  ")
    facts = typed("federate", "show", job_id, "--json").value
    assert facts["sites"][0] == {
        "site": "east",
        "accepted": True,
        "reason": "",
        "units": 24,
        "epsilon": 2.5,
        "rounds": 2,
        "bytes_up": 2000,
        "waited_for": False,
    }
    assert [row["loss"] for row in facts["rounds"]] == [2.5, None]
    shown = typed("federate", "show", job_id).out
    for text in ("a patient", "2.5000", "plain, 4 bits", "epsilon 3 at delta 1e-05"):
        assert text in shown, text
    over = typed("federate", "cancel", job_id, "--reason", "enough")
    assert over.status != 0
    assert "is done already" in over.err


def test_a_site_sees_what_it_decided_and_decides_once(job: Job, typing: Typing) -> None:
    typed, job_id = typing(job.folder / "south"), job.signed.manifest.id
    (row,) = typed("site", "jobs", "--json").value
    units = job.sites["south"].datasets.card("notes").units
    assert (row["state"], row["plan"]["units"]) == ("withdrawn", units)
    assert job_id[:6] in typed("site", "jobs").out  # a narrow terminal breaks the line
    assert "ffa-lora" in typed("site", "show", job_id).out
    for decision in (("approve",), ("refuse", "--reason", "x"), ("withdraw", "--reason", "x")):
        over = typed("site", decision[0], job_id, *decision[1:])
        assert over.status != 0
        assert "is withdrawn" in over.err
    unknown = typed("site", "show", "fed-0000000000000000")
    assert "no federated job" in unknown.err
    assert typed("site", "jobs", "--json").value == [row]


def test_a_job_file_that_is_none_proposes_nothing(job: Job, typing: Typing, tmp_path: Path) -> None:
    typed = typing(job.folder / "coordinator")
    before = typed("federate", "ls", "--json").value
    file = tmp_path / "job.yaml"
    good = "model: tiny\ndata: notes\nsites: [east, north, south]\n"
    shared = "epsilon: 3\nshared_noise: true\nsmallest_site: 20\n"
    for text, why in (
        ("- a list", "model: Field required"),
        (good, "names its epsilon"),
        (good + "epsilon: 3\nrounds: many\n", "rounds"),
        (good + "epsilon: 3\nwhat: 1\n", "what"),
        (good + "epsilon: 3\nminimum_sites: 2\n", "below the threshold"),
        (good.replace("south", "west") + "epsilon: 3\n", "west"),
        (good.replace("tiny", "none") + "epsilon: 3\n", "none"),
        (good.replace(", south", "") + "epsilon: 3\n", "secure aggregation takes 3 sites"),
        (good + "epsilon: 3\nshared_noise: true\n", "smallest_site: UNITS` go together"),
        (good + "epsilon: 3\nsmallest_site: 20\n", "go together"),
        (good + shared + "secure_aggregation: false\n", "only sums have it"),
        (good + shared + "colluding_sites: 2\n", "of 3 sites 1 to 1 may collude, not 2"),
        (good + shared + "colluding_sites: 0\n", "of 3 sites 1 to 1 may collude, not 0"),
        (good + "epsilon: 3\nlocal_steps: 0\n", "local_steps: "),
        (good + "epsilon: 3\nminimum_sites: 0\n", "minimum_sites: "),
        (good + "epsilon: 3\nbits: 0\n", "bits: "),
        (good + "epsilon: 3\nbits: 2\n", "bits: "),
        (good + "epsilon: 3\nbatch: 0\n", "batch: "),
        (good + "epsilon: 3\nserver_learning_rate: 0\n", "server_learning_rate: "),
        (good + 'epsilon: 3\npurpose: "\\e[2Jtraining"\n', "purpose: "),
        (good + shared + "local_steps: 4\n", "steps 1"),
        (good + shared + "bits: 8\n", "always have 32"),
        (good + shared + "proximal: 0.1\n", "proximal 0"),
        ("a: [", "cannot be read as YAML"),
    ):
        file.write_text(text)
        refused = typed("federate", "-f", str(file))
        assert refused.status != 0, text
        assert why in refused.err, (text, refused.err)
    assert "say which job" in typed("federate").err
    assert typed("federate", "ls", "--json").value == before


def test_who_has_joined_nothing_takes_part_in_nothing(tmp_path: Path, typing: Typing) -> None:
    with kernel_at(tmp_path / "home"):
        pass
    typed = typing(tmp_path / "home")
    alone = typed("site", "up")
    assert "joined 0 federations" in alone.err
    assert "llmos site join" in alone.err
    assert "not the CA" in (said := typed("coordinator", "up")).err or said.status != 0


def test_a_coordinator_is_of_the_organisation_whose_ca_it_is(
    tmp_path: Path, typing: Typing
) -> None:
    with kernel_at(tmp_path / "home"):
        pass
    typed = typing(tmp_path / "home")
    typed("party", "ca", "create", "research.example")
    other = typed("coordinator", "up", "--organisation", "bank.example", "--port", "0")
    assert other.status != 0
    assert "this home is the CA of research.example already" in other.err
    assert "leave --organisation out" in other.err


def test_what_a_coordinator_wrote_does_nothing_to_a_terminal(
    job: Job, typing: Typing, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed, job_id = typing(job.folder / "east"), job.signed.manifest.id
    real = invitations.facts
    evil = "training\r\x1b[2K"
    monkeypatch.setattr(
        invitations,
        "facts",
        lambda one: real(one) | {"manifest": real(one)["manifest"] | {"purpose": evil}},
    )
    shown = typed("site", "show", job_id).out
    assert r"training\r\x1b[2K" in shown
    assert not {"\r", "\x1b"} & set(shown)
