from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.engines.federated.messages import (
    Advertisement,
    Delivery,
    Message,
    Roster,
    SealedShares,
    Survivors,
    SurvivorSignature,
    SurvivorSignatures,
    UnmaskingShares,
)
from llmos.errors import UpdateRefused

SESSION, KEY = b"s" * 32, b"k" * 32
KEYS = Advertisement(SESSION, "site-a", KEY, b"m" * 32, b"signature")
Read = Callable[[object], Message]


def of_site(cls: Any) -> Read:
    return lambda data: cls.from_dict(data, "site-a")


MESSAGES: list[tuple[Message, Read]] = [
    (KEYS, of_site(Advertisement)),
    (Roster(SESSION, (KEYS, KEYS)), Roster.from_dict),
    (SealedShares(SESSION, "site-a", {"site-b": b"x" * 94}), of_site(SealedShares)),
    (Delivery(SESSION, {"site-b": b"x" * 94}), Delivery.from_dict),
    (Survivors(SESSION, ("site-a", "站点")), Survivors.from_dict),
    (SurvivorSignature(SESSION, "site-a", b"signature"), of_site(SurvivorSignature)),
    (SurvivorSignatures(SESSION, {"site-b": b"signature"}), SurvivorSignatures.from_dict),
    (
        UnmaskingShares(SESSION, "site-a", {"site-b": b"b" * 33}, {"site-c": b"c" * 33}),
        of_site(UnmaskingShares),
    ),
]
ALL = pytest.mark.parametrize(("message", "read"), MESSAGES, ids=lambda v: type(v).__name__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@ALL
def test_a_message_survives_json(message: Message, read: Read) -> None:
    assert read(json.loads(json.dumps(message.to_dict()))) == message


@ALL
@given(data=st.data())
def test_any_other_json_is_refused(message: Message, read: Read, data: st.DataObject) -> None:
    plain = message.to_dict()
    name = data.draw(st.sampled_from(sorted(plain)))
    junk = data.draw(JSON)
    if junk != plain[name] and not _is_a_value_of_its_own(plain[name], junk):
        with pytest.raises(UpdateRefused):
            read({**plain, name: junk})
    with pytest.raises(UpdateRefused):
        read({key: value for key, value in plain.items() if key != name})
    with pytest.raises(UpdateRefused):
        read({**plain, "more": junk})
    with pytest.raises(UpdateRefused):
        read(junk)


def _is_a_value_of_its_own(value: object, junk: object) -> bool:
    """Whether the junk may be a shorter list, an empty mapping or another signature."""
    text = isinstance(value, str) and isinstance(junk, str)
    return text or junk in ([], {}) or (isinstance(junk, list) and isinstance(value, list))


@pytest.mark.parametrize("cls", [Advertisement, SealedShares, SurvivorSignature, UnmaskingShares])
def test_nobody_speaks_for_another(cls: Any) -> None:
    message = next(m for m, _ in MESSAGES if type(m) is cls)
    with pytest.raises(UpdateRefused, match="speaks for another") as refused:
        cls.from_dict(message.to_dict(), "site-b")
    assert refused.value.site == "site-b"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("sealing_key", "AAAA", "3 bytes, not 32"),
        ("session", "AAAA", "3 bytes, not 32"),
        ("signature", "no base64!", "no base64"),
        ("signature", "é", "no base64"),
        ("signature", 5, "no str"),
        ("message", "Roster", "no Advertisement"),
    ],
)
def test_a_bad_field_is_described(name: str, value: object, reason: str) -> None:
    with pytest.raises(UpdateRefused, match=reason):
        Advertisement.from_dict({**KEYS.to_dict(), name: value}, "site-a")


def test_shares_have_their_size() -> None:
    for message, read in MESSAGES:
        for name in {"shares", "self_masks", "masking_keys"} & set(message.to_dict()):
            with pytest.raises(UpdateRefused, match="bytes, not"):
                read({**message.to_dict(), name: {"site-b": "AAAA"}})


@pytest.mark.parametrize("rows", [{}, [5], [{}], [{"site": 3}], ["site-a"], [None]])
def test_a_roster_that_is_none_is_refused(rows: object) -> None:
    with pytest.raises(UpdateRefused, match="coordinator"):
        Roster.from_dict({**Roster(SESSION, ()).to_dict(), "advertisements": rows})


def test_shares_are_not_printed() -> None:
    for message, _ in MESSAGES:
        if isinstance(message, SealedShares | Delivery | UnmaskingShares):
            assert "site-b" not in repr(message)
