"""What a person may see of a running training: less than the engine knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from llmos.data.datasets import DatasetCard
from llmos.kernel import accounting
from llmos.privacy import Classification
from llmos.workflows.training_request import TrainRequest

if TYPE_CHECKING:
    from llmos.engines.dp.trainer import StepReport

_EPSILON_POINTS: Final = 8


@dataclass(frozen=True, slots=True)
class StepView:
    """What the live bar may show of one step."""

    step: int  # 1-based
    steps: int
    loss: float | None  # nats per token; None where the data's class forbids to show it
    epsilon: float | None  # charged so far at most; None without privacy
    tokens_per_s: float
    seconds_left: float


OnStep = Callable[[StepView], None]


@dataclass(slots=True)
class Viewer:
    """Turns an engine's step report into what the data's class allows to be shown."""

    request: TrainRequest
    card: DatasetCard
    on_step: OnStep
    _curve: dict[int, float] = field(default_factory=dict)
    _tokens: int = 0
    _seconds: float = 0.0
    _seen: int = 0

    def show(self, report: StepReport) -> None:
        """Show one step."""
        request = self.request
        self._tokens += report.tokens
        self._seconds += report.seconds
        self._seen += 1
        hidden = self.card.classification is Classification.SENSITIVE
        self.on_step(
            StepView(
                step=report.step,
                steps=request.steps,
                loss=None if hidden else report.mean_loss,
                epsilon=self._epsilon(report.step),
                tokens_per_s=self._tokens / max(self._seconds, 1e-9),
                seconds_left=self._seconds / self._seen * (request.steps - report.step),
            )
        )

    def _epsilon(self, step: int) -> float | None:
        """Return the epsilon of the next of a few points: never less than what was spent."""
        mechanism = self.request.plan.mechanism
        if mechanism is None:
            return None
        every = max(1, -(-self.request.steps // _EPSILON_POINTS))
        point = min(self.request.steps, -(-step // every) * every)
        if point not in self._curve:
            self._curve[point] = accounting.epsilon(
                mechanism.after(point), self.request.delta or 0.0
            )
        return self._curve[point]
