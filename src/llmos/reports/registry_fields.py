"""The fields of a registry record: which value each has, what it rests on, and whom it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from llmos.reports.arms import at_least, at_most
from llmos.reports.sentences import Predicate, Reading, sentence, value_at

_ON_THE_PERSON: Final = "{0} {1} ({2})"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of the record."""

    path: str  # below `deployment`
    tier: int
    value: Any  # None while it is open
    basis: tuple[str, ...]
    questions: tuple[str, ...] = ()  # whose answers it needs

    def standing(self, answers: Mapping[str, Any]) -> dict[str, Any]:
        """Say who stands for the field: the system, people by name, or nobody yet."""
        missing = [name for name in self.questions if name not in answers]
        people = dict.fromkeys(
            answers[name]["answered_by"] for name in self.questions if name in answers
        )
        by = "open" if missing else "person" if self.questions else "system"
        return {
            "path": f"/deployment/{self.path}",
            "tier": self.tier,
            "by": by,
            "people": list(people),
            "missing": missing,
            "basis": list(self.basis),
        }


def fields_of(predicate: Predicate) -> tuple[Field, ...]:
    """Return the fields in the order of the registry's groups.

    Raises:
        KeyError, ValueError, TypeError: the predicate lacks a record.
    """
    p = predicate
    return (*_basic(p), *_guarantee(p), *_model(p), *_how(p))


def _system(p: Predicate, path: str, tier: int, template: str, *readings: Reading) -> Field:
    said = sentence(p, path, template, *readings)
    return Field(path, tier, said["text"], tuple(said["basis"]))


def _value(p: Predicate, path: str, tier: int, pointer: str) -> Field:
    return Field(path, tier, value_at(p, pointer), (pointer,))


def _person(p: Predicate, path: str, tier: int, question: str) -> Field:
    if question not in p["answers"]:
        return Field(path, tier, None, ("/answers",), (question,))
    pointer = f"/answers/{question}/answer"
    return Field(path, tier, value_at(p, pointer), (pointer,), (question,))


def _both(
    p: Predicate, path: str, tier: int, question: str, template: str, *readings: Reading
) -> Field:
    """Let a person say on top of the system's words what these cannot know."""
    system = _system(p, path, tier, template, *readings)
    if question not in p["answers"]:
        return Field(path, tier, system.value, system.basis, (question,))
    said = p["answers"][question]
    text = _ON_THE_PERSON.format(system.value, said["answer"], said["answered_by"])
    return Field(path, tier, text, (*system.basis, f"/answers/{question}/answer"), (question,))


def _basic(p: Predicate) -> tuple[Field, ...]:
    answers = p["answers"]
    known = "curator" in answers and "curator-type" in answers
    curator = {
        "data_curator_name": answers["curator"]["answer"],
        "data_curator_type": answers["curator-type"]["answer"],
    } if known else None  # fmt: skip
    return (
        _value(p, "basic/name", 1, "/deployment/model"),
        Field(
            "basic/data_curators",
            1,
            None if curator is None else [curator],
            ("/answers",),
            ("curator", "curator-type"),
        ),
        _system(
            p,
            "basic/description",
            1,
            "A language model ({0} on the base model {1}), fine-tuned on records of {2} units "
            "under differential privacy.",
            "/algorithm/model_kind",
            "/algorithm/base_model/name",
            "/data/units",
        ),
        _person(p, "basic/intended_use", 1, "intended-use"),
        Field("basic/data_product_type", 1, "Machine learning model", ("/algorithm/model_kind",)),
        _person(p, "basic/data_product_region", 1, "region"),
        _person(p, "basic/data_product_sector", 1, "sector"),
        _system(p, "basic/publication_date", 1, "{0:.10}", "/issued_at"),
    )


