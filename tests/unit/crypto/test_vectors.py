"""Published vectors for every primitive in use: exactly the valid ones are accepted.

Wycheproof holds the mistakes that libraries made. Where a wrapper of ours stands before the
primitive, the wrapper is tested, because it is what callers reach.
"""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any, Final

import pytest
from _argon2_cffi_bindings import ffi, lib  # type: ignore[import-untyped]
from argon2.low_level import ARGON2_VERSION, Type, core
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmos.crypto import keys, root_keys
from llmos.crypto.notes import Verifier
from llmos.errors import TamperedObject

VECTORS: Final = Path(__file__).parents[2] / "vectors"


def vectors(name: str) -> list[list[Any]]:
    """Read one vector file."""
    tests: list[list[Any]] = json.loads((VECTORS / f"{name}.json").read_text())["tests"]
    return tests


def unwraps(key: str, iv: str, aad: str, msg: str, sealed: str) -> bool:
    try:
        return keys.unwrap(
            bytes.fromhex(key), bytes.fromhex(iv + sealed), bytes.fromhex(aad)
        ) == bytes.fromhex(msg)
    except TamperedObject:
        return False


def test_aes_gcm_unwraps_every_valid_vector_with_a_nonce_of_ours_and_no_other() -> None:
    tests = vectors("wycheproof/aes_256_gcm")
    accepted = {t[0] for t in tests if unwraps(t[1], t[2], t[3], t[4], t[5] + t[6])}
    valid = {t[0] for t in tests if t[7] == "valid"}
    ours = {t[0] for t in tests if len(t[2]) == 2 * keys.NONCE_BYTES}
    assert accepted == valid & ours
    assert (len(tests), len(accepted), len(ours - valid)) == (105, 39, 27)


def test_the_library_refuses_no_valid_aes_gcm_vector_but_those_with_odd_nonces() -> None:
    refused, flags = set(), set()
    for number, key, iv, aad, msg, ct, tag, result, its_flags in vectors("wycheproof/aes_256_gcm"):
        sealed = bytes.fromhex(ct + tag)
        try:
            plain = AESGCM(bytes.fromhex(key)).decrypt(
                bytes.fromhex(iv), sealed, bytes.fromhex(aad)
            )
        except Exception:  # noqa: BLE001 - whatever it raises, it refuses
            if result == "valid":
                refused.add(number)
                flags.update(its_flags)
        else:
            assert (result, plain) == ("valid", bytes.fromhex(msg))
    assert (len(refused), flags) == (9, {"SmallIv", "LongIv"})


@pytest.mark.parametrize(
    ("name", "algorithm", "count"),
    [("hkdf_sha256", SHA256(), (86, 83)), ("hkdf_sha512", SHA512(), (83, 80))],
)
def test_hkdf(name: str, algorithm: HashAlgorithm, count: tuple[int, int]) -> None:
    tests, accepted = vectors(f"wycheproof/{name}"), set()
    for number, ikm, salt, info, size, okm, _ in tests:
        try:
            derivation = HKDF(algorithm, size, bytes.fromhex(salt), bytes.fromhex(info))
        except ValueError:  # more than 255 blocks
            continue
        assert derivation.derive(bytes.fromhex(ikm)).hex() == okm
        accepted.add(number)
    assert accepted == {t[0] for t in tests if t[6] == "valid"}
    assert (len(tests), len(accepted)) == count


def test_hkdf_as_keys_are_derived() -> None:
    tests = [t for t in vectors("wycheproof/hkdf_sha256") if t[2:4] == ["", ""] and t[4] >= 32]
    for _, ikm, _, _, _, okm, _ in tests:
        assert keys.derive(bytes.fromhex(ikm), "").hex() == okm[:64]  # shorter output is a prefix
    assert len(tests) == 7


# "Acceptable" are the signatures of public keys with a part of small order, which RFC 8032 allows.
# Whoever publishes such a key lets others sign in its name, and harms nobody who did not trust it.
def test_ed25519_verifies_exactly_the_signatures_that_rfc_8032_allows() -> None:
    tests = vectors("wycheproof/ed25519")
    accepted = {
        number
        for number, key, msg, sig, _ in tests
        if Verifier("key", bytes.fromhex(key)).verify(bytes.fromhex(sig), bytes.fromhex(msg))
    }
    assert accepted == {t[0] for t in tests if t[4] != "invalid"}
    acceptable = [t for t in tests if t[4] == "acceptable"]
    assert (len(tests), len(accepted), len(acceptable)) == (210, 146, 29)


def test_ecdsa_p256_verifies_exactly_the_valid_signatures() -> None:
    tests, accepted = vectors("wycheproof/ecdsa_p256_sha256"), set()
    for number, key, msg, sig, _ in tests:
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bytes.fromhex(key))
        try:
            public.verify(bytes.fromhex(sig), bytes.fromhex(msg), ec.ECDSA(SHA256()))
        except InvalidSignature:
            continue
        accepted.add(number)
    assert accepted == {t[0] for t in tests if t[4] == "valid"}
    assert (len(tests), len(accepted)) == (484, 174)


def test_hmac_sha256() -> None:
    tests = vectors("rfc4231")
    for key, msg, mac in tests:
        assert hmac.digest(bytes.fromhex(key), bytes.fromhex(msg), "sha256").hex() == mac
    assert len(tests) == 6


# Passphrases have no secret and no associated data, which section 5.3 of RFC 9106 has; without
# them the values are those of the reference implementation (pyca/cryptography's argon2id.txt).
@pytest.mark.parametrize(
    ("text", "tag"),
    [("\x01" * 32, "03aab965c12001c9d7d0d2de33192c0494b684bb148196d73c1df1acaf6d0c2e")],
)
def test_argon2id_as_passphrases_are_stretched(text: str, tag: str) -> None:
    cost = root_keys.Argon2Cost(memory_kib=32, passes=3, lanes=4)
    assert root_keys._stretch(text, b"\x02" * 16, cost).hex() == tag


def test_argon2id_of_rfc_9106() -> None:
    tag = ffi.new("uint8_t[]", 32)
    password, salt, secret, data = (
        ffi.new("uint8_t[]", bytes([byte]) * size)
        for byte, size in ((1, 32), (2, 16), (3, 8), (4, 12))
    )
    context = ffi.new(
        "argon2_context *",
        {
            "version": ARGON2_VERSION,
            "out": tag,
            "outlen": 32,
            "pwd": password,
            "pwdlen": 32,
            "salt": salt,
            "saltlen": 16,
            "secret": secret,
            "secretlen": 8,
            "ad": data,
            "adlen": 12,
            "t_cost": 3,
            "m_cost": 32,
            "lanes": 4,
            "threads": 4,
            "allocate_cbk": ffi.NULL,
            "free_cbk": ffi.NULL,
            "flags": lib.ARGON2_DEFAULT_FLAGS,
        },
    )
    assert core(context, Type.ID.value) == lib.ARGON2_OK
    expected = "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"
    assert bytes(ffi.buffer(tag, 32)).hex() == expected
