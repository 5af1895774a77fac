"""Manifests: what is signed is read back exactly, and what does not fit together is refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from llmos.crypto import dsse
from llmos.crypto.notes import NoteKey
from llmos.engines.federated.session import colluders
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
        ({"id": f"{FIELDS['id']}\n"}, "id"),
        ({"parameters": 2**32}, "parameters"),
        ({"coordinator": "research"}, "coordinator"),
        ({"coordinator": SITES[0]}, "coordinator"),
        ({"coordinator": FIELDS["coordinator"] + "\n"}, "coordinator"),
        ({"coordinator": "spiffe://\x1b[2J/authority"}, "coordinator"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"created_at": FIELDS["created_at"] + "\n"}, "created_at"),
        ({"created_at": FIELDS["created_at"] + "\x1b[2J"}, "created_at"),
        ({"output": "notes\n"}, "output"),
        ({"dataset": "notes\r"}, "dataset"),
        ({"purpose": ""}, "purpose"),
        ({"purpose": "training\n"}, "purpose"),
        ({"purpose": "training\rsynthetic data"}, "purpose"),
        ({"purpose": "\x1b[2Jtraining"}, "purpose"),
        ({"purpose": "training \u202e"}, "purpose"),
        ({"purpose": "x" * 201}, "purpose"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError) as refused:
        manifests.parse(FIELDS | changes)
    assert named in refused.value.message


def named(count: int) -> tuple[str, ...]:
    """Return so many sites."""
    return tuple(sorted(f"spiffe://research.example/party/s{n}" for n in range(count)))


def test_a_manifest_that_would_play_with_a_terminal_is_not_opened() -> None:
    """A signature of the coordinator's does not make it harmless to the steward who reads it."""
    manifest = manifests.Manifest.model_validate(FIELDS | {"purpose": "\x1b[2Jtraining"})
    signed = manifests.sign(manifest, KEY)
    with pytest.raises(RequestError, match="purpose"):
        manifests.open_manifest(signed.envelope, KEY.verifier)
    # what an earlier version kept can still be listed, cancelled and left
    assert manifests.stored(signed.envelope).manifest == manifest


@pytest.mark.parametrize("purpose", ["training", "日本語", "x" * 200, "a study of asthma, 2026"])
def test_purposes_are_one_line(purpose: str) -> None:
    assert manifests.parse(FIELDS | {"purpose": purpose}).purpose == purpose


def test_sums_that_overflow_are_refused() -> None:
    fields = {"aggregation": {"kind": "masked", "threshold": 200, "bits": 24}}
    for count, fits in ((256, True), (257, False)):
        asked = FIELDS | fields | {"sites": named(count), "minimum_sites": 200}
        if fits:
            assert manifests.parse(asked)
        else:
            with pytest.raises(RequestError, match="257 sites of 24 bits each does not fit"):
                manifests.parse(asked)


def test_a_threshold_of_half_of_the_sites_is_refused() -> None:
    """A coordinator could show two lists of survivors to the two halves."""
    six = named(6)
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


@pytest.mark.parametrize(("honest", "withstood"), [(4, True), (3, True), (2, False)])
def test_no_more_sites_collude_than_secure_aggregation_withstands(
    honest: int, withstood: bool
) -> None:
    """Seven sites, threshold five: with three colluding ones a coordinator sees one site's sum."""
    asked = {
        "sites": named(7),
        "minimum_sites": 5,
        "aggregation": {"kind": "masked", "threshold": 5},
        "privacy": FIELDS["privacy"] | {"shared": {"multiplier": 1.5, "honest": honest}},
    }
    assert colluders(5, 7) == 2
    if withstood:
        assert manifests.parse(FIELDS | SHARED | asked).shared_noise
    else:
        with pytest.raises(RequestError, match="withstands 2 colluding sites, not 3"):
            manifests.parse(FIELDS | SHARED | asked)


@pytest.mark.parametrize("sites", [3, 4, 5, 7, 12])
def test_manifest_and_engine_agree_on_what_is_withstood(sites: int) -> None:
    for threshold in range(max(3, sites // 2 + 1), sites + 1):
        for honest in range(2, threshold):
            asked = {
                "sites": named(sites),
                "minimum_sites": threshold,
                "aggregation": {"kind": "masked", "threshold": threshold},
                "privacy": FIELDS["privacy"] | {"shared": {"multiplier": 1.5, "honest": honest}},
            }
            manifest = manifests.Manifest.model_validate(FIELDS | SHARED | asked)
            if threshold - honest <= colluders(threshold, sites):
                manifests.check(manifest)
            else:
                with pytest.raises(RequestError, match="withstands"):
                    manifests.check(manifest)
