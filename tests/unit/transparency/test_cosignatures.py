"""Cosignatures: the document's example, round trips, and every changed bit refused."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto.notes import Checkpoint, NoteKey, Verifier, open_note, sign_note
from llmos.errors import VerificationFailed
from llmos.transparency.cosignatures import cosign, cosigner_id, verify_cosignature

KEY = NoteKey("witness.example.com/w1", bytes(range(32)))
STRANGER = NoteKey("witness.example.com/w1", bytes(32))
TEXT = Checkpoint("example.com/behind-the-sofa", 20852163, bytes(32)).text()
# https://c2sp.org/tlog-cosignature: the example's second signature line
EXAMPLE = (
    "— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2"
    "oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA=="
)


@given(st.integers(0, 2**63 - 1))
def test_a_cosignature_verifies_and_tells_its_time(time_s: int) -> None:
    line = cosign(TEXT, KEY, time_s)
    assert line.endswith("\n")
    for spelt in (line, line.removesuffix("\n")):
        assert verify_cosignature(spelt, TEXT, KEY.verifier) == time_s


def test_the_message_is_that_of_the_document() -> None:
    blob = base64.b64decode(cosign(TEXT, KEY, 1679315147).split(" ")[2])
    message = (
        "cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"
    )
    assert blob[4:12] == (1679315147).to_bytes(8, "big")
    public_key = Ed25519PrivateKey.from_private_bytes(KEY.seed).public_key()
    public_key.verify(blob[12:], message.encode())  # raises where it is another message


def test_the_documents_example_has_the_form_that_is_read() -> None:
    blob = base64.b64decode(EXAMPLE.split(" ")[2])
    assert len(blob) == 4 + 8 + 64
    assert int.from_bytes(blob[4:12], "big") == 1679315147
    with pytest.raises(VerificationFailed, match="not of witness"):  # its key is not published
        verify_cosignature(EXAMPLE, TEXT, KEY.verifier)


def test_a_cosigners_id_is_not_that_of_its_notes() -> None:
    assert cosigner_id(KEY.verifier) != KEY.key_id
    note = sign_note(TEXT, KEY)
    assert open_note(note + cosign(TEXT, KEY, 5), KEY.verifier) == TEXT  # both in one note
    with pytest.raises(VerificationFailed):
        verify_cosignature(note.split("\n")[-2], TEXT, KEY.verifier)


@given(st.integers(0, 8 * 76 - 1))
def test_every_flipped_bit_is_refused(bit: int) -> None:
    name, encoded = cosign(TEXT, KEY, 1679315147).removesuffix("\n").split(" ")[1:]
    blob = bytearray(base64.b64decode(encoded))
    blob[bit // 8] ^= 1 << bit % 8
    with pytest.raises(VerificationFailed):
        verify_cosignature(f"— {name} {base64.b64encode(blob).decode()}", TEXT, KEY.verifier)


@pytest.mark.parametrize(
    ("line", "cosigner"),
    [
        (cosign(TEXT, STRANGER, 1), KEY.verifier),
        (cosign(TEXT, KEY, 1), Verifier("witness.example.com/w2", KEY.verifier.public_key)),
        (cosign(TEXT + "more\n", KEY, 1), KEY.verifier),
        (cosign(TEXT, KEY, 2**63), KEY.verifier),
        ("— witness.example.com/w1 AAAAAAA=", KEY.verifier),
        ("no line", KEY.verifier),
        ("", KEY.verifier),
    ],
)
def test_a_line_of_another_key_name_text_or_form_is_refused(line: str, cosigner: Verifier) -> None:
    with pytest.raises(VerificationFailed):
        verify_cosignature(line, TEXT, cosigner)
