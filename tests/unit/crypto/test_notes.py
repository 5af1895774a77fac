"""Signed notes: Go's published notes byte for byte, and everything malformed is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.crypto.notes import Checkpoint, NoteKey, Verifier, open_note, sign_note
from llmos.errors import VerificationFailed

GO = json.loads(
    (Path(__file__).parents[2] / "vectors" / "signed_note.json").read_text(encoding="utf-8")
)
TEXT, SIGNATURE, OTHER_SIGNATURE = GO["text"], GO["signature"], GO["other_signature"]
PETER, ENOCH = Verifier.parse(GO["vkey"]), Verifier.parse(GO["other_vkey"])
# PRIVATE+KEY+<name>+<id>+<base64 of 0x01 and the seed>; the base64 may hold a plus itself
PETER_KEY = NoteKey("PeterNeumann", base64.b64decode(GO["signing_key"].split("+", 4)[4])[1:])
KEY = NoteKey("llmos.local/0123", bytes(range(32)))
LOG = Checkpoint("llmos.local/0123", 42, bytes(range(32)))


def test_signing_gives_gos_note_byte_for_byte() -> None:
    assert sign_note(TEXT, PETER_KEY) == f"{TEXT}\n{SIGNATURE}"
    assert PETER_KEY.vkey == GO["vkey"] == PETER.vkey
    assert PETER_KEY.key_id.hex() == "c74f20a3"


def test_opening_gos_notes() -> None:
    both = f"{TEXT}\n{SIGNATURE}{OTHER_SIGNATURE}"
    assert open_note(both, PETER) == open_note(both, ENOCH) == TEXT
    assert open_note(f"{TEXT}\n{SIGNATURE}{SIGNATURE}", PETER) == TEXT
    with pytest.raises(VerificationFailed, match="not signed by PeterNeumann") as caught:
        open_note(f"{TEXT}\n{OTHER_SIGNATURE}", PETER)
    assert "public key" in caught.value.hint


@pytest.mark.parametrize(
    "note",
    [
        TEXT,
        f"{TEXT}\n",
        f"{TEXT}\n{SIGNATURE[:-1]}",
        f"\x01{TEXT}\n{SIGNATURE}",
        f"\ud800{TEXT}\n{SIGNATURE}",
        f"{TEXT}\n{SIGNATURE}Unexpected line.\n",
        f"{TEXT}\n— Bad Name x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUg==\n",
        f"{TEXT}\n— Bad+Name x08go/ZJkuBS9UG/\n",
        f"{TEXT}\n—  x08go/ZJkuBS9UG/\n",
        f"{TEXT}\n— PeterNeumann x08goQ==\n",
        f"{TEXT}\n{SIGNATURE[:60]}ABCD{SIGNATURE[60:]}",
        f"{TEXT}\n{SIGNATURE.replace('JnAM=', 'JnAN=')}",
        f"{TEXT}\n{SIGNATURE.replace('JnAM=', 'Jn!M=')}",
        f"{TEXT}\n{SIGNATURE.replace('JnAM=', 'JnéM=')}",
        f"{TEXT}\n{SIGNATURE * 101}",
        f"{'x' * 1_000_000}\n\n{SIGNATURE}",
        f"{TEXT}more\n\n{SIGNATURE}",
        "",
    ],
)
def test_malformed_or_wrongly_signed_notes_are_refused(note: str) -> None:
    with pytest.raises(VerificationFailed):
        open_note(note, PETER)


def test_one_wrong_signature_of_the_key_spoils_the_note() -> None:
    wrong = sign_note("other\n", PETER_KEY).split("\n\n")[1]
    with pytest.raises(VerificationFailed, match="is wrong"):
        open_note(f"{TEXT}\n{SIGNATURE}{wrong}", PETER)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=40))
def test_round_trip(line: str) -> None:
    text = f"{line}\n\n{line}\n"
    assert open_note(sign_note(text, KEY), KEY.verifier) == text


@given(st.integers(min_value=0))
def test_every_flipped_bit_is_refused(position: int) -> None:
    note = sign_note(LOG.text(), KEY).encode()
    bit = position % (8 * len(note))
    changed = bytearray(note)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((VerificationFailed, UnicodeDecodeError)):
        open_note(changed.decode(), KEY.verifier)


def test_every_piece_of_a_verifier_key_is_refused() -> None:
    vkey = GO["vkey"]
    pieces = {vkey[start:end] for end in range(len(vkey) + 1) for start in range(end + 1)} - {vkey}
    changed = {vkey[:n] + chr(ord(vkey[n]) + 1) + vkey[n + 1 :] for n in range(len(vkey))}
    for bad in [*pieces, *changed, *GO["bad_vkeys"]]:
        with pytest.raises(VerificationFailed):
            Verifier.parse(bad)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "a\x7f\x01", "\ud800"])
def test_names_that_a_note_cannot_carry(name: str) -> None:
    with pytest.raises(VerificationFailed, match="not a key name"):
        NoteKey(name, bytes(32))
    with pytest.raises(VerificationFailed, match="not a key name"):
        Verifier(name, bytes(32))


@pytest.mark.parametrize("text", ["", "no newline", "tab\there\n", "nul\x00\n", "\udfff\n"])
def test_texts_that_a_note_cannot_carry(text: str) -> None:
    with pytest.raises(ValueError, match="newline"):
        sign_note(text, KEY)


def test_the_seed_is_checked_and_never_shown() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        NoteKey("name", bytes(31))
    assert repr(KEY) == "NoteKey(name='llmos.local/0123')"


def test_a_checkpoint_is_three_lines() -> None:
    text = "llmos.local/0123\n42\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
    assert LOG.text() == text
    assert Checkpoint.parse(text) == LOG
    empty = Checkpoint("o", 0, bytes(32))
    assert Checkpoint.parse(empty.text()) == empty


@pytest.mark.parametrize(
    "text",
    [
        "",
        LOG.text()[:-1],
        LOG.text() + "extension\n",
        LOG.text().replace("42", "042"),
        LOG.text().replace("42", "-1"),
        LOG.text().replace("42", "4²"),
        LOG.text().replace("42", "9" * 20),
        LOG.text().replace("llmos.local/0123", ""),
        LOG.text().replace("AAEC", ""),
        LOG.text().replace("AAEC", "AA=="),
    ],
)
def test_other_texts_are_no_checkpoint(text: str) -> None:
    with pytest.raises(VerificationFailed):
        Checkpoint.parse(text)
