"""Manifests: what is signed is read back exactly, and what does not fit together is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey
from llmos.errors import RequestError, VerificationFailed
from llmos.federations import manifest as manifests
from llmos.federations.manifest import MANIFEST_TYPE, Masked, Plain

KEY = NoteKey("research", bytes(range(32)))
SITES = tuple(f"spiffe://research.example/party/{name}" for name in ("east", "north", "south"))
FIELDS: dict[str, Any] = {
    "id": "fed-0123456789abcdef",
    "created_at": "2026-11-23T12:00:00.000Z",
    "coordinator": "spiffe://research.example/authority",
    "model": "tiny",
    "model_digest": "ab" * 32,
    "dataset": "notes",
    "purpose": "training",
    "output": "notes-federated",
    "adapter": {"parametrisation": "ffa-lora", "rank": 4, "seed": 7},
    "layout": "cd" * 32,
    "parameters": 128,
    "local": {
        "steps": 4,
        "batch": 8,
        "learning_rate": 0.002,
        "max_tokens": 32,
        "max_records_per_unit": 4,
    },
    "server": {},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "clip": 1.0},
    "rounds": 5,
    "spare_rounds": 2,
    "sites": SITES,
    "minimum_sites": 3,
    "aggregation": {"kind": "masked", "threshold": 3},
    "deadline_s": 60.0,
}


def test_a_signed_manifest_is_read_back_exactly() -> None:
    signed = manifests.sign(manifests.parse(FIELDS), KEY)
    sent = json.loads(json.dumps(signed.envelope))
    opened = manifests.open_manifest(sent, KEY.verifier)
    assert opened == signed
    assert manifests.stored(sent).manifest.digest == signed.manifest.digest
    assert opened.manifest.most_steps == 4 * 7
    assert opened.manifest.aggregation == Masked(threshold=3, bits=16)
    text = manifests.describe(opened.manifest)
    assert "epsilon 3 at most" in text
    assert "masked sums" in text
    plain = manifests.parse(FIELDS | {"privacy": None, "aggregation": {"kind": "plain"}})
    assert plain.aggregation == Plain(bits=4)
    assert "WITHOUT privacy, updates in the clear" in manifests.describe(plain)


def test_nobody_else_signs_and_no_byte_changes() -> None:
    signed = manifests.sign(manifests.parse(FIELDS), KEY)
    with pytest.raises(VerificationFailed):
        manifests.open_manifest(signed.envelope, NoteKey("research", bytes(32)).verifier)
    payload = signed.manifest.payload.replace(b'"rounds":5', b'"rounds":6')
    changed = signed.envelope | {"payload": base64.b64encode(payload).decode()}
    with pytest.raises(VerificationFailed):
        manifests.open_manifest(changed, KEY.verifier)


def test_a_manifest_that_is_signed_in_another_form_is_refused() -> None:
    """Two texts of one manifest would have two hashes."""
    payload = json.dumps(json.loads(manifests.parse(FIELDS).payload), indent=1).encode()
    with pytest.raises(VerificationFailed, match="canonical"):
        manifests.open_manifest(dsse.sign(payload, MANIFEST_TYPE, KEY), KEY.verifier)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"code": "import os"}, "code"),  # a job brings numbers, never code
        ({"adapter": FIELDS["adapter"] | {"parametrisation": "lora"}}, "adapter.parametrisation"),
        ({"sites": (SITES[1], SITES[0], SITES[2])}, "sorted"),
        ({"sites": (SITES[0], SITES[0], SITES[1])}, "named once"),
        ({"minimum_sites": 4}, "minimum_sites is more"),
        ({"minimum_sites": 2}, "must not be below the threshold"),
        ({"aggregation": {"kind": "masked", "threshold": 2}}, "threshold"),
        ({"aggregation": {"kind": "masked", "threshold": 4}}, "threshold"),
        ({"sites": SITES[:2], "minimum_sites": 2}, "threshold"),
        ({"aggregation": {"kind": "sum"}}, "aggregation"),
        ({"privacy": {"epsilon": 3.0, "delta": 1e-5}}, "clip"),
        ({"privacy": {"epsilon": float("inf"), "delta": 1e-5, "clip": 1.0}}, "epsilon"),
        ({"model": "../etc/passwd"}, "model"),
        ({"model": "tiny\n"}, "model"),
        ({"sites": (*SITES[:2], SITES[2] + "/../north")}, "sites"),
        ({"rounds": 0}, "rounds"),
        ({"id": "fed-1"}, "id"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as refused:
        manifests.parse(FIELDS | changes)
    assert named in refused.value.message


def test_a_threshold_of_half_of_the_sites_is_refused() -> None:
    """A coordinator could show two lists of survivors to the two halves."""
    six = tuple(sorted(f"spiffe://research.example/party/s{n}" for n in range(6)))
    fields = FIELDS | {"sites": six, "minimum_sites": 6}
    with pytest.raises(RequestError, match="more than half"):
        manifests.parse(fields | {"aggregation": {"kind": "masked", "threshold": 3}})
    assert manifests.parse(fields | {"aggregation": {"kind": "masked", "threshold": 4}})


SHARED: dict[str, Any] = {
    "local": FIELDS["local"] | {"steps": 1},
    "privacy": FIELDS["privacy"] | {"shared": {"multiplier": 1.5, "honest": 2}},
}


def test_noise_is_shared_by_those_that_do_not_collude() -> None:
    manifest = manifests.parse(FIELDS | SHARED)
    assert manifest.shared_noise is not None
    assert manifest.shared_noise.honest == 2
    assert "noise that 2 honest sites share" in manifests.describe(manifest)
    assert manifests.parse(FIELDS).shared_noise is None
    assert manifests.parse(FIELDS | {"privacy": None}).shared_noise is None


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"aggregation": {"kind": "plain"}}, "takes secure aggregation"),
        ({"local": FIELDS["local"]}, "steps 1"),
        ({"local": SHARED["local"] | {"proximal": 0.1}}, "proximal 0"),
        ({"privacy": FIELDS["privacy"] | {"shared": {"multiplier": 1.5, "honest": 3}}}, "collude"),
        ({"privacy": FIELDS["privacy"] | {"shared": {"multiplier": 1.5, "honest": 1}}}, "honest"),
        ({"privacy": FIELDS["privacy"] | {"shared": {"multiplier": 0, "honest": 2}}}, "multiplier"),
    ],
)
def test_noise_that_would_be_too_little_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        manifests.parse(FIELDS | SHARED | wrong)
