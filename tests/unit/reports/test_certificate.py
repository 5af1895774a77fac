from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rfc8785
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from llmos.crypto.merkle import leaf_hash
from llmos.crypto.notes import NoteKey, decode_base64
from llmos.errors import LeakFound
from llmos.privacy import PrivacyLoss, mechanism_from_dict
from llmos.reports.certificate import (
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    seal,
    statement,
)
from llmos.reports.facts import CertificateFacts, LeakageFacts


def test_it_is_an_in_toto_statement_about_the_model(facts: CertificateFacts) -> None:
    made = statement(facts, "issuer")
    assert (made["_type"], made["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
    assert made["subject"] == [{"name": "ward", "digest": {"sha256": facts.model.digest}}]
    assert set(made) == {"_type", "subject", "predicateType", "predicate"}


def test_each_record_is_named_by_its_place_and_leaf_hash(facts: CertificateFacts) -> None:
    records = statement(facts, "issuer")["predicate"]["records"]
    assert set(records) == {"import", "fit", "settle", "publish", "measure"}
    for name, proof in facts.evidence.items():
        assert records[name]["log_index"] == proof.index
        assert records[name]["leaf_sha256"] == leaf_hash(proof.entry).hex()


def test_the_mechanism_can_be_read_back(facts: CertificateFacts) -> None:
    fields = statement(facts, "issuer")["predicate"]["algorithm"]["mechanism"]
    assert mechanism_from_dict(fields) == facts.guarantee.mechanism


def test_no_canary_and_no_record_loss_enters_the_certificate(facts: CertificateFacts) -> None:
    text = json.dumps(statement(facts, "issuer"))
    assert "losses_nats" not in text
    assert "epsilon_lower_bound" in text


def test_a_certificate_without_measurement_says_so(facts: CertificateFacts) -> None:
    unmeasured = statement(replace(facts, leakage=None), "issuer")
    assert unmeasured["predicate"]["measured_leakage"] is None


def test_a_refuted_guarantee_is_never_sealed(
    facts: CertificateFacts,
    make_document: Callable[..., dict[str, Any]],
    keys: tuple[NoteKey, NoteKey],
) -> None:
    tight = PrivacyLoss(0.5, 1e-5, facts.guarantee.loss.unit)
    document = make_document("ward", tight, leaking=True)
    with pytest.raises(LeakFound, match="no certificate"):
        seal(replace(facts, leakage=LeakageFacts(document)), keys[0])


def test_the_reference_implementation_of_dsse_verifies_it(
    facts: CertificateFacts, keys: tuple[NoteKey, NoteKey]
) -> None:
    made = seal(facts, keys[0])
    envelope = Envelope.from_dict(json.loads(json.dumps(made)))
    public = SSlibKey(
        keyid=keys[0].key_id.hex(),
        keytype="ed25519",
        scheme="ed25519",
        keyval={"public": keys[0].verifier.public_key.hex()},
    )
    assert envelope.verify([public], 1)
    payload = decode_base64(made["payload"])
    assert payload == rfc8785.dumps(statement(facts, keys[0].name))
