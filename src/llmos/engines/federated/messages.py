"""What the sites and the coordinator tell each other, as values and as JSON.

Who sent a message is known from the channel (mutual TLS), not from the message: a reader names the
sender, and a message that claims to be another's is refused. Masked vectors are not here: they
travel as the codec's bytes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Self, TypeVar

from llmos.engines.federated.agreement import KEY_BYTES, SEALING_BYTES
from llmos.engines.federated.session import COORDINATOR
from llmos.engines.federated.shamir import SHARE_BYTES
from llmos.errors import UpdateRefused

_DIGEST_BYTES: Final = 32
_SEALED_BYTES: Final = 2 * SHARE_BYTES + SEALING_BYTES
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Message:
    """What all messages have in common."""

    session: bytes  # the digest of the session that it belongs to

    def to_dict(self) -> dict[str, object]:
        """Return the message as JSON can hold it."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {"message": type(self).__name__, **plain}


@dataclass(frozen=True, slots=True)
class Advertisement(Message):
    """AdvertiseKeys: a site's public keys, signed with its own key."""

    site: str
    sealing_key: bytes  # X25519; agrees on the keys under which shares travel
    masking_key: bytes  # X25519; agrees on the seeds of the masks
    signature: bytes

    @classmethod
    def from_dict(cls, data: object, sender: str) -> Self:
        """Read what a site sent; raises UpdateRefused."""
        read = _Reader(cls, data, sender)
        return cls(
            read.session(),
            read.own_name(),
            read.octets("sealing_key", KEY_BYTES),
            read.octets("masking_key", KEY_BYTES),
            read.octets("signature"),
        )


@dataclass(frozen=True, slots=True)
class Roster(Message):
    """The coordinator's answer: the keys of all sites that advertised theirs."""

    advertisements: tuple[Advertisement, ...]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what the coordinator sent; raises UpdateRefused."""
        read = _Reader(cls, data, COORDINATOR)
        rows = [
            (_text(_member(row, "site"), COORDINATOR), row) for row in read.rows("advertisements")
        ]
        return cls(read.session(), tuple(Advertisement.from_dict(row, site) for site, row in rows))


@dataclass(frozen=True, slots=True)
class SealedShares(Message):
    """ShareKeys: a site's shares, each sealed for the site that it is to go to."""

    site: str
    shares: Mapping[str, bytes] = field(repr=False)  # by receiver

    @classmethod
    def from_dict(cls, data: object, sender: str) -> Self:
        """Read what a site sent; raises UpdateRefused."""
        read = _Reader(cls, data, sender)
        return cls(read.session(), read.own_name(), read.octets_by_site("shares", _SEALED_BYTES))


@dataclass(frozen=True, slots=True)
class Delivery(Message):
    """The coordinator's answer: the shares that others sealed for one site."""

    shares: Mapping[str, bytes] = field(repr=False)  # by sender

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what the coordinator sent; raises UpdateRefused."""
        read = _Reader(cls, data, COORDINATOR)
        return cls(read.session(), read.octets_by_site("shares", _SEALED_BYTES))


@dataclass(frozen=True, slots=True)
class Survivors(Message):
    """The coordinator's answer to masked inputs: the sites whose inputs are in the sum."""

    sites: tuple[str, ...]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what the coordinator sent; raises UpdateRefused."""
        read = _Reader(cls, data, COORDINATOR)
        return cls(read.session(), tuple(_text(row, COORDINATOR) for row in read.rows("sites")))


@dataclass(frozen=True, slots=True)
class SurvivorSignature(Message):
    """ConsistencyCheck: a site's signature over the list of survivors that it was shown."""

    site: str
    signature: bytes

    @classmethod
    def from_dict(cls, data: object, sender: str) -> Self:
        """Read what a site sent; raises UpdateRefused."""
        read = _Reader(cls, data, sender)
        return cls(read.session(), read.own_name(), read.octets("signature"))


@dataclass(frozen=True, slots=True)
class SurvivorSignatures(Message):
    """The coordinator's answer: the signatures of all sites over the list of survivors."""

    signatures: Mapping[str, bytes]

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read what the coordinator sent; raises UpdateRefused."""
        read = _Reader(cls, data, COORDINATOR)
        return cls(read.session(), read.octets_by_site("signatures"))


@dataclass(frozen=True, slots=True)
class UnmaskingShares(Message):
    """Unmasking: of each site one kind of share, by whether its input is in the sum."""

    site: str
    self_masks: Mapping[str, bytes] = field(repr=False)  # of survivors' self-mask seeds
    masking_keys: Mapping[str, bytes] = field(repr=False)  # of dropouts' private masking keys

    @classmethod
    def from_dict(cls, data: object, sender: str) -> Self:
        """Read what a site sent; raises UpdateRefused."""
        read = _Reader(cls, data, sender)
        shares = (read.octets_by_site(name, SHARE_BYTES) for name in ("self_masks", "masking_keys"))
        return cls(read.session(), read.own_name(), *shares)


class _Reader:
    """Reads the fields of one message; refuses in the sender's name."""

    def __init__(self, cls: type[Message], data: object, sender: str) -> None:
        wanted = {"message", *(f.name for f in fields(cls))}
        if not isinstance(data, dict) or set(data) != wanted or data["message"] != cls.__name__:
            raise UpdateRefused(sender, f"it is no {cls.__name__}")
        self._data: dict[str, object] = data
        self._sender = sender

    def session(self) -> bytes:
        return self.octets("session", _DIGEST_BYTES)

    def own_name(self) -> str:
        if self._data["site"] != self._sender:
            raise UpdateRefused(self._sender, "it speaks for another site")
        return self._sender

    def octets(self, name: str, size: int | None = None) -> bytes:
        return _octets(self._data[name], size, self._sender)

    def octets_by_site(self, name: str, size: int | None = None) -> dict[str, bytes]:
        rows = _of_type(self._data[name], dict, self._sender)
        return {
            _text(key, self._sender): _octets(value, size, self._sender)
            for key, value in rows.items()
        }

    def rows(self, name: str) -> list[object]:
        return _of_type(self._data[name], list, self._sender)


def _plain(value: object) -> object:
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case Mapping():
            return {key: _plain(part) for key, part in value.items()}
        case tuple():
            return [_plain(part) for part in value]
        case Message():
            return value.to_dict()
        case _:
            return value


def _octets(value: object, size: int | None, sender: str) -> bytes:
    try:
        octets = base64.b64decode(_text(value, sender), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UpdateRefused(sender, "a field is no base64") from error
    if size is not None and len(octets) != size:
        raise UpdateRefused(sender, f"a field has {len(octets)} bytes, not {size}")
    return octets


def _text(value: object, sender: str) -> str:
    return _of_type(value, str, sender)


def _member(row: object, name: str) -> object:
    return _of_type(row, dict, COORDINATOR).get(name)


def _of_type(value: object, kind: type[_T], sender: str) -> _T:
    if not isinstance(value, kind):
        raise UpdateRefused(sender, f"a field is no {kind.__name__}")
    return value
