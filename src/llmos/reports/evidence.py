"""The log entries that a certificate rests on: what they must say, and that they are in the log.

The predicate names each entry by its place and leaf hash, the file carries its proof of inclusion.
An outsider thus checks that what the certificate says was settled, published and measured is what
the log recorded at the time. What no entry holds is listed in `HOME_ALONE`: there the signature of
the home is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from llmos.crypto.merkle import leaf_hash
from llmos.crypto.notes import Verifier
from llmos.errors import VerificationFailed
from llmos.kernel import accounting, pricing
from llmos.privacy import mechanism_from_dict
from llmos.reports.sentences import Predicate, value_at
from llmos.transparency.proofs import LogProof, verify_proof

AMOUNT_TOLERANCE: Final = 1e-6  # relative; the mathematical libraries of two machines may differ

# What each entry is, and where in the predicate each of its fields stands.
_ENTRIES: Final[dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    "import": (
        {"/action": "import-data", "/outcome": "done"},
        {
            "/details/fingerprint": "/data/fingerprint/sha256",
            "/details/units": "/data/units",
            "/details/records": "/data/records",
        },
    ),
    "fit": (
        {"/action": "train-private", "/outcome": "admitted", "/details/step": "fit"},
        {
            "/details/job": "/implementation/job",
            "/details/model": "/algorithm/base_model/name",
            "/details/output": "/deployment/model",
            "/details/clip": "/algorithm/clip_norm",
            "/details/batch": "/algorithm/parameters/expected_batch_units",
            "/details/delta": "/guarantee/delta",
            "/details/purpose": "/deployment/purpose",
            "/details/mechanism": "/algorithm/mechanism",
        },
    ),
    "settle": (
        {"/action": "train-private", "/outcome": "settled"},
        {
            "/details/job": "/implementation/job",
            "/details/mechanism": "/algorithm/mechanism",
            "/details/costs": "/budget/charged",
        },
    ),
    "publish": (
        {"/action": "train-private", "/outcome": "done", "/details/step": "publish"},
        {
            "/details/job": "/implementation/job",
            "/details/digest": "/deployment/digest/sha256",
            "/details/output": "/deployment/model",
        },
    ),
    "measure": (
        {"/action": "measure", "/outcome": "done"},
        {
            "/details/leak_report_sha256": "/measured_leakage/leak_report_sha256",
            "/details/verdict": "/measured_leakage/verdict",
            "/details/epsilon_lower_bound": "/measured_leakage/epsilon_lower_bound/lower",
        },
    ),
}
# The same of fields that imports recorded only since certificates are of version 2.
_LATER: Final = {
    "/details/unit": "/guarantee/unit",
    "/details/classification": "/data/classification",
    "/details/purposes": "/data/purposes",
}
# Of a block of a dataset; where neither has it, neither says that there is one.
_IF_ANY: Final = {"/details/block": "/data/block"}
# Pointer into the predicate -> the record that holds the same; the last one that says it.
LOGGED: Final = {place: name for name, (_, said) in _ENTRIES.items() for place in said.values()} | {
    "/data/name": "import",
    "/data/block": "import",
}
# What follows from the mechanism by calculation.
CALCULATED: Final = (
    "/guarantee/epsilon",
    "/guarantee/replace_one_epsilon",
    "/guarantee/neighboring",
    "/budget/cap",
    "/budget/epsilon",
    "/budget/delta",
    "/budget/renyi_order",
)
_OF_THE_DATASET: Final = frozenset({"import", "fit", "settle", "publish"})
NEEDED: Final = frozenset(_ENTRIES) - {"measure"}

# Pointers to what only the home's signature stands for: no entry and no calculation holds it; of
# datasets that were imported before version 2 also what `_LATER` names.
HOME_ALONE: Final = (
    "/issued_at",
    "/answers",
    "/guarantee/accountant",
    "/guarantee/discretization",
    "/algorithm/base_model/digest",
    "/algorithm/base_model/licence",
    "/algorithm/model_kind",
    "/algorithm/parameters",
    "/algorithm/sampler",
    "/implementation",
    "/budget/cap",  # within `AMOUNT_TOLERANCE` of what follows from epsilon, delta and order
    "/budget/spent",  # at least what was charged, at most the cap
    "/budget/held",
    "/measured_leakage",  # but verdict, lower bound and the leak report's hash, which are logged
)


def pointers(proofs: Mapping[str, LogProof]) -> dict[str, dict[str, Any]]:
    """Return what the predicate says about each entry: its place and its RFC 6962 leaf hash."""
    return {
        name: {"log_index": proof.index, "leaf_sha256": leaf_hash(proof.entry).hex()}
        for name, proof in proofs.items()
    }


def check(predicate: Predicate, proofs: Mapping[str, LogProof], log_key: Verifier) -> None:
    """Check that the entries are in the log and that the predicate says what they say.

    Raises:
        VerificationFailed: an entry is missing, is another one, or says otherwise.
    """
    needed = NEEDED if predicate["measured_leakage"] is None else NEEDED | {"measure"}
    if set(proofs) != needed:
        raise VerificationFailed(
            f"the certificate has the records {sorted(proofs)}, not those of it"
        )
    if predicate["records"] != pointers(proofs):
        raise VerificationFailed("the certificate points to other log entries than it carries")
    for name, proof in proofs.items():
        _check_entry(name, verify_proof(proof, log_key), predicate)
    _check_amounts(predicate)


def _check_entry(name: str, entry: Mapping[str, Any], predicate: Predicate) -> None:
    kind, said = _ENTRIES[name]
    if name == "import":
        later = {pointer: place for pointer, place in _LATER.items() if found_at(entry, pointer)}
        said = said | _IF_ANY | later
    if name in _OF_THE_DATASET:
        resource = f"Dataset::{predicate['data']['name']}"
    else:
        resource = f"Model::{predicate['deployment']['model']}"
    for pointer, expected in {**kind, "/resource": resource}.items():
        if found_at(entry, pointer) != expected:
            raise VerificationFailed(f"the record {name!r} is of something else: {pointer}")
    for pointer, place in said.items():
        if not _same(found_at(entry, pointer), found_at(predicate, place)):
            raise VerificationFailed(
                f"the certificate's {place} is not what the log recorded in {name!r}"
            )


def found_at(document: Mapping[str, Any], pointer: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return what stands at a JSON pointer; None where there is nothing."""
    try:
        return value_at(document, pointer)
    except (KeyError, TypeError, ValueError):
        return None


