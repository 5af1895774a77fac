"""What follows from a certificate's records: made when it is issued, made again when it is checked.

Nothing here is new information. Whoever signs another conclusion than the records give is refused
by every verifier, with the home's own key as with any other.
"""

from __future__ import annotations

import json
from typing import Any, Final

import rfc8785

from llmos.errors import VerificationFailed
from llmos.reports.assessment import assess
from llmos.reports.hazards import hazards
from llmos.reports.questions import asked, check_answers
from llmos.reports.registry import registry
from llmos.reports.scope import NOT_PROTECTED, TRUST_MODEL
from llmos.reports.sentences import Predicate, value_at
from llmos.reports.theorems import THEOREMS

_MADE: Final = {
    "assessment": assess,
    "hazards": hazards,
    "questions": lambda predicate: asked(predicate["answers"]),
    "registry": registry,
}

_RECORDS: Final = frozenset(
    {
        "issued_at", "issuer", "deployment", "guarantee", "algorithm", "implementation", "data",
        "budget", "measured_leakage", "records", "answers", "not_protected",
    }
)  # fmt: skip

# What version 2 says in the same words in every certificate.
FIXED: Final = {
    "/deployment/trust_model": TRUST_MODEL,
    "/guarantee/definition": "(epsilon, delta)-differential privacy",
    "/guarantee/theorem": THEOREMS["pld"],
    "/budget/theorem": THEOREMS["filter"],
    "/budget/divergence_unit": "1e-12 nats",
    "/not_protected": list(NOT_PROTECTED),
}


def conclude(records: Predicate) -> dict[str, Any]:
    """Return the sections that follow from the others.

    Raises:
        KeyError, ValueError, TypeError: a record is missing or of another form.
    """
    read = json.loads(rfc8785.dumps(dict(records)))  # as a verifier reads it: 8.0 is 8
    return {name: make(read) for name, make in _MADE.items()}


def check(predicate: Predicate) -> None:
    """Make every conclusion again and compare.

    Raises:
        VerificationFailed: a section says what the records do not.
        DataError: an answer has no form of one.
        KeyError, ValueError, TypeError: a record is missing or of another form.
    """
    if set(predicate) != _RECORDS | set(_MADE):
        raise VerificationFailed(f"the certificate has other sections: {sorted(predicate)}")
    for pointer, words in FIXED.items():
        if value_at(predicate, pointer) != words:
            raise VerificationFailed(f"the certificate's {pointer} is not that of version 2")
    check_answers(predicate["answers"])
    records = {name: part for name, part in predicate.items() if name not in _MADE}
    for name, made in conclude(records).items():
        if rfc8785.dumps(predicate[name]) != rfc8785.dumps(made):  # to Python, True is 1
            place = _difference(predicate[name], made, f"/{name}")
            raise VerificationFailed(f"the certificate says in {place} what its records do not")


def _difference(given: object, made: object, pointer: str) -> str:
    """Return where two JSON values begin to differ."""
    match given, made:
        case (dict(), dict()) if given.keys() == made.keys():
            pairs = [(name, given[name], made[name]) for name in given]
        case (list(), list()) if len(given) == len(made):
            pairs = [
                (str(place), *both) for place, both in enumerate(zip(given, made, strict=True))
            ]
        case _:
            return pointer
    for name, one, other in pairs:
        if one != other:
            return _difference(one, other, f"{pointer}/{name}")
    return pointer
