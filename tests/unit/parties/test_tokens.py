from __future__ import annotations

import pytest
from tests.parties import Pki

from llmos.errors import JoinRefused
from llmos.parties.tokens import JoinToken

PKI = Pki()


def test_a_token_is_read_as_it_is_written() -> None:
    token = JoinToken.create("site-a", PKI.authority.certificate)
    assert JoinToken.parse(f" {token.text}\n") == token
    assert len(token.secret) == 43  # 32 bytes
    assert JoinToken.create("site-a", PKI.authority.certificate).secret != token.secret


def test_what_is_stored_depends_on_every_part() -> None:
    token = JoinToken.create("site-a", PKI.authority.certificate)
    other = JoinToken("site-b", token.id, token.secret, token.authority)
    assert len({token.digest(b"1"), token.digest(b"2"), other.digest(b"1")}) == 3


@pytest.mark.parametrize("text", ["", "llmos-join", "llmos-join.a.b.c.d", "x" * 100_000])
def test_what_is_no_token_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(JoinRefused) as refused:
        JoinToken.parse(text + "secret")
    assert "secret" not in refused.value.message
