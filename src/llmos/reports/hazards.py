"""The checklist of hazards: what undoes guarantees in practice, and what the records say of it.

The topics are those that NIST SP 800-226 warns of (its "privacy hazards"); the words are ours.
"""

from __future__ import annotations

from typing import Any, Final

from llmos.reports.arms import at_most
from llmos.reports.sentences import Predicate, Sentence, sentence

COVERED: Final = "covered"  # a record shows it
RESIDUAL: Final = "residual"  # known and not closed
OPEN: Final = "open"  # only a person can say, and nobody has
ANSWERED: Final = "answered"  # a person has said

_REASONABLE_EPSILON: Final = 10.0  # arXiv:2303.00654, section 5.1


def hazards(predicate: Predicate) -> list[dict[str, Any]]:
    """Return every hazard with its state and the sentence that says why.

    Raises:
        KeyError, ValueError, TypeError: the predicate lacks a record.
    """
    p = predicate
    return [
        _person(p, "unit", "The unit is less than a person"),
        _epsilon(p),
        _delta(p),
        _hazard(
            COVERED,
            "Losses add up unseen, or the budget starts anew",
            sentence(
                p,
                "composition",
                "One pool for the lifetime of {0}, never refilled by time; a cap is raised by two "
                "people only. Theorem: {1}.",
                "/data/name",
                "/budget/theorem",
                "/budget/charged",
                "/records/settle",
            ),
        ),
        _person(p, "overlap", "The same people are in other data"),
        _person(p, "lineage", "Data were made from data whose budget was not charged"),
        _person(p, "preparation", "Data or settings were chosen by looking at the records"),
        _hazard(
            COVERED,
            "Sampling is not what the theorem assumes",
            sentence(
                p,
                "sampling",
                "{0}; probability {1}.",
                "/algorithm/sampler",
                "/algorithm/mechanism/sampling_probability",
                "/records/fit",
            ),
        ),
        _hazard(
            COVERED,
            "Contributions are not bounded as claimed",
            sentence(
                p,
                "clipping",
                "Clip norm {0} for each {1}; self-test against ordinary gradients: {2}.",
                "/algorithm/clip_norm",
                "/guarantee/unit",
                "/implementation/self_test",
                "/records/fit",
            ),
        ),
        _randomness(p),
        _implementation(p),
        _hazard(
            RESIDUAL,
            "Floating-point noise",
            sentence(
                p,
                "floating-point",
                "{0}; no discrete mechanism, so the lowest bits are not covered by the proof.",
                "/implementation/dtype_path",
            ),
        ),
        _hazard(
            RESIDUAL,
            "Timing and other side channels",
            sentence(p, "timing", "{0}", "/not_protected/7"),
        ),
        _hazard(
            RESIDUAL,
            "Figures are published beside the protected product",
            sentence(p, "figures", "{0} {1}", "/not_protected/3", "/not_protected/9"),
        ),
        _person(p, "operator", "The operator sees the raw data"),
        _person(p, "consent", "The data should not have been collected or used"),
        _person(p, "actors", "Those who use the model can combine it with more"),
    ]


def _hazard(state: str, hazard: str, said: Sentence) -> dict[str, Any]:
    return {"id": said["id"], "hazard": hazard, "state": state, **said}


def _person(p: Predicate, question: str, hazard: str) -> dict[str, Any]:
    if question not in p["answers"]:
        said = sentence(p, question, f"Open question: {question}.", "/answers")
        return _hazard(OPEN, hazard, said)
    said = sentence(
        p,
        question,
        "{0} says: {1}",
        f"/answers/{question}/answered_by",
        f"/answers/{question}/answer",
    )
    return _hazard(ANSWERED, hazard, said)


def _epsilon(p: Predicate) -> dict[str, Any]:
    large = float(p["guarantee"]["epsilon"]) > _REASONABLE_EPSILON
    template = (
        "Epsilon {0} is more than 10: weak as a formal guarantee."
        if large
        else "Epsilon {0} is at most 10, the range of most deployed models (arXiv:2303.00654)."
    )
    said = sentence(p, "epsilon", template, ("/guarantee/epsilon", at_most))
    return _hazard(RESIDUAL if large else COVERED, "Epsilon is too large to mean much", said)


def _delta(p: Predicate) -> dict[str, Any]:
    large = float(p["guarantee"]["delta"]) * int(p["data"]["units"]) >= 1
    template = (
        "Delta {0} is not below one over the {1} units: one of them could be published whole."
        if large
        else "Delta {0} is below one over the {1} units."
    )
    said = sentence(p, "delta", template, "/guarantee/delta", "/data/units")
    return _hazard(
        RESIDUAL if large else COVERED, "Delta allows the whole record of somebody", said
    )


def _randomness(p: Predicate) -> dict[str, Any]:
    fresh = p["implementation"]["production"]
    template = "Key from {0}." if fresh else "A seed was given: {0}. The noise can be taken away."
    said = sentence(
        p,
        "randomness",
        template,
        "/implementation/randomness",
        "/implementation/production",
    )
    return _hazard(COVERED if fresh else RESIDUAL, "The noise can be guessed", said)


def _implementation(p: Predicate) -> dict[str, Any]:
    measured = p["measured_leakage"]
    tested = measured is not None and measured["epsilon_lower_bound"] is not None
    said = (
        sentence(
            p,
            "implementation",
            "Attacked with canaries: {0}.",
            "/measured_leakage/verdict",
            "/records/measure",
        )
        if tested
        else sentence(p, "implementation", "Not attacked with canaries.", "/measured_leakage")
    )
    return _hazard(
        COVERED if tested else RESIDUAL, "The code does not do what the proof assumes", said
    )
