from __future__ import annotations

import unicodedata

import pytest
from argon2 import extract_parameters
from argon2.profiles import RFC_9106_LOW_MEMORY

from llmos.accounts import passwords
from llmos.accounts.passwords import hash_password, verify
from llmos.errors import RequestError

GOOD = "correct horse battery"


def test_only_the_password_itself_is_right() -> None:
    kept = hash_password("ada", GOOD)
    assert verify(kept, GOOD)
    for wrong in ("correct horse batterz", "", GOOD + " ", GOOD.upper()):
        assert not verify(kept, wrong)
    assert hash_password("ada", GOOD) != kept  # salted
    assert GOOD not in kept


def test_the_cost_is_that_of_rfc_9106_for_nobodys_hash_too() -> None:
    for kept in (hash_password("ada", GOOD), passwords._NOBODYS):
        assert extract_parameters(kept) == RFC_9106_LOW_MEMORY
    assert (RFC_9106_LOW_MEMORY.memory_cost, RFC_9106_LOW_MEMORY.time_cost) == (65536, 3)


def test_without_a_hash_the_same_work_is_done_and_nothing_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[str] = []

    class Counting:
        def verify(self, kept: str, _password: str) -> bool:
            checked.append(kept)
            return True

    monkeypatch.setattr(passwords, "_HASHER", Counting())
    assert not verify(None, GOOD)
    assert verify("hash", GOOD)
    assert checked == [passwords._NOBODYS, "hash"]


def test_a_damaged_hash_lets_nobody_in() -> None:
    for damaged in ("", "x", "$argon2id$v=19$m=65536,t=3,p=4$$", GOOD):
        assert not verify(damaged, GOOD)


def test_every_keyboard_writes_the_same_letters() -> None:
    kept = hash_password("ada", unicodedata.normalize("NFC", "crème brûlée à Paris"))
    assert verify(kept, unicodedata.normalize("NFD", "crème brûlée à Paris"))


@pytest.mark.parametrize(
    "weak",
    ["", "fourteen chars", "a" * 20, "abcabcabcabcabcabc", "I am Ada of the ward", "x1y2z3" * 200],
)
def test_weak_passwords_are_refused(weak: str) -> None:
    with pytest.raises(RequestError) as refused:
        hash_password("ada", weak)
    assert not weak or weak not in refused.value.message


def test_text_that_is_no_unicode_is_a_password_like_any_other() -> None:
    assert not verify(hash_password("ada", GOOD), "\ud800")
