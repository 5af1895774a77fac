"""What a site states after a federated job: what it ran, what its ledger was charged, and for whom.

The site signs it twice: by the key of its party certificate, which says which site it is, and by
its home's certificate key, whose log the statement's proofs come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

import rfc8785
from pydantic import Field, ValidationError

from llmos.crypto.notes import decode_base64
from llmos.errors import RequestError
from llmos.federations.manifest import Hash, Name, PartyUri, Value

STATEMENT_TYPE: Final = "application/vnd.llmos.federated-statement+json"
LARGEST_PART_BYTES: Final = 1 << 18  # a statement with its signatures and proofs
TYPE: Final = "llmos.federated-statement/v2"

# A set of small numbers as one hexadecimal number: bit n stands for n. Ten thousand rounds take
# 2,500 characters, a thousand sites 250.
Bits = Annotated[str, Field(pattern=r"^(0|[1-9a-f][0-9a-f]*)$")]


class Data(Value):
    """The data that a site trained on; nothing of what is in them."""

    name: Name
    fingerprint: Hash
    classification: str
    units: int = Field(ge=1)
    unit: str


class Spent(Value):
    """What was run on the data, and what it cost."""

    steps: int = Field(ge=1)
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    mechanism: dict[str, Any]
    charged: dict[str, str]  # pool -> amount in 1e-12 nats, as the log has it
    orders: dict[str, int]  # pool -> the Renyi order at which it is charged


class Rounds(Value):
    """The rounds that a site trained in, as its own log has the coordinator's signed tasks.

    A round that was begun again is the same round: all its tasks start from the same weights, and
    the site trains for the first that it hears of. So the weights of each round are compared
    exactly, the participants as a set: whoever is named to a site has to state what it spent.
    """

    trained: Bits
    participants: Bits  # places in the manifest's `sites`, of whomever one of these tasks names
    starts_sha256: Hash  # see `starts_sha256`


class Record(Value):
    """Where an entry stands in the site's log, and its RFC 6962 leaf hash."""

    log_index: int = Field(ge=0)
    leaf_sha256: Hash


class Statement(Value):
    """The signed part of what a site sends."""

    type: Literal["llmos.federated-statement/v2"] = TYPE
    job: str
    manifest_sha256: Hash
    site: PartyUri
    ended: Literal["done", "withdrawn", "failed"]
    model_sha256: Hash | None  # of the adapter that it published; none if it left before the end
    data: Data
    spent: Spent | None  # None: it was admitted, and ended before its first step
    rounds: Rounds
    vkey: str
    log_vkey: str
    records: dict[str, Record]
    at: str

    @property
    def payload(self) -> bytes:
        """Return the bytes that are signed."""
        return rfc8785.dumps(self.model_dump(mode="json"))


def bits(numbers: Iterable[int]) -> Bits:
    """Return a set of numbers as `Bits`."""
    found = 0
    for number in set(numbers):
        found |= 1 << number
    return f"{found:x}"


def numbers(text: Bits) -> list[int]:
    """Return the numbers of `Bits` in order."""
    return [place for place, bit in enumerate(reversed(f"{int(text, 16):b}")) if bit == "1"]


def starts_sha256(starts: Iterable[tuple[int, str]]) -> str:
    """Return the SHA-256 of rounds with the SHA-256 of the weights that each started from."""
    return hashlib.sha256(rfc8785.dumps([list(one) for one in sorted(set(starts))])).hexdigest()


def parse(fields: object) -> Statement:
    """Read a statement.

    Raises:
        RequestError: a field is missing, unknown or out of range; the first one is named.
    """
    try:
        return Statement.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "statement"
        raise RequestError(f"{place}: {first['msg']}") from error


def is_current(part: Mapping[str, Any]) -> bool:
    """Tell whether a part that was checked when it came has a statement of this version."""
    said = json.loads(decode_base64(part["envelope"]["payload"]))
    return bool(said["type"] == TYPE)