def _guarantee(p: Predicate) -> tuple[Field, ...]:
    parameters = {"epsilon": p["guarantee"]["epsilon"], "delta": p["guarantee"]["delta"]}
    return (
        Field("dp_variant/variant_name", 2, "Approximate DP", ("/guarantee/definition",)),
        _system(
            p,
            "dp_variant/data_domain",
            3,
            "Sets of text records, any number of them under one value of the column {0}; here the "
            "dataset {1} (classification {2}).",
            "/guarantee/unit",
            "/data/name",
            "/data/classification",
        ),
        _system(
            p,
            "dp_variant/unprotected_quantities",
            3,
            "{0} {1} {2}",
            "/not_protected/3",
            "/not_protected/4",
            "/not_protected/9",
        ),
        _system(
            p,
            "privacy_loss/privacy_unit",
            2,
            "All records with the same value in the column {0}",
            "/guarantee/unit",
        ),
        _both(
            p,
            "privacy_loss/privacy_unit_details",
            3,
            "unit",
            "Two datasets are adjacent if one is the other with all records of one value of {0} "
            "added or removed ({1}): a symmetric distance over units of at most 1.",
            "/guarantee/unit",
            "/guarantee/neighboring",
        ),
        _value(p, "privacy_loss/number_of_privacy_units", 3, "/data/units"),
        Field(
            "privacy_loss/privacy_parameters",
            2,
            parameters,
            ("/guarantee/epsilon", "/guarantee/delta", "/algorithm/mechanism"),
        ),
        _system(
            p,
            "privacy_loss/privacy_parameters_details",
            3,
            "Epsilon by {0}. Theorem: {1}.",
            "/guarantee/accountant",
            "/guarantee/theorem",
        ),
    )


def _model(p: Predicate) -> tuple[Field, ...]:
    return (
        Field("deployment_model/model_name", 2, "Central", ("/deployment/trust_model",)),
        _both(
            p,
            "deployment_model/trust_assumptions",
            3,
            "operator",
            "The trust model is {0}; whoever has root or the root key sees the raw data too.",
            "/deployment/trust_model",
        ),
        _person(p, "deployment_model/actors", 3, "actors"),
        Field("deployment_model/release_type", 2, "One release", ("/deployment/digest/sha256",)),
        _system(
            p,
            "deployment_model/release_type_details",
            3,
            "One model is published. All trainings on these data together may reach epsilon {0} at "
            "delta {1}; this lifetime budget is never refilled by time.",
            "/budget/epsilon",
            "/budget/delta",
        ),
        Field("deployment_model/data_source_type", 2, "Static", ("/data/fingerprint/sha256",)),
        _system(
            p,
            "deployment_model/data_source_type_details",
            2,
            "Imported once as a whole; SHA-256 {0}.",
            "/data/fingerprint/sha256",
            "/records/import",
        ),
        Field("deployment_model/access_type", 2, "Non-interactive", ("/implementation/released",)),
        _system(
            p,
            "deployment_model/access_type_details",
            3,
            "Users ask the published model; nobody queries the records. Released: {0}.",
            "/implementation/released",
        ),
    )


def _how(p: Predicate) -> tuple[Field, ...]:
    fields = [
        _both(
            p,
            "implementation/preprocessing_and_hyperparameter_tuning",
            3,
            "preparation",
            "Every private training on {0} is charged to its pool, kept or not (this one: {1}).",
            "/data/name",
            "/budget/charged",
        ),
        _system(
            p,
            "implementation/mechanisms",
            3,
            "{0}, noise multiplier {1}, sampling probability {2}, {3} steps, clip norm {4}. {5}. "
            "Code: {6} of LLMOS {7}, self-test: {8}. Floating point: {9}; rounded Gaussian noise, "
            "not discrete. Not protected: {10} Data are encrypted at rest and opened under logged "
            "policy decisions.",
            "/algorithm/mechanism/type",
            "/algorithm/mechanism/noise_multiplier",
            "/algorithm/mechanism/sampling_probability",
            "/algorithm/mechanism/steps",
            "/algorithm/clip_norm",
            "/algorithm/sampler",
            "/implementation/engine",
            "/implementation/llmos_version",
            "/implementation/self_test",
            "/implementation/dtype_path",
            "/not_protected/7",
        ),
        _system(
            p,
            "implementation/composition",
            3,
            "Composition: {0}.",
            "/budget/theorem",
            "/records/settle",
        ),
        _system(
            p,
            "implementation/post_processing",
            3,
            "None by the program after the last step: {0} is published as it is.",
            "/implementation/released",
        ),
        _person(p, "implementation/justification", 3, "justification"),
    ]
    if p["measured_leakage"] is not None:
        fields.append(_utility(p))
    return tuple(fields)


def _utility(p: Predicate) -> Field:
    bound = p["measured_leakage"]["epsilon_lower_bound"]
    figures = "/measured_leakage/utility"
    readings: list[Reading] = [
        f"{figures}/heldout_loss",
        f"{figures}/base_heldout_loss",
        ("/guarantee/epsilon", at_most),
    ]
    template = "Held-out loss {0} nats a token (base model {1}), at epsilon {2}."
    if bound is not None:
        readings.append(("/measured_leakage/epsilon_lower_bound/lower", at_least))
        template += " An attack shows epsilon to be at least {3}."
    return _system(p, "implementation/utility", 3, template, *readings)
