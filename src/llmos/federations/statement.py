"""What a site states after a federated job: what it ran, what its ledger was charged, and for whom.

The site signs it twice: by the key of its party certificate, which says which site it is, and by
its home's certificate key, whose log the statement's proofs come from.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import rfc8785
from pydantic import Field, ValidationError

from llmos.errors import RequestError
from llmos.federations.manifest import Hash, Name, PartyUri, Value

STATEMENT_TYPE: Final = "application/vnd.llmos.federated-statement+json"
LARGEST_PART_BYTES: Final = 1 << 18  # a statement with its signatures and proofs


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
    charged: dict[str, str]  # pool -> amount, as the log has it


class Record(Value):
    """Where an entry stands in the site's log, and its RFC 6962 leaf hash."""

    log_index: int = Field(ge=0)
    leaf_sha256: Hash


class Statement(Value):
    """The signed part of what a site sends."""

    type: Literal["llmos.federated-statement/v1"] = "llmos.federated-statement/v1"
    job: str
    manifest_sha256: Hash
    site: PartyUri
    ended: Literal["done", "withdrawn", "failed"]
    model_sha256: Hash | None  # of the adapter that it published; none if it left before the end
    data: Data
    spent: Spent
    vkey: str
    log_vkey: str
    records: dict[str, Record]
    at: str

    @property
    def payload(self) -> bytes:
        """Return the bytes that are signed."""
        return rfc8785.dumps(self.model_dump(mode="json"))


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
