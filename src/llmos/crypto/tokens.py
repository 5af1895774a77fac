"""The provider of the root key for hardware tokens (OASIS PKCS#11 v2.40), by python-pkcs11.

The token makes an AES-256 key that never leaves it (CKA_SENSITIVE, not CKA_EXTRACTABLE) and
encrypts the root key under it with CKM_AES_GCM; each sealed root key has a token key of its own.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass

from llmos.crypto.keys import NONCE_BYTES
from llmos.crypto.root_keys import SEALED_AS, base64_field
from llmos.errors import TokenUnavailable, WrongPassphrase

_PROTECTED: Final = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
_USES: Final = MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT
_PIN_REFUSED: Final = (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, pkcs11.PinLocked)


@dataclass(frozen=True, slots=True)
class Token:
    """The root key is encrypted by a key inside a token that a PKCS#11 module reaches."""

    module: Path
    label: str
    pin: str = field(repr=False)

    def seal(self, root_key: bytes) -> dict[str, Any]:
        """Make a key in the token and encrypt a root key under it; see `_session` for errors."""
        name, nonce = f"llmos-{secrets.token_hex(8)}", secrets.token_bytes(NONCE_BYTES)
        with self._session(rw=True) as session:
            kek = session.generate_key(
                KeyType.AES, 256, label=name, store=True, capabilities=_USES, template=_PROTECTED
            )
            sealed = base64.b64encode(nonce + kek.encrypt(root_key, **_gcm(nonce))).decode()
        return {"provider": "pkcs11", "token": self.label, "key": name, "sealed": sealed}

    def open(self, fields: Mapping[str, Any]) -> bytes:
        """Let the token decrypt a root key; see `_session` for errors."""
        sealed = base64_field(fields, "sealed")
        with self._session(rw=False) as session:
            kek = session.get_key(ObjectClass.SECRET_KEY, label=fields["key"])
            return bytes(kek.decrypt(sealed[NONCE_BYTES:], **_gcm(sealed[:NONCE_BYTES])))

    @contextmanager
    def _session(self, *, rw: bool) -> Iterator[Any]:
        """Log in to the token for a block; a refused PIN is never tried again, it may lock.

        Raises:
            WrongPassphrase: the token refuses the PIN.
            TokenUnavailable: there is no such module, token or key, or it does not work.
        """
        try:
            token = pkcs11.lib(str(self.module)).get_token(token_label=self.label)
            with token.open(user_pin=self.pin, rw=rw) as session:
                yield session
        except pkcs11.PKCS11Error as error:
            refused = WrongPassphrase if isinstance(error, _PIN_REFUSED) else TokenUnavailable
            raise refused(
                f"{self.module}, token {self.label!r}: {type(error).__name__} {error}".rstrip(),
                hint="check LLMOS_PKCS11_MODULE, the token, and the PIN: wrong ones may lock it",
            ) from error


def _gcm(nonce: bytes) -> dict[str, Any]:
    params = pkcs11.GCMParams(nonce, SEALED_AS, 128)  # tag bits
    return {"mechanism": Mechanism.AES_GCM, "mechanism_param": params}