def _same(recorded: object, said: object) -> bool:
    """Compare JSON values; true is not 1 here."""
    return recorded == said and isinstance(recorded, bool) is isinstance(said, bool)


def _check_amounts(predicate: Predicate) -> None:
    """Calculate again what the ledger's integers must be."""
    budget, data = predicate["budget"], predicate["data"]
    order = float(budget["renyi_order"])
    cap, spent, held = (_whole(budget[name]) for name in ("cap", "spent", "held"))
    nats = accounting.renyi_cap(float(budget["epsilon"]), float(budget["delta"]), order)
    cost = pricing.cost(mechanism_from_dict(predicate["algorithm"]["mechanism"]), order)
    charged = int(budget["charged"][data["name"]])
    for holds, fault in (
        (_close(cap, Fraction(nats) * pricing.UNITS_PER_NAT), "its cap does not follow"),
        (_close(charged, cost), "what was charged does not follow from the mechanism"),
        (charged <= spent, "less is spent than was charged"),
        (spent + held <= cap, "more is spent and held than there is"),
    ):
        if not holds:
            raise VerificationFailed(f"the certificate's budget is not a ledger's: {fault}")


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"not an amount: {value!r}")
    return value


def _close(amount: int, expected: Fraction | int) -> bool:
    return math.isclose(amount, float(expected), rel_tol=AMOUNT_TOLERANCE, abs_tol=1.0)
