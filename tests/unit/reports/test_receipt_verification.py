"""Receipts of erasures: every byte counts, and none may leave out what an erasure does not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.crypto import dsse
from llmos.crypto.merkle import leaf_hash
from llmos.crypto.notes import Checkpoint, NoteKey, decode_base64, sign_note
from llmos.errors import VerificationFailed
from llmos.privacy import PrivacyLoss, PrivacyUnit
from llmos.reports import erasure_receipt as receipts
from llmos.reports.erasure_receipt import Decision, DestroyedKey, RemainingModel
from llmos.reports.receipt_verification import verify_receipt
from llmos.transparency.proofs import LogProof

CERTIFICATES = NoteKey("llmos.local/1/certificates", bytes(32))
LOG = NoteKey("llmos.local/1", bytes([1] * 32))
PUBLIC_KEYS = f"{CERTIFICATES.vkey}\n{LOG.vkey}\n"
DESTROYED = (
    DestroyedKey("ward", "training", "cd" * 32, "ab" * 16, "12" * 32),
    DestroyedKey("study", "held out", "ef" * 32, "cd" * 16, None),
)
MODELS = (
    RemainingModel(
        "safe", "ward", "done", "aa" * 32, PrivacyLoss(3.0, 1e-5, PrivacyUnit("patient_id")),
        "bb" * 32,
    ),
    RemainingModel("plain", "ward", "running", None, None, None),
)  # fmt: skip
DECISION = Decision("approval-1", "ann", "bob", "2026-01-01T00:00:00.000Z", 4)

Change = Callable[[dict[str, Any]], object]


def logged(envelope: dict[str, Any], **changes: Any) -> LogProof:
    """Return the proof of a log whose only entry is the receipt's."""
    entry: dict[str, Any] = {
        "v": 1, "at": "", "actor": "bob", "action": "erase-data", "resource": "Home::1",
        "outcome": "done", "details": receipts.log_details(envelope),
    }  # fmt: skip
    data = rfc8785.dumps(entry | changes)
    root = leaf_hash(data)
    note = sign_note(Checkpoint(LOG.name, 1, root).text(), LOG)
    return LogProof(0, 1, (), note, data)


@pytest.fixture(scope="module")
def envelope() -> dict[str, Any]:
    return receipts.seal("2026-01-01T00:00:01.000Z", DECISION, DESTROYED, MODELS, CERTIFICATES)


@pytest.fixture(scope="module")
def receipt(envelope: dict[str, Any]) -> bytes:
    return receipts.bundle(envelope, logged(envelope))


def signed(envelope: dict[str, Any], change: Change) -> bytes:
    """Return a receipt whose statement was changed before the home signed and logged it."""
    statement = json.loads(decode_base64(envelope["payload"]))
    change(statement)
    new = dsse.sign(rfc8785.dumps(statement), dsse.IN_TOTO, CERTIFICATES)
    return receipts.bundle(new, logged(new))


def test_a_receipt_verifies_with_two_public_keys_alone(receipt: bytes) -> None:
    found = verify_receipt(receipt, PUBLIC_KEYS)
    assert found["erased_from"] == ["ward, training", "study, held out"]
    assert found["keys_sha256"] == ["12" * 32, None]
    assert (found["approval"], found["decision_log_index"]) == ("approval-1", 4)
    assert (found["issuer"], found["log"], found["log_index"]) == (CERTIFICATES.name, LOG.name, 0)
    assert found["not_done"] == list(receipts.NOT_DONE)
    safe, plain = found["models"]
    assert safe == f"safe: epsilon 3 at delta 1e-05 per patient_id, certificate {'bb' * 32}"
    assert plain == f"plain: WARNING: {receipts.UNBOUNDED}"


def test_a_model_without_a_certificate_is_said_so() -> None:
    loss = PrivacyLoss(3.0, 1e-5, PrivacyUnit("patient_id"))
    model = RemainingModel("new", "ward", "done", "aa" * 32, loss, None)
    envelope = receipts.seal("", DECISION, DESTROYED, (model,), CERTIFICATES)
    (said,) = verify_receipt(receipts.bundle(envelope, logged(envelope)), PUBLIC_KEYS)["models"]
    assert said.endswith(", not certified")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_single_changed_byte_fails(receipt: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(receipt) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != receipt[place]))
    with pytest.raises(VerificationFailed):
        verify_receipt(receipt[:place] + bytes([value]) + receipt[place + 1 :], PUBLIC_KEYS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["predicate"]["not_done"].pop(0), "what an erasure leaves"),
        (lambda s: s["predicate"]["models"][1].update(warning=None), "does not warn of .*plain"),
        (lambda s: s["subject"].pop(), "subjects"),
        (lambda s: s["subject"][0]["digest"].update(sha256="00" * 32), "subjects"),
        (lambda s: s.update(predicateType="https://llmos.dev/erasure-receipt/v2"), "version 1"),
        (lambda s: s.update(_type="other"), "version 1"),
        (lambda s: s["predicate"].update(issuer="llmos.local/2/certificates"), "another issuer"),
        (lambda s: s["predicate"].pop("decision"), "lacks or misuses"),
        (lambda s: s["predicate"].update(destroyed=7), "lacks or misuses"),
        (lambda s: s["predicate"].update(models=[1]), "lacks or misuses"),
        (lambda s: s.pop("predicate"), "lacks or misuses"),
    ],
)
def test_a_home_cannot_sign_less_than_the_whole(
    envelope: dict[str, Any], change: Change, said: str
) -> None:
    with pytest.raises(VerificationFailed, match=said):
        verify_receipt(signed(envelope, change), PUBLIC_KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(mediaType="application/json"),
        lambda f: f.update(more=1),
        lambda f: f.pop("log_proof"),
        lambda f: f["envelope"].update(more=1),
        lambda f: f["envelope"]["signatures"][0].update(more=1),
        lambda f: f["envelope"]["signatures"].append(f["envelope"]["signatures"][0]),
        lambda f: f["log_proof"].update(more=1),
    ],
)
def test_what_is_not_signed_or_proven_may_not_be_in_it(receipt: bytes, change: Change) -> None:
    fields = json.loads(receipt)
    change(fields)
    with pytest.raises(VerificationFailed):
        verify_receipt(rfc8785.dumps(fields), PUBLIC_KEYS)


@pytest.mark.parametrize(
    "changes",
    [{"action": "report"}, {"outcome": "failed"}, {"details": {}}, {"details": 7}],
)
def test_the_log_entry_must_be_of_this_receipt(
    envelope: dict[str, Any], changes: dict[str, Any]
) -> None:
    with pytest.raises(VerificationFailed, match="log entry"):
        verify_receipt(receipts.bundle(envelope, logged(envelope, **changes)), PUBLIC_KEYS)


def test_another_homes_keys_verify_nothing(receipt: bytes) -> None:
    other = NoteKey(CERTIFICATES.name, bytes([7] * 32))
    with pytest.raises(VerificationFailed, match="not signed by"):
        verify_receipt(receipt, f"{other.vkey}\n{LOG.vkey}\n")
    other = NoteKey(LOG.name, bytes([7] * 32))
    with pytest.raises(VerificationFailed):
        verify_receipt(receipt, f"{CERTIFICATES.vkey}\n{other.vkey}\n")
