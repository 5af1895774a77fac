"""The progress of a training: what one step says, and when a line is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmos.cli.progress import facts, training_progress
from llmos.workflows.training_view import StepView

VIEW = StepView(step=1, steps=40, loss=2.5, epsilon=1.25, tokens_per_s=812.4, seconds_left=9.6)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (VIEW, "loss 2.500  epsilon 1.25  812 tokens/s"),
        (replace(VIEW, loss=None), "loss hidden  epsilon 1.25  812 tokens/s"),
        (replace(VIEW, epsilon=None), "loss 2.500  no privacy  812 tokens/s"),
    ],
)
def test_facts_never_show_a_hidden_loss_or_claim_privacy_that_is_none(
    view: StepView, said: str
) -> None:
    assert facts(view) == said


@pytest.mark.parametrize(
    ("steps", "printed"),
    [(40, list(range(4, 41, 4))), (3, [1, 2, 3]), (25, [*range(2, 25, 2), 25]), (1, [1])],
)
def test_without_a_terminal_a_line_is_printed_now_and_then_and_at_the_end(
    capsys: pytest.CaptureFixture[str], steps: int, printed: list[int]
) -> None:
    with training_progress(steps, quiet=False) as show:
        for step in range(1, steps + 1):
            show(replace(VIEW, step=step, steps=steps))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  step {n}/{steps}  {facts(VIEW)}  10 s left" for n in printed]


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with training_progress(1, quiet=True) as show:
        show(replace(VIEW, steps=1))
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_bar_shows_the_last_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with training_progress(2, quiet=False) as show:
        for step in (1, 2):
            show(replace(VIEW, step=step, steps=2))
    out = capsys.readouterr().out
    assert "step 2/2" in out
    assert facts(VIEW) in out
