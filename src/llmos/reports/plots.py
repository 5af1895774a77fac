"""Figures as self-contained SVG text: the same input gives the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llmos.reports.arms import Arm, Attack, at_least, at_most

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#1f2933"
MUTED: Final = "#7b8794"
GRID: Final = "#e4e7eb"
COLOURS: Final = ("#0b7285", "#c92a2a", "#5f3dc4", "#e67700")  # the certified model comes first
UNPLANTED: Final = "#adb5bd"
CONFIDENCE_Z: Final = 1.96  # two-sided 95 % of a normal

_STYLE: Final = {
    "svg.fonttype": "path",  # looks alike wherever it is opened
    "svg.hashsalt": "llmos",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a model may be called $x$
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def leak_comparison(arms: Sequence[Arm]) -> str:
    """Draw how far each attack gets on each model, beside what chance would give."""
    with _figure(7.4, 3.0) as figure:
        extraction, secrets, records = figure.subplots(1, 3)
        _bars(
            extraction,
            [None if arm.secrets is None else 100 * arm.secrets.extraction_planted for arm in arms],
            shown="{:.0f} %",
        )
        extraction.set(title="Secret given back verbatim", ylabel="% of planted", ylim=(0, 115))
        _attacks(secrets, [None if arm.secrets is None else arm.secrets.attack for arm in arms])
        secrets.set_title("Was this secret planted?")
        _attacks(records, [arm.records for arm in arms])
        records.set_title("Was this record used?")
        _legend(figure, arms)
        figure.tight_layout(rect=(0, 0.09, 1, 1), w_pad=2.0)
        return _svg(figure, "leak-comparison")


def secret_distributions(arms: Sequence[Arm]) -> str:
    """Draw how many bits each model needs to write down planted and unplanted secrets."""
    with _figure(7.4, 0.7 + 1.35 * len(arms)) as figure:
        rows = figure.subplots(len(arms), 1, sharex=True, squeeze=False)[:, 0]
        every = [
            bits
            for arm in arms
            if arm.secrets is not None
            for bits in (
                *arm.secrets.code_length_bits_planted,
                *arm.secrets.code_length_bits_unplanted,
            )
        ]
        edges = np.linspace(0, max(every, default=1.0) * 1.02, 41)
        for position, (axes, arm) in enumerate(zip(rows, arms, strict=True)):
            axes.set_title(arm.label)
            axes.set_ylabel("secrets")
            if arm.secrets is None:
                axes.text(0.5, 0.5, "no canaries", transform=axes.transAxes, ha="center")
                continue
            unplanted, planted = (
                arm.secrets.code_length_bits_unplanted,
                arm.secrets.code_length_bits_planted,
            )
            axes.hist(
                unplanted, edges, histtype="stepfilled", color=UNPLANTED, label="never planted"
            )
            axes.hist(
                planted,
                edges,
                histtype="stepfilled",
                color=COLOURS[position % 4],
                alpha=0.75,
                label="planted in training",
            )
            axes.legend(loc="upper right")
        rows[-1].set_xlabel("code length of the secret under the model, bits (0: known by heart)")
        figure.tight_layout()
        return _svg(figure, "secret-distributions")


def epsilon_scale(arms: Sequence[Arm]) -> str:
    """Draw the measured lower bound on epsilon against the guaranteed upper bound."""
    shown = [arm for arm in arms if arm.epsilon_lower is not None]
    with _figure(7.4, 0.7 + 0.65 * max(1, len(shown))) as figure:
        axes = figure.subplots()
        limit = max([1.0, *(arm.epsilon or 0.0 for arm in shown), *_lowers(shown)]) * 1.45
        for row, arm in enumerate(shown):
            lower, colour = float(arm.epsilon_lower or 0.0), COLOURS[row % 4]
            upper = limit if arm.epsilon is None else arm.epsilon
            axes.barh(row, upper - lower, left=lower, height=0.34, color=colour, alpha=0.18)
            axes.plot([lower, lower], [row - 0.24, row + 0.24], color=colour, linewidth=2.5)
            axes.text(
                lower,
                row - 0.34,
                f"measured: at least {at_least(lower)} ({arm.confidence:.0%} confidence)",
                color=colour,
            )
            if arm.epsilon is None:
                axes.text(limit, row, "no upper limit ", ha="right", va="center", color=MUTED)
            else:
                axes.plot([upper, upper], [row - 0.24, row + 0.24], color=INK, linewidth=2.5)
                axes.text(upper, row, f"  proven: at most {at_most(upper)}", va="center")
        axes.set(xlim=(0, limit), ylim=(max(1, len(shown)) - 0.4, -0.6), xlabel="epsilon")
        axes.set_yticks(range(len(shown)), [arm.model for arm in shown])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.tight_layout()
        return _svg(figure, "epsilon-scale")


def epsilon_spent(points: Sequence[tuple[int, float]], limit: float) -> str:
    """Draw the epsilon that had been spent after so many steps, up to the guaranteed one.

    Args:
        points: (steps, epsilon) pairs in rising order.
        limit: the guaranteed epsilon.
    """
    with _figure(7.4, 2.3) as figure:
        axes = figure.subplots()
        steps, spent = zip(*points, strict=True)
        axes.plot(steps, spent, color=COLOURS[0], linewidth=2, marker="o", markersize=3.5)
        axes.fill_between(steps, spent, color=COLOURS[0], alpha=0.1)
        axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(steps[0], limit * 1.03, f"guaranteed: {at_most(limit)}")
        axes.set(xlabel="training steps", ylabel="epsilon spent", ylim=(0, limit * 1.2))
        axes.grid(axis="y", color=GRID)
        figure.tight_layout()
        return _svg(figure, "epsilon-spent")


def _lowers(arms: Sequence[Arm]) -> list[float]:
    return [arm.epsilon_lower for arm in arms if arm.epsilon_lower is not None]


def _bars(
    axes: Axes,
    values: Sequence[float | None],
    *,
    shown: str,
    errors: Sequence[float] | None = None,
) -> None:
    """Draw one labelled bar a model; a missing value says so instead of standing as zero."""
    reach = errors or [0.0] * len(values)
    for position, (value, error) in enumerate(zip(values, reach, strict=True)):
        if value is None:
            axes.text(position, 0, "not\nmeasured", ha="center", va="bottom", color=MUTED)
            continue
        axes.bar(position, value, width=0.62, color=COLOURS[position % 4])
        if error:
            axes.errorbar(position, value, yerr=error, color=INK, capsize=3, linewidth=1)
        axes.annotate(
            shown.format(value),
            (position, value + error),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
        )
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(values) + 0.0)  # room on the right for the word "chance"
    axes.grid(axis="y", color=GRID)


def _attacks(axes: Axes, attacks: Sequence[Attack | None]) -> None:
    """Draw AUCs with 95 % intervals and the line of chance."""
    _bars(
        axes,
        [None if attack is None else attack.auc for attack in attacks],
        shown="{:.2f}",
        errors=[
            0.0 if attack is None else CONFIDENCE_Z * attack.standard_error for attack in attacks
        ],
    )
    axes.axhline(0.5, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(len(attacks) - 0.02, 0.51, "chance", ha="right", va="bottom", fontsize=8)
    axes.set(ylabel="AUC", ylim=(0, 1.15), yticks=[0, 0.25, 0.5, 0.75, 1])


def _legend(figure: Figure, arms: Sequence[Arm]) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415 - only this module draws

    handles = [Patch(color=COLOURS[i % 4], label=arm.label) for i, arm in enumerate(arms)]
    figure.legend(handles=handles, loc="lower center", ncols=max(1, len(arms)))


@contextmanager
def _figure(width_in: float, height_in: float) -> Iterator[Figure]:
    """Make a figure of its own: nothing global is touched and no display is needed."""
    import matplotlib as mpl  # noqa: PLC0415 - takes a third of a second
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(dict[str, Any](_STYLE)):
        yield Figure(figsize=(width_in, height_in))


def _svg(figure: Figure, name: str) -> str:
    """Write the figure as SVG whose ids are its own, so that several can share one page."""
    sink = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(sink, format="svg", metadata=nothing)
    text = sink.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name.replace("-", " ")}" ', 1)
