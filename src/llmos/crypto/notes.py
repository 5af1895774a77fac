"""C2SP signed notes with Ed25519, and the checkpoints of a transparency log that they carry.

Specifications: https://c2sp.org/signed-note and https://c2sp.org/tlog-checkpoint.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from llmos.crypto.merkle import HASH_BYTES
from llmos.errors import VerificationFailed

_ED25519: Final = b"\x01"  # the signature type of signed-note
_KEY_ID_BYTES: Final = 4
_SEED_BYTES: Final = 32
_PUBLIC_KEY_BYTES: Final = 32
_MAX_NOTE_CHARACTERS: Final = 1_000_000
_MAX_SIGNATURES: Final = 100
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")  # all but newline; surrogates
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key that someone trusts, under the name they know it by."""

    name: str
    public_key: bytes  # (32,) Ed25519

    def __post_init__(self) -> None:
        """Refuse names that a note cannot carry."""
        _check_name(self.name)

    @property
    def key_id(self) -> bytes:
        """Four bytes that tell keys of one name apart; a hint, never a proof."""
        encoded = self.name.encode() + b"\n" + _ED25519 + self.public_key
        return hashlib.sha256(encoded).digest()[:_KEY_ID_BYTES]

    @property
    def vkey(self) -> str:
        """The key as one line, `name+id+key`, as Go's note package writes it."""
        return f"{self.name}+{self.key_id.hex()}+{encode_base64(_ED25519 + self.public_key)}"

    @classmethod
    def parse(cls, vkey: str) -> Verifier:
        """Read a `vkey` line.

        Raises:
            VerificationFailed: it is malformed, of another type, or its id does not match.
        """
        name, _, rest = vkey.partition("+")
        key_id, _, encoded = rest.partition("+")
        key = decode_base64(encoded)
        if key[:1] != _ED25519 or len(key) != 1 + _PUBLIC_KEY_BYTES:
            raise VerificationFailed("the verifier key is not an Ed25519 key")
        verifier = cls(name, key[1:])
        if verifier.key_id.hex() != key_id:
            raise VerificationFailed("the verifier key's id does not belong to its name and key")
        return verifier

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Tell whether this key made this signature over this message."""
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A private Ed25519 key with the name under which it signs."""

    name: str
    seed: bytes = field(repr=False)  # (32,) secret; from a CSPRNG, kept in the vault

    def __post_init__(self) -> None:
        """Refuse names that a note cannot carry.

        Raises:
            VerificationFailed: the name is empty or holds a space, a plus or a control character.
            ValueError: the seed is not 32 bytes.
        """
        _check_name(self.name)
        if len(self.seed) != _SEED_BYTES:
            raise ValueError("an Ed25519 seed has 32 bytes")

    @property
    def verifier(self) -> Verifier:
        """The public half."""
        private_key = Ed25519PrivateKey.from_private_bytes(self.seed)
        return Verifier(self.name, private_key.public_key().public_bytes_raw())

    @property
    def key_id(self) -> bytes:
        """The public half's four-byte id."""
        return self.verifier.key_id

    @property
    def vkey(self) -> str:
        """The public half as one line."""
        return self.verifier.vkey

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature over `message` (RFC 8032)."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(message)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log commits to: its name, how many entries it has and the root over them.

    Extension lines are refused on reading, so that `text` always gives back what was signed.
    """

    origin: str
    size: int  # entries
    root: bytes  # (32,) SHA-256

    def text(self) -> str:
        """Return the three lines that are signed."""
        return f"{self.origin}\n{self.size}\n{encode_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read the three lines.

        Raises:
            VerificationFailed: they are not exactly those that `text` writes.
        """
        match text.split("\n"):
            case [str(origin), str(size), str(root), ""] if origin and _SIZE.fullmatch(size):
                checkpoint = cls(origin, int(size), decode_base64(root))
            case _:
                raise VerificationFailed("this is not a checkpoint of a log")
        if len(checkpoint.root) != HASH_BYTES:
            raise VerificationFailed("the checkpoint's root is not a SHA-256 hash")
        return checkpoint


def sign_note(text: str, key: NoteKey) -> str:
    """Return `text` as a note with one signature.

    Raises:
        ValueError: the text does not end in a newline or holds control characters.
    """
    if not text.endswith("\n") or _CONTROL.search(text):
        raise ValueError("a note's text ends in a newline and has no control characters")
    signature = key.key_id + key.sign(text.encode())
    return f"{text}\n— {key.name} {encode_base64(signature)}\n"


def open_note(note: str, verifier: Verifier) -> str:
    """Return the text of a note that `verifier` signed; other keys' signatures are ignored.

    Raises:
        VerificationFailed: malformed, not signed by this key, or a signature of it is wrong.
    """
    if len(note) > _MAX_NOTE_CHARACTERS or _CONTROL.search(note):
        raise VerificationFailed("the note is too long or holds control characters")
    text, separator, block = note.rpartition("\n\n")
    lines = block.split("\n")
    if not separator or lines.pop() or not 1 <= len(lines) <= _MAX_SIGNATURES:
        raise VerificationFailed("the note has no signatures that can be read")
    text += "\n"
    verified = False
    for line in lines:
        name, blob = parse_signature_line(line)
        if (name, blob[:_KEY_ID_BYTES]) == (verifier.name, verifier.key_id):
            if not verifier.verify(blob[_KEY_ID_BYTES:], text.encode()):
                raise VerificationFailed(f"the signature of {name} is wrong")
            verified = True
    if not verified:
        raise VerificationFailed(
            f"the note is not signed by {verifier.name}",
            hint="check that the public key belongs to the home that made it",
        )
    return text


def encode_base64(data: bytes) -> str:
    """Encode as standard base64 with padding (RFC 4648 section 4)."""
    return base64.b64encode(data).decode()


def decode_base64(text: str) -> bytes:
    """Decode standard base64 of which only one spelling is accepted.

    Raises:
        VerificationFailed: it is not exactly what `encode_base64` writes.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise VerificationFailed("a base64 field cannot be read") from error
    if encode_base64(data) != text:
        raise VerificationFailed("a base64 field is not in its one accepted spelling")
    return data


def parse_signature_line(line: str) -> tuple[str, bytes]:
    """Return the name and the bytes (key id, then signature) of a note's signature line.

    Raises:
        VerificationFailed: it is malformed.
    """
    match line.split(" "):
        case ["—", name, blob]:
            _check_name(name)
            signature = decode_base64(blob)
        case _:
            raise VerificationFailed("the note has a malformed signature line")
    if len(signature) <= _KEY_ID_BYTES:
        raise VerificationFailed("the note has a signature that is too short")
    return name, signature


def _check_name(name: str) -> None:
    if not name or "+" in name or any(c.isspace() for c in name) or _CONTROL.search(name):
        raise VerificationFailed(f"not a key name: {name!r}; it has no spaces and no +")
