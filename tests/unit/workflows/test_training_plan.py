from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
from pydantic import ValidationError
from tests.homes import TRAINING, UNITS, checked_books, log_size

from llmos.errors import (
    ConfigError,
    InvalidPrivacyParameter,
    LlmosError,
    ModelError,
    ModelExists,
    UnknownDataset,
    UnknownModel,
)
from llmos.kernel import accounting
from llmos.system import System
from llmos.workflows.training_plan import TrainOptions, TrainPlan, make_plan


def plan(system: System, **changes: Any) -> TrainPlan:
    return make_plan(TrainOptions(**(TRAINING | changes)), system.parts)


def test_a_plan_promises_no_more_than_was_asked_for(system: System) -> None:
    made = plan(system)
    mechanism = made.request.plan.mechanism
    assert mechanism is not None
    assert made.epsilon == accounting.epsilon(mechanism, 1e-5)
    assert 2.9 < made.epsilon <= 3.0
    assert made.epsilon_replace_one is not None
    assert made.epsilon_replace_one > made.epsilon
    assert (mechanism.sampling_probability, mechanism.steps) == (1.0, 8)
    ((pool, cost),) = made.charges
    assert pool == system.kernel.budget.pool("notes")
    assert cost == system.kernel.budget.cost("notes", mechanism)
    assert made.request.output == "notes-private"
    assert made.request.delta == pool.delta == 1e-5


def test_planning_changes_nothing_and_opens_no_data(system: System) -> None:
    before, entries = checked_books(system), log_size(system)
    shutil.move(system.kernel.config.home / "objects", system.kernel.config.home / "away")
    plan(system)
    shutil.move(system.kernel.config.home / "away", system.kernel.config.home / "objects")
    assert (checked_books(system), log_size(system)) == (before, entries)


def test_defaults_come_from_the_data(system: System) -> None:
    defaults = plan(system, steps=None, batch=None, epochs=3).request
    assert (defaults.batch, defaults.steps) == (16, math.ceil(3 * UNITS / 16))
    plain = plan(system, private=False, epsilon=None, batch=None, steps=None, epochs=1e-9)
    assert (plain.request.batch, plain.steps) == (16, 1)
    assert (plain.request.output, plain.request.delta) == ("notes-nonprivate", None)


def test_a_plan_without_privacy_says_so(system: System) -> None:
    made = plan(system, private=False, epsilon=None)
    assert made.request.plan.mechanism is None
    assert (made.epsilon, made.epsilon_replace_one, made.charges) == (None, None, ())
    assert made.lines()["guarantee"].startswith("NONE")
    assert "budget" not in made.lines()


def test_what_people_and_programs_read(system: System) -> None:
    made = plan(system, last_layers=1)
    lines, fields = made.lines(), made.to_dict()
    assert "the last 1 blocks" in lines["model"]
    assert "all blocks" in plan(system).lines()["model"]
    assert f"{made.epsilon:.3f}" in lines["guarantee"]
    assert fields["epsilon_pld"] == made.epsilon
    (pool,) = fields["pools"]
    assert pool["pool"] == "notes"
    assert 0 < pool["share"] < pool["remaining_share"] == 1
    assert fields["predicted_s"] > 0


def test_speed_settings_leave_the_mechanism_equal(system: System) -> None:
    quick = plan(system, microbatch_tokens=64, checkpoint_every_s=0).request.plan
    assert quick == plan(system, microbatch_tokens=8192).request.plan
    assert quick.mechanism == plan(system).request.plan.mechanism


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epsilon": None}, InvalidPrivacyParameter),
        ({"epsilon": 0.0}, InvalidPrivacyParameter),
        ({"epsilon": -1.0}, InvalidPrivacyParameter),
        ({"epsilon": math.nan}, InvalidPrivacyParameter),
        ({"epsilon": math.inf}, InvalidPrivacyParameter),
        ({"delta": 0.0}, InvalidPrivacyParameter),
        ({"delta": 1.0}, InvalidPrivacyParameter),
        ({"delta": 2.0}, InvalidPrivacyParameter),
        ({"delta": math.nan}, InvalidPrivacyParameter),
        ({"private": False}, InvalidPrivacyParameter),  # an epsilon and no privacy
        ({"batch": UNITS + 1}, InvalidPrivacyParameter),
        ({"dataset": "nothing"}, UnknownDataset),
        ({"model": "nothing"}, UnknownModel),
        ({"output": "tiny"}, ModelExists),
        ({"output": "../objects"}, ModelError),
        ({"output": "Two Words"}, ModelError),
    ],
)
def test_a_plan_that_cannot_be(
    changes: dict[str, Any], error: type[LlmosError], system: System
) -> None:
    before = checked_books(system)
    with pytest.raises(error):
        plan(system, **changes)
    assert checked_books(system) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": math.inf},
        {"epochs": 0},
        {"steps": 0},
        {"steps": 10**30},
        {"clip": math.inf},
        {"clip": 0},
        {"learning_rate": math.inf},
        {"learning_rate": math.nan},
        {"checkpoint_every_s": math.inf},
        {"checkpoint_every_s": -1},
        {"microbatch_tokens": 1},
        {"seed": -1},
        {"unknown": 1},
    ],
)
def test_options_out_of_range_are_no_options(changes: dict[str, Any], system: System) -> None:
    with pytest.raises(ValidationError):
        TrainOptions(**(TRAINING | changes))
    with pytest.raises(ConfigError, match=next(iter(changes))):
        system.plan(**(TRAINING | changes))


def test_the_name_of_an_unfinished_jobs_model_is_taken(system: System) -> None:
    job_id = system.submit(plan(system))
    with pytest.raises(ModelExists, match=job_id) as caught:
        plan(system)
    assert f"llmos jobs resume {job_id}" in caught.value.hint
    plan(system, output="another")
    system.jobs.cancel(job_id)
    plan(system)


def test_an_adapter_is_no_base_model(system: System) -> None:
    with system.kernel.store.transaction() as conn:
        system.registry.publish_adapter(
            conn, name="tuned", base="tiny", object_id="0" * 32, digest="0" * 64, card={}
        )
    with pytest.raises(ModelError, match="tuned is an adapter") as caught:
        plan(system, model="tuned")
    assert "tiny" in caught.value.hint
