"""Keys that two sites agree on (X25519, RFC 7748; HKDF-SHA256, RFC 5869), and what they seal.

Bonawitz et al. 2017, section 3: key agreement is a hash of the Diffie-Hellman value, and shares
travel under authenticated encryption.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from llmos.engines.federated.session import LABEL, framed
from llmos.errors import UpdateRefused

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
SEALING_BYTES: Final = _NONCE_BYTES + _TAG_BYTES  # what sealing adds


class Purpose(StrEnum):
    """What an agreed key is for; keys of different purposes are independent."""

    SEALING = "sealing"
    MASKING = "masking"


def agree(
    private: X25519PrivateKey, peer_key: bytes, *, peer: str, purpose: Purpose, session: bytes
) -> bytes:
    """Return the key that both ends derive; both public keys go into it (RFC 7748, section 6.1).

    Raises:
        UpdateRefused: the peer's public key is none, or gives everyone the same key.
    """
    own_key = private.public_key().public_bytes_raw()
    shared = _exchange(private, peer_key, peer)
    label = LABEL + b"/" + purpose.encode()
    info = framed(label, session, *sorted((own_key, peer_key)))
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(shared)


def check_public_key(key: bytes, site: str) -> None:
    """Try a site's public key before others depend on it.

    Raises:
        UpdateRefused: it is none, or gives everyone the same key.
    """
    _exchange(X25519PrivateKey.generate(), key, site)


def seal(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """Encrypt under a random nonce: a key seals one message in each direction."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, context)


def unseal(key: bytes, sealed: bytes, context: bytes, *, sender: str) -> bytes:
    """Decrypt.

    Raises:
        UpdateRefused: the bytes were changed, or sealed by or for another, or elsewhere.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except (InvalidTag, ValueError) as error:
        raise UpdateRefused(sender, "its sealed shares do not open") from error


def _exchange(private: X25519PrivateKey, peer_key: bytes, peer: str) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError as error:  # the wrong length, or a point of low order
        raise UpdateRefused(peer, "its public key is none") from error
