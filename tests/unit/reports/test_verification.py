from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos.crypto.notes import NoteKey
from llmos.errors import VerificationFailed
from llmos.privacy import Neighboring
from llmos.reports.bundle import LARGEST_FILE_BYTES
from llmos.reports.certificate import MEDIA_TYPE_1
from llmos.reports.facts import CertificateFacts
from llmos.reports.verification import (
    verify_bundle,
    verify_log_proof,
)

Change = Callable[[dict[str, Any]], object]


def test_a_certificate_verifies_with_two_public_keys_alone(
    certificate: bytes, public_keys: str, facts: CertificateFacts
) -> None:
    verified = verify_bundle(certificate, public_keys)
    loss = facts.guarantee.loss
    assert (verified.model, verified.digest, verified.loss) == ("ward", facts.model.digest, loss)
    assert verified.mechanism == facts.guarantee.mechanism
    assert verified.derived_epsilon == pytest.approx(loss.epsilon, rel=1e-9)
    assert (verified.log, verified.log_index, verified.log_size) == ("llmos.local/1", 12, 14)
    assert verified.summary()["model_files"] == "not compared"
    assert json.dumps(verified.summary())


def test_the_model_at_hand_must_be_the_certified_one(
    certificate: bytes, public_keys: str, facts: CertificateFacts
) -> None:
    verified = verify_bundle(certificate, public_keys, model_digest=facts.model.digest)
    assert verified.summary()["model_files"] == "match"
    with pytest.raises(VerificationFailed, match="SHA-256"):
        verify_bundle(certificate, public_keys, model_digest="00" * 32)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_single_changed_byte_fails(
    certificate: bytes, public_keys: str, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(certificate) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != certificate[place]))
    changed = certificate[:place] + bytes([value]) + certificate[place + 1 :]
    with pytest.raises(VerificationFailed):
        verify_bundle(changed, public_keys)


def test_a_flipped_bit_anywhere_fails(certificate: bytes, public_keys: str) -> None:
    for place in range(0, len(certificate), 3):
        changed = bytearray(certificate)
        changed[place] ^= 1 << place % 8
        with pytest.raises(VerificationFailed):
            verify_bundle(bytes(changed), public_keys)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_cut_or_lengthened_file_fails(
    certificate: bytes, public_keys: str, data: st.DataObject
) -> None:
    cut = certificate[: data.draw(st.integers(0, len(certificate) - 1))]
    for changed in (cut, certificate + b"\n", b" " + certificate):
        with pytest.raises(VerificationFailed):
            verify_bundle(changed, public_keys)


def test_white_space_duplicates_and_foreign_fields_are_refused(
    certificate: bytes, public_keys: str
) -> None:
    fields = json.loads(certificate)
    for changed, reason in (
        (json.dumps(fields).encode(), "canonical"),
        (certificate[:-1] + b',"mediaType":"x"}', "twice"),
        (rfc8785.dumps({**fields, "note": "trust me"}), "other fields"),
        (rfc8785.dumps({**fields, "mediaType": "text/plain"}), "not a privacy certificate"),
        (rfc8785.dumps({**fields, "mediaType": ["a"]}), "not a privacy certificate"),
        (rfc8785.dumps({**fields, "mediaType": MEDIA_TYPE_1}), "other fields"),
        (rfc8785.dumps({**fields, "records": None}), "no proofs of its records"),
        (rfc8785.dumps({**fields, "records": {"import": None}}), "no log proof"),
        (rfc8785.dumps({**fields, "log_proof": None}), "no log proof"),
        (rfc8785.dumps({**fields, "log_proof": {**fields["log_proof"], "x": 1}}), "not ours"),
        (rfc8785.dumps({**fields, "envelope": {**fields["envelope"], "x": 1}}), "not ours"),
        (
            rfc8785.dumps(
                {
                    **fields,
                    "envelope": {
                        **fields["envelope"],
                        "signatures": fields["envelope"]["signatures"] * 2,
                    },
                }
            ),
            "not ours",
        ),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "can be read"),
        (b'{"a":NaN}', "can be read"),
        (b"\xff", "can be read"),
        (b'{"a":"\\ud800"}', "can be read"),
        (b" " * (LARGEST_FILE_BYTES + 1), "larger"),
    ):
        with pytest.raises(VerificationFailed, match=reason):
            verify_bundle(changed, public_keys)


def test_other_keys_do_not_verify_it(
    certificate: bytes, public_keys: str, keys: tuple[NoteKey, NoteKey]
) -> None:
    for stranger in (0, 1):
        other = NoteKey(keys[stranger].name, os.urandom(32)).vkey
        lines = public_keys.splitlines()
        lines[stranger] = other
        with pytest.raises(VerificationFailed, match="not signed by"):
            verify_bundle(certificate, "\n".join(lines))
    with pytest.raises(VerificationFailed, match="not signed by"):
        verify_bundle(certificate, "\n".join(reversed(public_keys.splitlines())))


@pytest.mark.parametrize(
    "change",
    [
        {"details": {"certificate_sha256": "00" * 32}},
        {"details": {}},
        {"details": None},
        {"action": "measure"},
        {"outcome": "failed"},
    ],
)
def test_the_log_entry_must_be_of_this_certificate(
    make_bundle: Callable[..., bytes],
    facts: CertificateFacts,
    public_keys: str,
    change: dict[str, Any],
) -> None:
    with pytest.raises(VerificationFailed, match="log entry"):
        verify_bundle(make_bundle(facts, **change), public_keys)


