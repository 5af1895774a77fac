"""A site's own adapter on top of a federated one: what it is, what it costs and what it may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch
from sqlalchemy import update
from tests.certified import Job, with_adapter
from tests.homes import TRAINING, last_records, log_size
from tests.unit.federations.test_manifest import SHARED

from llmos.errors import JobInterrupted, ModelError, PermissionDenied
from llmos.kernel import accounting
from llmos.kernel.policy import Action
from llmos.models import lora, tables
from llmos.models.loading import load_base
from llmos.reports.arms import at_most
from llmos.system import System
from llmos.workflows import composition
from llmos.workflows.origin import guarantee, origin
from llmos.workflows.training_plan import TrainPlan
from llmos.workflows.training_view import StepView

RANK = TRAINING["rank"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Job]:
    with ExitStack() as stack:
        made = with_adapter(tmp_path_factory.mktemp("job"), tiny_model_folder, stack, holdout=0.4)
        publish(made, "global")
        publish(made, "open", private=False)
        publish(made, "elsewhere", dataset="wards")
        publish(made, "handed", dataset=None)
        publish(made, "local", federated=None)
        yield made


def publish(job: Job, name: str, **changes: Any) -> None:
    """Enter the federated adapter at east once more, with weights and with another card."""
    east = job.sites["east"]
    model = load_base(job.model, torch.device("cpu")).model
    adapter = lora.attach(model, lora.LoraConfig(rank=12, alpha=24), seed=7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    object_id, digest = east.registry.store_adapter(lora.to_peft(adapter, "tiny"))
    changed = {**east.registry.model(job.signed.manifest.output).card, **changes}
    card = {key: value for key, value in changed.items() if value is not None}
    home = east.kernel.home
    with east.kernel.monitor.act(east.who, Action.MANAGE_VAULT, home, details={}) as conn:
        east.registry.publish_adapter(
            conn, name=name, base="tiny", object_id=object_id, digest=digest, card=card
        )


def plan(job: Job, model: str, **changes: Any) -> TrainPlan:
    units = job.sites["east"].datasets.card("notes").units_left
    options = TRAINING | {"model": model, "epsilon": 1.0, "batch": units, "delta": 1e-4}
    return job.sites["east"].plan(**(options | changes))


def tensors(system: System, name: str) -> dict[str, torch.Tensor]:
    entry = system.registry.model(name)
    with system.kernel.monitor.admit(
        system.who,
        Action.CHAT,
        entry.resource,
        key=f"look-{name}",
        objects={entry.location},
        charge=None,
    ) as grant:
        files = system.registry.open_adapter(name, grant)
    return safetensors.torch.load(files[lora.WEIGHTS_FILE])


def test_it_is_the_sum_of_both_and_charged_like_any_training(job: Job) -> None:
    east = job.sites["east"]
    made = plan(job, "global")
    own = made.request.plan.mechanism
    assert own is not None
    before = east.kernel.budget.pool("notes").spent
    result = east.jobs.resume(east.submit(made))
    assert result["model"] == "global-personal"
    costs = east.kernel.budget.reservation(_job(east)).costs
    assert costs == {pool.id: cost for pool, cost in made.charges}
    pool, again = east.kernel.budget.pool("notes"), east.kernel.budget.recompute("notes")
    assert pool.spent == again.spent == before + costs["notes"]
    first, both = tensors(east, "global"), tensors(east, "global-personal")
    assert both.keys() == first.keys()
    for key, factor in first.items():
        if "lora_A" in key:
            assert torch.equal(both[key][:12], factor)
            assert both[key].shape[0] == 12 + RANK
        else:
            torch.testing.assert_close(both[key][:, :12], 2 * factor)
            assert bool(both[key][:, 12:].any())
    entry = east.registry.model("global-personal")
    assert entry.base == "tiny"
    assert entry.card["classification"] == "sensitive"
    assert east.registry.folder(east.registry.model("tiny")).exists()


def _job(system: System) -> str:
    return str(system.registry.model("global-personal").card["job"])


def test_its_guarantee_is_of_both_trainings(job: Job) -> None:
    east = job.sites["east"]
    entry = east.registry.model("global-personal")
    made = origin(entry)
    federated = job.signed.manifest.id
    assert (made.dataset, made.earlier) == ("notes", federated)
    loss = guarantee(made, east.parts)
    assert loss is not None
    mechanisms = [east.kernel.budget.reservation(key).mechanism for key in (made.job, federated)]
    assert loss.epsilon == composition.epsilon(mechanisms, 1e-4)
    alone = [accounting.epsilon(one, 1e-4) for one in mechanisms]
    assert loss.epsilon > max(alone)
    assert entry.card["epsilon"] == loss.epsilon


def test_the_plan_says_what_is_lost_in_all(job: Job) -> None:
    made = plan(job, "global", output="other")
    assert made.epsilon is not None
    assert made.epsilon_in_all is not None
    assert made.epsilon_in_all > made.epsilon
    lines = made.lines()
    assert lines["in all"].startswith(f"epsilon {made.epsilon_in_all:.3f} with what global has")
    assert lines["model"].startswith("global (tiny) -> other, LoRA rank 4")
    fields = made.to_dict()
    assert fields["epsilon_in_all"] == made.epsilon_in_all
    assert (fields["model"], fields["start"]["model"]) == ("tiny", "global")


def test_the_plan_says_against_whom_the_noise_that_was_shared_holds(job: Job) -> None:
    alone = plan(job, "global", output="other")
    assert alone.colluding_sites is None
    assert "shared their noise" not in alone.lines()["in all"]
    manifest = job.signed.manifest.model_dump(mode="json")
    publish(job, "shared", federated={**manifest, **SHARED})
    made = plan(job, "shared", output="other")
    assert made.to_dict()["colluding_sites"] == 1
    assert made.lines()["in all"].endswith(
        "; its sites shared their noise: against its coordinator with at most 1 of them, "
        "not with more"
    )


def test_what_it_starts_from_is_in_the_log(job: Job) -> None:
    east, made = job.sites["east"], plan(job, "global", output="logged")
    job_id = east.submit(made)
    (record,) = last_records(east, 1)
    assert record["details"]["job"] == job_id
    start = made.request.start
    assert start is not None
    assert record["details"]["starts_from"] == {
        "model": "global",
        "digest": east.registry.model("global").digest,
        "job": job.signed.manifest.id,
        "learnt": True,
        "private": True,
    }
    east.jobs.cancel(job_id)


def test_after_an_interruption_it_is_the_same(job: Job) -> None:
    east, digests = job.sites["east"], []
    for output in ("straight", "broken"):
        made = plan(job, "global", output=output, seed=3, checkpoint_every_s=0)
        job_id = east.submit(made)
        if output == "broken":
            stop = Event()

            def at_four(view: StepView, stop: Event = stop) -> None:
                if view.step == 4:
                    stop.set()

            with pytest.raises(JobInterrupted):
                east.jobs.resume(job_id, interrupt=stop, on_step=at_four)
        east.jobs.resume(job_id)
        digests.append(east.registry.model(output).digest)
    assert digests[0] == digests[1]


def test_it_learns_on_top_of_what_it_starts_from(job: Job) -> None:
    east = job.sites["east"]
    for model, output in (("global", "on-top"), ("tiny", "alone")):
        east.jobs.resume(east.submit(plan(job, model, output=output, seed=4)))
    alone, both = tensors(east, "alone"), tensors(east, "on-top")
    own = {key: b[:, 12:] for key, b in both.items() if "lora_B" in key}
    assert own
    # the same noise and the same records, and another gradient
    assert not any(torch.equal(b, 2 * alone[key]) for key, b in own.items())
    assert all(torch.allclose(b, 2 * alone[key], atol=0.02) for key, b in own.items())


def test_nothing_is_guaranteed_on_top_of_what_learnt_the_same_without_privacy(job: Job) -> None:
    east, made = job.sites["east"], plan(job, "open")
    assert made.epsilon_in_all is None
    assert made.lines()["in all"] == "NONE: open has learnt the same data without privacy"
    east.jobs.resume(east.submit(made))
    entry = east.registry.model("open-personal")
    assert guarantee(origin(entry), east.parts) is None
    assert entry.card["epsilon"] is None
    assert entry.resource.attributes["private"] is False


def test_what_has_learnt_no_data_of_this_home_adds_nothing(job: Job) -> None:
    made = plan(job, "handed", output="mine")
    assert made.epsilon_in_all is None
    assert "in all" not in made.lines()
    east = job.sites["east"]
    east.jobs.resume(east.submit(made))
    entry = east.registry.model("mine")
    loss = guarantee(origin(entry), east.parts)
    assert loss is not None
    assert loss.epsilon == made.epsilon == entry.card["epsilon"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("local", "is an adapter; training starts from a base model or from a federated one"),
        ("elsewhere", "elsewhere has learnt from wards; .* learns from the same"),
    ],
)
def test_it_starts_from_no_other_adapter(job: Job, model: str, why: str) -> None:
    entries = log_size(job.sites["east"])
    with pytest.raises(ModelError, match=why):
        plan(job, model)
    assert log_size(job.sites["east"]) == entries


def test_who_may_not_use_the_model_may_not_start_from_it(job: Job) -> None:
    east = job.sites["east"]
    made = plan(job, "global", output="never", purpose="advertising")
    pool, jobs = east.kernel.budget.pool("notes"), len(east.parts.jobs.jobs())
    with pytest.raises(PermissionDenied, match="Model::global"):
        east.submit(made)
    after = east.kernel.budget.pool("notes"), len(east.parts.jobs.jobs())
    assert after == (pool, jobs)
    (record,) = last_records(east, 1)
    assert (record["action"], record["outcome"]) == ("chat", "denied")


def test_another_model_under_its_name_is_not_taken_for_it(job: Job) -> None:
    east = job.sites["east"]
    publish(job, "fleeting")
    job_id = east.submit(plan(job, "fleeting", output="lost"))
    row = tables.models.c.name == "fleeting"
    with east.kernel.store.transaction() as conn:
        conn.execute(update(tables.models).where(row).values(digest="ab" * 32))
    with pytest.raises(ModelError, match="fleeting is another model than when"):
        east.jobs.resume(job_id)
    assert "lost" not in {entry.name for entry in east.registry.models()}


def test_it_gets_a_page_and_no_certificate(job: Job) -> None:
    east = job.sites["east"]
    east.measure("global-personal")
    files = east.report("global-personal")
    assert files.certificate is None
    assert files.reason == (
        "global-personal starts from global, and a certificate is of one training"
    )
    loss = guarantee(origin(east.registry.model("global-personal")), east.parts)
    assert loss is not None
    page = files.page.read_text()
    assert at_most(loss.epsilon) in page
    assert "No guarantee." not in page
    assert f"{files.reason}. Nothing on this page is certified" in page
