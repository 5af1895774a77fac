"""What is allowed: Cedar policies behind a wrapper in which every doubt is a denial.

Cedar skips a policy that fails while it is evaluated, so a failing `forbid` would let an act
through. Here policies load only when all of them fit the schema, every request is checked against
the schema too, and an answer that came with any error is a denial.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

import cedarpy

from llmos.errors import PolicyError
from llmos.kernel.identity import ALL_MODELS, Principal

SCHEMA_FILE: Final = "policy.cedarschema"
DEFAULTS: Final = Path(__file__).parent / "policies"  # copied into a new home
_NO_ANSWER: Final = "the policies could not be evaluated"

# What a resource counts as where the caller does not know better.
_CAUTIOUS: Final[dict[str, dict[str, str | tuple[str, ...] | bool]]] = {
    "Home": {},
    "Dataset": {"classification": "sensitive", "purposes": ()},
    "Model": {"kind": "unknown", "classification": "sensitive", "private": False},
}


class Action(StrEnum):
    """What can be asked for."""

    IMPORT_DATA = "import-data"
    READ_DATA = "read-data"
    ERASE_DATA = "erase-data"
    TRAIN_PRIVATE = "train-private"
    TRAIN_WITHOUT_PRIVACY = "train-without-privacy"
    MEASURE = "measure"
    REPORT = "report"
    PULL_MODEL = "pull-model"
    EXPORT_MODEL = "export-model"
    CHAT = "chat"
    LIST_MODELS = "list-models"
    MANAGE_KEYS = "manage-keys"
    MANAGE_BUDGET = "manage-budget"
    MANAGE_JOBS = "manage-jobs"
    MANAGE_VAULT = "manage-vault"
    READ_LOG = "read-log"
    PLAN = "plan"
    SERVE = "serve"
    APPROVE = "approve"
    MANAGE_PARTNERS = "manage-partners"
    WITNESS = "witness"
    MANAGE_PARTIES = "manage-parties"
    ADMIT_PARTIES = "admit-parties"


@dataclass(frozen=True, slots=True)
class Resource:
    """What is acted on; attributes as in the schema, those left out count as most sensitive."""

    type: Literal["Dataset", "Model", "Home"]
    id: str
    attributes: Mapping[str, str | tuple[str, ...] | bool] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.type}::{self.id}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer, and the policies that determined it; `reason` is for people."""

    allowed: bool
    policies: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """A validated set of policies; it decides, and has no other effect."""

    digest: str  # SHA-256 over the files' names and contents, hex
    _policies: Any = field(repr=False)  # cedarpy.PolicySet
    _schema: Any = field(repr=False)  # cedarpy.Schema

    @classmethod
    def load(cls, folder: Path) -> Policy:
        """Read and validate every `*.cedar` file of a folder against its `policy.cedarschema`.

        Raises:
            PolicyError: a file is missing or cannot be read, or a policy does not parse or does not
                fit the schema. Then nothing is allowed.
        """
        try:
            files = sorted(folder.glob("*.cedar"))
            texts = [file.read_text(encoding="utf-8") for file in files]
            schema_text = (folder / SCHEMA_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _refused(folder, str(error)) from error
        if not files:
            raise _refused(folder, "there is no *.cedar file")
        for file, text in zip(files, texts, strict=True):
            _validate(file, text, schema_text)
        named = [
            *zip((file.name for file in files), texts, strict=True),
            (SCHEMA_FILE, schema_text),
        ]
        return cls(
            digest=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
            _policies=cedarpy.PolicySet.from_str("\n".join(texts)),
            _schema=cedarpy.Schema.from_str(schema_text),
        )

    def decide(
        self, who: Principal, action: Action, resource: Resource, context: Mapping[str, str]
    ) -> Decision:
        """Tell whether the policies allow this act; an error anywhere is a denial."""
        request = {
            "principal": {"type": "Principal", "id": who.id},
            "action": {"type": "Action", "id": str(action)},
            "resource": {"type": resource.type, "id": resource.id},
            "context": dict(context),
        }
        entities = _entities(who, resource)
        try:
            result = cedarpy.is_authorized(request, self._policies, entities, self._schema)
        except ValueError:  # a name that is no Unicode text
            return Decision(False, (), _NO_ANSWER)
        diagnostics = result.diagnostics
        names = diagnostics.id_annotations_by_reason
        policies = tuple(sorted(names.get(reason) or reason for reason in diagnostics.reasons))
        if diagnostics.errors:
            return Decision(False, policies, _NO_ANSWER)
        if result.allowed:
            return Decision(True, policies, f"permitted by {', '.join(policies)}")
        if policies:
            return Decision(False, policies, f"forbidden by {', '.join(policies)}")
        return Decision(False, policies, "no policy permits it")


def _entities(who: Principal, resource: Resource) -> str:
    """Describe the caller, the roles and the resource as Cedar's JSON entities."""
    roles = [{"type": "Role", "id": str(role)} for role in who.roles]
    models = [ALL_MODELS] if who.models is None else sorted(who.models)
    return json.dumps(
        [
            {
                "uid": {"type": "Principal", "id": who.id},
                "attrs": {"name": who.name, "models": models},
                "parents": roles,
            },
            {
                "uid": {"type": resource.type, "id": resource.id},
                "attrs": {**_CAUTIOUS[resource.type], **resource.attributes, "name": resource.id},
                "parents": [],
            },
            *({"uid": role, "attrs": {}, "parents": []} for role in roles),
        ]
    )


def _validate(file: Path, text: str, schema_text: str) -> None:
    result = cedarpy.validate_policies(text, schema_text)
    if not result.validation_passed:
        raise _refused(file, "; ".join(map(str, result.errors)))


def _refused(place: Path, why: str) -> PolicyError:
    return PolicyError(
        f"{place}: {why}; nothing is allowed until this is corrected",
        hint=f"the policies that LLMOS ships are in {DEFAULTS}",
    )
