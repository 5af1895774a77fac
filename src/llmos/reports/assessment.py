"""The assessment: sentences along the pyramid of NIST SP 800-226, from the guarantee to the data.

The pyramid says that each layer holds only as far as those below it (figure 1 there: epsilon and
the unit of privacy; algorithms, utility, security and side channels; exposure in data collection).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from llmos.reports.arms import at_least, at_most
from llmos.reports.sentences import Predicate, Sentence, sentence

_LAYERS: Final = (
    ("guarantee", "top", "Epsilon and the unit of privacy"),
    ("algorithms", "middle", "Algorithms and their correctness"),
    ("utility", "middle", "Utility"),
    ("security", "middle", "Security and access control"),
    ("side-channels", "middle", "Side channels"),
    ("data", "bottom", "Exposure in data collection"),
)


def assess(predicate: Predicate) -> list[dict[str, Any]]:
    """Return the pyramid's layers, top first, each with the sentences that follow from records.

    Raises:
        KeyError, ValueError, TypeError: the predicate lacks a record.
    """
    said: dict[str, Sequence[Sentence]] = {
        "guarantee": _guarantee(predicate),
        "algorithms": _algorithms(predicate),
        "utility": _utility(predicate),
        "security": _security(predicate),
        "side-channels": _side_channels(predicate),
        "data": _data(predicate),
    }
    return [
        {"id": name, "level": level, "title": title, "sentences": list(said[name])}
        for name, level, title in _LAYERS
    ]


def _guarantee(p: Predicate) -> list[Sentence]:
    said = [
        sentence(
            p,
            "guarantee",
            "The training of {0} is ({1}, {2})-differentially private: epsilon at most {1}, delta "
            "{2}, for every {3}.",
            "/deployment/model",
            ("/guarantee/epsilon", at_most),
            "/guarantee/delta",
            "/guarantee/unit",
            "/records/settle",
        ),
        sentence(
            p,
            "unit",
            "One unit is all records that have the same value in the column {0}; neighbouring "
            "datasets: {1} of these.",
            "/guarantee/unit",
            "/guarantee/neighboring",
        ),
        sentence(
            p,
            "accountant",
            "Epsilon was calculated from the mechanism by {0}, in steps of {1} nats. Theorem: {2}.",
            "/guarantee/accountant",
            "/guarantee/discretization",
            "/guarantee/theorem",
            "/algorithm/mechanism",
        ),
        sentence(
            p,
            "pool",
            "All trainings on {0} together may reach epsilon {1} at delta {2}; of {3} units of "
            "{4} at Rényi order {5}, {6} were spent and {7} held when this was issued.",
            "/data/name",
            "/budget/epsilon",
            "/budget/delta",
            "/budget/cap",
            "/budget/divergence_unit",
            "/budget/renyi_order",
            "/budget/spent",
            "/budget/held",
        ),
        sentence(
            p,
            "charged",
            "This training was charged to: {0}. The balance above is that of {1} alone, not that "
            "of its ancestors or of the same people's data elsewhere.",
            "/budget/charged",
            "/data/name",
            "/records/settle",
        ),
        sentence(p, "composition", "Composition: {0}.", "/budget/theorem"),
    ]
    if p["guarantee"]["replace_one_epsilon"] is not None:
        said.insert(
            2,
            sentence(
                p,
                "replace-one",
                "Under replace-one adjacency the same training has epsilon at most {0}.",
                ("/guarantee/replace_one_epsilon", at_most),
                "/algorithm/mechanism",
            ),
        )
    return said


def _algorithms(p: Predicate) -> list[Sentence]:
    return [
        sentence(
            p,
            "mechanism",
            "{0}: in each of {1} steps every unit is drawn with probability {2}; Gaussian noise of "
            "{3} times the clip norm {4} is added to the sum of the clipped gradients.",
            "/algorithm/mechanism/type",
            "/algorithm/mechanism/steps",
            "/algorithm/mechanism/sampling_probability",
            "/algorithm/mechanism/noise_multiplier",
            "/algorithm/clip_norm",
            "/records/fit",
            "/records/settle",
        ),
        sentence(p, "sampler", "Sampling: {0}.", "/algorithm/sampler"),
        sentence(
            p, "parameters", "Other settings: {0}.", "/algorithm/parameters", "/records/fit"
        ),
        sentence(
            p,
            "model",
            "The product is one {0} on the base model {1} (licence {2}, SHA-256 {3}); its own "
            "SHA-256 is {4}.",
            "/algorithm/model_kind",
            "/algorithm/base_model/name",
            "/algorithm/base_model/licence",
            "/algorithm/base_model/digest/sha256",
            "/deployment/digest/sha256",
            "/records/publish",
        ),
        sentence(
            p,
            "program",
            "Run as job {0} by {1} of LLMOS {2}; self-test before the first step: {3}.",
            "/implementation/job",
            "/implementation/engine",
            "/implementation/llmos_version",
            "/implementation/self_test",
            "/records/fit",
        ),
        _randomness(p),
        sentence(
            p, "released", "What rests on the data and left the training: {0}.",
            "/implementation/released",
        ),
        _tested(p),
    ]  # fmt: skip


def _randomness(p: Predicate) -> Sentence:
    if p["implementation"]["production"]:
        return sentence(
            p,
            "randomness",
            "The random key was fresh, from {0}, and was not kept.",
            "/implementation/randomness",
            "/implementation/production",
        )
    return sentence(
        p,
        "randomness",
        "NOT FOR PRODUCTION: a seed was given ({0}); whoever knows it can take the noise away.",
        "/implementation/randomness",
        "/implementation/production",
    )


def _tested(p: Predicate) -> Sentence:
    measured = p["measured_leakage"]
    if measured is None or measured["epsilon_lower_bound"] is None:
        return sentence(
            p,
            "attacked",
            "No canary was planted or none was measured: no attack has tested this guarantee.",
            "/measured_leakage",
        )
    return sentence(
        p,
        "attacked",
        "An attack with {0} canaries shows epsilon to be at least {1} (confidence {2}): {3}. A "
        "measurement can refute the guarantee and never confirm it.",
        "/measured_leakage/epsilon_lower_bound/canaries",
        ("/measured_leakage/epsilon_lower_bound/lower", at_least),
        "/measured_leakage/epsilon_lower_bound/confidence",
        "/measured_leakage/verdict",
        "/records/measure",
    )


def _utility(p: Predicate) -> list[Sentence]:
    if p["measured_leakage"] is None:
        return [sentence(p, "utility", "Utility was not measured.", "/measured_leakage")]
    return [
        sentence(
            p,
            "utility",
            "On {0} held-out records the loss is {1} nats a token (base model: {2}); the whole "
            "answer is right on a share of {3} (base model: {4}).",
            "/measured_leakage/utility/heldout_records",
            "/measured_leakage/utility/heldout_loss",
            "/measured_leakage/utility/base_heldout_loss",
            "/measured_leakage/utility/heldout_exact_match_rate",
            "/measured_leakage/utility/base_heldout_exact_match_rate",
            "/records/measure",
        ),
        sentence(
            p,
            "unprotected-figures",
            "All figures of the measurement: {0}. They were taken from people's records without "
            "noise; the guarantee does not cover them.",
            "/measured_leakage",
            "/records/measure",
        ),
    ]


def _security(p: Predicate) -> list[Sentence]:
    return [
        sentence(p, "trust", "Trust model: {0}.", "/deployment/trust_model"),
        sentence(
            p,
            "issued",
            "Issued at {0} by {1} of the home {2}; {1} is also the actor of its log entry.",
            "/issued_at",
            "/deployment/issued_by",
            "/issuer",
        ),
        sentence(
            p,
            "recorded",
            "The acts behind it are entries of the log; the records name their places and hashes.",
            "/records",
        ),
        sentence(
            p,
            "at-rest",
            "LLMOS {0} keeps records, checkpoints and adapters encrypted and opens them only under "
            "a policy decision that is logged. This is said of the program; no record here shows "
            "it for this home.",
            "/implementation/llmos_version",
        ),
    ]


def _side_channels(p: Predicate) -> list[Sentence]:
    return [
        sentence(
            p,
            "floating-point",
            "Number formats: {0}. The noise is a rounded floating-point Gaussian, not a discrete "
            "one: attacks on its lowest bits (Mironov 2012) are not excluded.",
            "/implementation/dtype_path",
        ),
        sentence(p, "timing", "Not protected: {0}", "/not_protected/7"),
        sentence(p, "in-use", "Not protected: {0}", "/not_protected/5"),
    ]


def _data(p: Predicate) -> list[Sentence]:
    said = [
        sentence(
            p,
            "dataset",
            "Trained on {0}: {1} records of {2} units, planted canaries counted in, SHA-256 {3}.",
            "/data/name",
            "/data/records",
            "/data/units",
            "/data/fingerprint/sha256",
            "/records/import",
        ),
        sentence(
            p,
            "use",
            "Classification {0}; policy binds its use to: {1}. This training was for: {2}.",
            "/data/classification",
            "/data/purposes",
            "/deployment/purpose",
            "/records/fit",
        ),
    ]
    if "block" in p["data"]:
        said.append(
            sentence(
                p,
                "block",
                "{0} is block {1} of {2} of {3}. A keyed hash of the unit says in which block it "
                "is, which was checked of every unit, so no unit is in two of them: trainings on "
                "the other blocks do not add up with this one (parallel composition, McSherry "
                "2009, theorem 4), a training on the whole is charged to this block too.",
                "/data/name",
                "/data/block/number",
                "/data/block/blocks",
                "/data/block/of",
                "/records/import",
            )
        )
    for question, about in (
        ("consent", "The legal basis of the collection"),
        ("lineage", "What the dataset was made from"),
        ("overlap", "Other data of the same people"),
    ):
        said.append(_from_a_person(p, question, about))
    return said


def _from_a_person(p: Predicate, question: str, about: str) -> Sentence:
    if question not in p["answers"]:
        return sentence(
            p, question, f"{about}: no record says, and nobody was asked yet.", "/answers"
        )
    return sentence(
        p,
        question,
        f"{about}, as {{0}} says: {{1}}",
        f"/answers/{question}/answered_by",
        f"/answers/{question}/answer",
    )
