"""What gradient inversion recovers of a site's messages, as tables and the page show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

INVERSION_SCHEMA: Final = "llmos.inversion-report/v1"
COLUMNS: Final = ("what is seen of one record", "tokens recovered", "by noise", "p", "AUC")
SEEN: Final = {
    "gradient": "gradient, in the clear (control)",
    "sent": "one step's update, in the clear",
    "unmasked": "gradient as integers, before the mask",
    "masked": "gradient behind the mask",
    "private": "one private step's update, in the clear",
}
P_VALUES: Final = (
    f"the chance p that noise recovers as much is exact in the row '{SEEN['masked']}', which is "
    "noise if masks hide; in the other rows it is for comparison"
)
MEANING: Final = {
    "pass": "behind the mask this attack sees nothing, and the same integers without it give "
    "tokens away; that this attack fails does not show that every one does",
    "fail": "the masks do not hide what is behind them: secure aggregation is broken here",
    "no-masks": "the job has no masks: its coordinator sees each site's update",
    "proves-nothing": "without the mask the attack does not recover enough either, or the records "
    "are too few: that nothing is seen behind it says nothing",
}


@dataclass(frozen=True, slots=True)
class Inversion:
    """A site's attack on its own messages, in words and rows."""

    rows: tuple[tuple[str, ...], ...]  # under `COLUMNS`
    coordinator_sees: str  # which row it is
    sample: str
    uniformity: str
    verdict: str
    meaning: str
    failed: bool

    @property
    def statements(self) -> tuple[str, ...]:
        """Return what stands under the table."""
        return (
            f"the coordinator of this job sees: {self.coordinator_sees}",
            self.sample,
            P_VALUES,
            self.uniformity,
        )


def read(document: Mapping[str, Any]) -> Inversion:
    """Read the JSON document of an inversion report.

    Raises:
        KeyError, TypeError, ValueError: it is none, or of another version.
    """
    if document["schema"] != INVERSION_SCHEMA:
        raise ValueError("the inversion report is not of version 1")
    verdict, uniformity = document["verdict"], document["uniformity"]
    return Inversion(
        rows=tuple(_row(arm) for arm in document["arms"]),
        coordinator_sees=SEEN[document["coordinator_sees"]],
        sample=_sample(document["sample"], can_fail=document["guesses_can_fail"]),
        uniformity=f"masked integers against uniform ones (chi-square): p = "
        f"{uniformity['p_value']:.2g} over {uniformity['integers']:,}",
        verdict=verdict.upper(),
        meaning=MEANING[verdict],
        failed=verdict == "fail",
    )


def _row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        SEEN[arm["observation"]],
        f"{arm['recall']:.1%} of {arm['tokens']}",
        f"{arm['chance']:.2%}",
        f"{arm['p_value']:.1g}",
        f"{arm['auc']:.3f}",
    )


def _sample(sample: Mapping[str, Any], *, can_fail: bool) -> str:
    said = (
        f"{sample['used']} of {sample['offered']} records were used, each alone in one step and "
        f"cut to at most {sample['cut_to']} distinct tokens, for a longer one escapes this attack"
    )
    return said if can_fail else f"{said}; so few cannot fail the masks by guesses"
