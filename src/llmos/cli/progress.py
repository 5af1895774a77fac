"""The live bar of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmos.cli.session import console

if TYPE_CHECKING:
    from llmos.workflows.training_view import StepView

# Without a terminal (a log file, CI) a line is printed at each tenth of the run instead of a bar.
_LINES = 10


@contextmanager
def training_progress(steps: int, *, quiet: bool) -> Iterator[Callable[[StepView], None]]:
    """Yield the callback that shows a step: loss where allowed, epsilon spent, speed, time left."""
    out = console()
    if quiet:
        yield lambda _view: None
    elif out.is_terminal:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=out) as progress:
            task = progress.add_task("train", total=steps, facts="starting")

            def show(view: StepView) -> None:
                progress.update(task, completed=view.step, facts=facts(view))

            yield show
    else:

        def print_line(view: StepView) -> None:
            if view.step == steps or view.step % max(1, steps // _LINES) == 0:
                out.print(
                    f"  step {view.step}/{steps}  {facts(view)}  {view.seconds_left:.0f} s left"
                )

        yield print_line


def facts(view: StepView) -> str:
    """Describe one step in a line."""
    loss = "loss hidden" if view.loss is None else f"loss {view.loss:.3f}"
    epsilon = "no privacy" if view.epsilon is None else f"epsilon {view.epsilon:.2f}"
    return f"{loss}  {epsilon}  {view.tokens_per_s:.0f} tokens/s"
