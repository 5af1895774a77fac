from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from llmos.engines.federated.agreement import SEALING_BYTES, Purpose, agree, seal, unseal
from llmos.errors import UpdateRefused

A, B = X25519PrivateKey.generate(), X25519PrivateKey.generate()


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def agreed(
    own: X25519PrivateKey, peer: bytes, purpose: Purpose = Purpose.MASKING, session: bytes = b"s"
) -> bytes:
    return agree(own, peer, peer="site-b", purpose=purpose, session=session)


def test_both_ends_derive_one_key_and_nobody_else_does() -> None:
    key = agreed(A, public(B))
    assert key == agreed(B, public(A))
    assert len(key) == 32
    other = X25519PrivateKey.generate()
    assert key not in {agreed(A, public(other)), agreed(other, public(B))}


def test_purposes_and_sessions_are_separate() -> None:
    keys = {agreed(A, public(B), p, s) for p in Purpose for s in (b"s", b"t")}
    assert len(keys) == 2 * len(Purpose)


@pytest.mark.parametrize("peer", [bytes(32), (1).to_bytes(32, "little"), b"short", b""])
def test_a_public_key_that_gives_everyone_the_same_key_is_refused(peer: bytes) -> None:
    """Points of low order, RFC 7748 section 6.1."""
    with pytest.raises(UpdateRefused, match="public key is none") as refused:
        agreed(A, peer)
    assert refused.value.site == "site-b"


def test_what_is_sealed_opens_in_its_place_only() -> None:
    key = bytes(range(32))
    sealed = seal(key, b"shares", b"here")
    assert len(sealed) == len(b"shares") + SEALING_BYTES
    assert unseal(key, sealed, b"here", sender="a") == b"shares"
    assert seal(key, b"shares", b"here") != sealed
    changed = bytes([*sealed[:-1], sealed[-1] ^ 1])
    for wrong_key, wrong, context in (
        (key, sealed, b"there"), (bytes(32), sealed, b"here"), (key, changed, b"here"),
        (key, sealed[:-1], b"here"), (key, b"", b"here"),
    ):  # fmt: skip
        with pytest.raises(UpdateRefused, match="do not open") as refused:
            unseal(wrong_key, wrong, context, sender="site-c")
        assert refused.value.site == "site-c"
