"""The root key in a hardware token, with SoftHSM in the place of the hardware."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests import softhsm

from llmos.errors import TamperedObject, TokenUnavailable, WrongPassphrase

if TYPE_CHECKING:
    from llmos.crypto.tokens import Token

ROOT_KEY = bytes(range(32))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make one token for all tests here: the library reads its configuration once a process."""
    library = softhsm.module()
    folder = tmp_path_factory.mktemp("softhsm")
    softhsm.make_token(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        yield library
        import pkcs11

        pkcs11.unload(str(library))  # type: ignore[no-untyped-call, unused-ignore]


@pytest.fixture
def token(module: Path) -> Token:
    return at(module)


def at(module: Path, label: str = softhsm.LABEL, pin: str = softhsm.PIN) -> Token:
    from llmos.crypto.tokens import Token

    return Token(module, label, pin)


def test_a_token_opens_what_it_sealed(token: Token) -> None:
    first, second = token.seal(ROOT_KEY), token.seal(ROOT_KEY)
    assert (first["provider"], first["token"]) == ("pkcs11", softhsm.LABEL)
    assert first["key"] != second["key"], "each has a token key of its own"
    for fields in (first, second):
        assert token.open(fields) == ROOT_KEY
        assert ROOT_KEY.hex() not in repr(fields)
        assert len(base64.b64decode(fields["sealed"])) == 12 + 32 + 16
    assert softhsm.PIN not in repr(token)


def test_the_tokens_key_cannot_leave_it(token: Token, module: Path) -> None:
    import pkcs11
    from pkcs11 import Attribute, ObjectClass

    fields = token.seal(ROOT_KEY)
    found = pkcs11.lib(str(module)).get_token(token_label=softhsm.LABEL)
    with found.open(user_pin=softhsm.PIN) as session:
        key = session.get_key(ObjectClass.SECRET_KEY, label=fields["key"])
        expected = {
            Attribute.SENSITIVE: True,
            Attribute.EXTRACTABLE: False,
            Attribute.ALWAYS_SENSITIVE: True,
            Attribute.NEVER_EXTRACTABLE: True,
            Attribute.LOCAL: True,  # made in the token
            Attribute.TOKEN: True,
            Attribute.VALUE_LEN: 32,
            Attribute.WRAP: False,
            Attribute.UNWRAP: False,
        }
        assert {name: key[name] for name in expected} == expected
        with pytest.raises(pkcs11.AttributeSensitive):
            _ = key[Attribute.VALUE]


@pytest.mark.parametrize("pin", ["000000", "1", ""])
def test_a_wrong_pin_is_refused(module: Path, token: Token, pin: str) -> None:
    fields = token.seal(ROOT_KEY)
    stranger = at(module, pin=pin)
    with pytest.raises(WrongPassphrase, match="PinIncorrect"):
        stranger.seal(ROOT_KEY)
    for _ in range(2):
        with pytest.raises(WrongPassphrase, match="PinIncorrect") as refused:
            stranger.open(fields)
        assert "PIN" in refused.value.hint
        assert not pin or pin not in refused.value.message.replace(str(module), "")
    assert token.open(fields) == ROOT_KEY


def test_what_is_not_there_is_named(module: Path, token: Token, tmp_path: Path) -> None:
    fields = token.seal(ROOT_KEY)
    with pytest.raises(TokenUnavailable, match=r"'laboratory': NoSuchToken"):
        at(module, label="laboratory").open(fields)
    with pytest.raises(TokenUnavailable, match=r"NoSuchKey No key matching"):
        token.open({**fields, "key": "llmos-0"})
    with pytest.raises(TokenUnavailable, match=r"missing\.so") as refused:
        at(tmp_path / "missing.so").open(fields)
    assert "LLMOS_PKCS11_MODULE" in refused.value.hint
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(TokenUnavailable, match=r"invalid ELF header|file too short"):
        at(tmp_path / "text.so").open(fields)


def test_changed_fields_do_not_open(token: Token) -> None:
    fields = token.seal(ROOT_KEY)
    sealed = base64.b64decode(fields["sealed"])
    for bad in (sealed[:-1] + bytes([sealed[-1] ^ 1]), sealed[:20], b"", os.urandom(60)):
        changed: dict[str, Any] = {**fields, "sealed": base64.b64encode(bad).decode()}
        with pytest.raises(TokenUnavailable):
            token.open(changed)
    for damaged in ("not base64!", "é"):
        with pytest.raises(TamperedObject, match="damaged: sealed"):
            token.open({**fields, "sealed": damaged})
    assert token.open(fields) == ROOT_KEY
