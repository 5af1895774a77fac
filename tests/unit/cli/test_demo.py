"""The pure parts of the demo; the whole of it is tests/e2e/test_demo.py and `make demo`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from llmos.cli import demo
from llmos.cli.main import llmos
from llmos.cli.train import train
from llmos.system import System
from llmos.workflows.leak_report import read_report
from llmos.workflows.training_plan import TrainOptions


@pytest.mark.parametrize("settings", [demo.LEAK_TRAINING, demo.USEFUL_TRAINING])
def test_the_settings_are_options_of_train(settings: str) -> None:
    arguments = ["--data", demo.LEAK, "--model", demo.MODEL, *shlex.split(settings)]
    context = train.make_context("train", arguments, **llmos.context_settings)
    given = {
        name: value
        for name, value in context.params.items()
        if name in TrainOptions.model_fields and value is not None
    }
    options = TrainOptions(**given)
    assert options.max_tokens == 96
    assert options.steps is not None


def test_without_and_with_privacy_the_demo_trains_with_the_same_settings() -> None:
    assert len({demo.NONPRIVATE, demo.PRIVATE, demo.USEFUL_MODEL}) == 3
    # Fewer than 100 canaries measure no true-positive rate at 1 % false positives.
    assert demo.CANARIES >= 100


def test_an_arms_figures_are_those_of_its_report(measured: System) -> None:
    report = read_report("private", measured.parts)
    figures = demo.arm_figures(report)
    assert report.canaries is not None
    assert report.bound is not None
    assert figures["extraction_rate"] == report.canaries.extraction_rate_planted
    assert figures["canary_auc"] == report.canaries.membership.auc
    assert figures["record_auc"] == report.records.headline.auc
    assert figures["epsilon_ledger"] == pytest.approx(3, abs=0.01)
    assert figures["epsilon_lower_bound"] == report.bound.lower
    assert figures["heldout_loss"] == report.quality.heldout_loss
    assert json.loads(json.dumps(figures)) == figures


def test_what_was_not_measured_is_none(measured: System) -> None:
    report = read_report("plain", measured.parts)
    figures = demo.arm_figures(replace(report, canaries=None, bound=None))
    assert {name for name, value in figures.items() if value is None} == {
        "extraction_rate",
        "canary_auc",
        "epsilon_ledger",
        "epsilon_lower_bound",
    }