@pytest.mark.parametrize("change", [{"actor": "eve"}, {"resource": "Model::other"}])
def test_the_log_entry_must_be_by_whom_and_about_what_the_certificate_says(
    make_bundle: Callable[..., bytes],
    facts: CertificateFacts,
    public_keys: str,
    change: dict[str, Any],
) -> None:
    with pytest.raises(VerificationFailed, match="another actor or is about another model"):
        verify_bundle(make_bundle(facts, **change), public_keys)


def test_a_certificate_need_not_speak_of_replace_one(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str
) -> None:
    silent = replace(facts, guarantee=replace(facts.guarantee, replace_one_epsilon=None))
    verified = verify_bundle(make_bundle(silent), public_keys)
    assert "replace-one" not in json.dumps(verified.predicate["assessment"])


@pytest.mark.parametrize("factor", [0.5, 1 - 2e-3, 1 + 2e-3, 2.0])
def test_an_epsilon_that_does_not_follow_from_the_mechanism_fails_even_when_signed(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str, factor: float
) -> None:
    loss = replace(facts.guarantee.loss, epsilon=facts.guarantee.loss.epsilon * factor)
    false = replace(facts, guarantee=replace(facts.guarantee, loss=loss))
    with pytest.raises(VerificationFailed, match="its mechanism gives"):
        verify_bundle(make_bundle(false), public_keys)


def test_the_adjacency_is_part_of_what_is_derived(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str
) -> None:
    loss = replace(facts.guarantee.loss, neighboring=Neighboring.REPLACE_ONE)
    false = replace(facts, guarantee=replace(facts.guarantee, loss=loss))
    with pytest.raises(VerificationFailed, match="its mechanism gives"):
        verify_bundle(make_bundle(false), public_keys)


def _set(path: str, value: object) -> Change:
    def change(made: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            made = made[name]
        made[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("predicateType", "https://example.com/other", "not a privacy certificate"),
        ("_type", "https://in-toto.io/Statement/v0.1", "not a privacy certificate"),
        ("subject", [], "lacks or misuses"),
        ("subject", None, "lacks or misuses"),
        ("predicate", [], "lacks or misuses"),
        ("predicate.guarantee", {}, "lacks or misuses"),
        ("predicate.guarantee.delta", 2.0, "lacks or misuses"),
        ("predicate.guarantee.neighboring", "near", "lacks or misuses"),
        ("predicate.algorithm.mechanism.type", "laplace", "lacks or misuses"),
        ("predicate.algorithm.mechanism.steps", 19, "its mechanism gives"),
        ("predicate.issuer", "someone else", "another issuer"),
        ("predicate.surprise", {}, "other sections"),
        ("subject", [{"name": "x", "digest": {"sha256": "ab" * 32}}], "is not the model"),
        ("subject", [{"name": "ward", "digest": {"sha256": "00" * 32}}], "is not the model"),
        ("predicate.guarantee.replace_one_epsilon", 0.1, "for replace-one, its mechanism gives"),
        ("predicate.guarantee.theorem", "trust me", "is not that of version 2"),
        ("predicate.answers", {"consent": {"answer": ""}}, "lacks or misuses"),
        ("predicate.records", {}, "other log entries"),
        ("predicate.budget.spent", -1, "lacks or misuses"),
        ("predicate.budget.renyi_order", 1, "lacks or misuses"),
        ("predicate.budget.charged", {}, "not what the log recorded"),
        ("predicate.deployment", None, "lacks or misuses"),
        ("predicate.measured_leakage.epsilon_lower_bound.lower", 50.0, "refutes"),
    ],
)
def test_a_signed_statement_is_still_checked(
    make_changed: Callable[..., bytes], public_keys: str, path: str, value: object, reason: str
) -> None:
    with pytest.raises(VerificationFailed, match=reason):
        verify_bundle(make_changed(_set(path, value)), public_keys)


def test_a_certificate_without_measurement_or_with_a_seed_verifies_and_says_so(
    make_bundle: Callable[..., bytes], facts: CertificateFacts, public_keys: str
) -> None:
    seeded = replace(facts, leakage=None, training=replace(facts.training, production=False))
    verified = verify_bundle(make_bundle(seeded), public_keys)
    assert verified.production is False
    assert verified.predicate["measured_leakage"] is None
    assert math.isfinite(verified.loss.epsilon)


def test_a_log_proof_verifies_by_itself(certificate: bytes, public_keys: str) -> None:
    proof = rfc8785.dumps(json.loads(certificate)["log_proof"])
    verified = verify_log_proof(proof, public_keys)
    assert (verified["log"], verified["log_index"], verified["log_size"]) == (
        "llmos.local/1",
        12,
        14,
    )
    assert verified["entry"]["action"] == "report"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_log_proof_with_a_changed_byte_fails(
    certificate: bytes, public_keys: str, data: st.DataObject
) -> None:
    proof = bytearray(rfc8785.dumps(json.loads(certificate)["log_proof"]))
    place = data.draw(st.integers(0, len(proof) - 1))
    proof[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VerificationFailed):
        verify_log_proof(bytes(proof), public_keys)
