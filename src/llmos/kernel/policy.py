"""What is allowed: Cedar policies behind a wrapper in which every doubt is a denial.

Cedar skips a policy that fails while it is evaluated, so a failing `forbid` would let an act
through. Here policies load only when all of them fit the schema, every request is checked against
the schema too, and an answer that came with any error is a denial.

The schema says what this version of LLMOS asks. It is the code's, not the home's: an action that a
new version brings is known at once, and is denied until a policy permits it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final, Literal

import cedarpy

from llmos.errors import PolicyError
from llmos.kernel.identity import ALL_MODELS, Principal

SCHEMA_FILE: Final = "policy.cedarschema"
DEFAULTS: Final = Path(__file__).parent / "policies"  # what a new home begins with
_NO_ANSWER: Final = "the policies could not be evaluated"
_MOST_PARSED: Final = 1024  # descriptions of a caller and a resource that are kept parsed

# What a resource counts as where the caller does not know better.
_CAUTIOUS: Final[dict[str, dict[str, str | tuple[str, ...] | bool]]] = {
    "Home": {},
    "Dataset": {"classification": "sensitive", "purposes": ()},
    "Model": {"kind": "unknown", "classification": "sensitive", "private": False, "purposes": ()},
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
    MANAGE_POLICY = "manage-policy"
    LOGIN = "login"
    COORDINATE = "coordinate"
    FEDERATE = "federate"


# A narrowed API key that could do these would make itself a wide one.
_WIDENING: Final = frozenset({Action.MANAGE_KEYS, Action.LOGIN})


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
    files: Mapping[str, str] = field(repr=False)  # texts by name
    _policies: Any = field(repr=False)  # cedarpy.PolicySet
    _schema: Any = field(repr=False)  # cedarpy.Schema
    _parse: Callable[[str], Any] = field(repr=False)  # entities, checked against the schema

    @classmethod
    def load(cls, folder: Path) -> Policy:
        """Read and validate every `*.cedar` file of a folder.

        Raises:
            PolicyError: there is none, one cannot be read, or a policy does not parse or does not
                fit the schema. Then nothing is allowed.
        """
        try:
            files = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.cedar")}
        except (OSError, UnicodeDecodeError) as error:
            raise _refused(str(folder), str(error)) from error
        return cls.parse(files, f"{folder}/")

    @classmethod
    def parse(cls, files: Mapping[str, str], place: str = "") -> Policy:
        """Validate policies, given as texts by file name; `place` stands before names in errors.

        Raises:
            PolicyError: there is none, or one does not parse or does not fit the schema.
        """
        if not files:
            raise _refused(place, "there is no *.cedar file")
        schema_text = (DEFAULTS / SCHEMA_FILE).read_text(encoding="utf-8")
        named = sorted(files.items())
        for name, text in named:
            result = cedarpy.validate_policies(text, schema_text)
            if not result.validation_passed:
                raise _refused(f"{place}{name}", "; ".join(map(str, result.errors)))
        schema = cedarpy.Schema.from_str(schema_text)
        return cls(
            digest=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
            files=dict(named),
            _policies=cedarpy.PolicySet.from_str("\n".join(text for _, text in named)),
            _schema=schema,
            _parse=lru_cache(_MOST_PARSED)(partial(cedarpy.Entities.from_json_str, schema=schema)),
        )

    def decide(
        self, who: Principal, action: Action, resource: Resource, context: Mapping[str, Any]
    ) -> Decision:
        """Tell whether the policies allow this act; an error anywhere is a denial."""
        if why := _beyond_key(who, action, context):
            return Decision(False, (), why)
        if who.purpose is not None:
            context = {"purpose": who.purpose, **context}
        request = {
            "principal": {"type": "Principal", "id": who.id},
            "action": {"type": "Action", "id": str(action)},
            "resource": {"type": resource.type, "id": resource.id},
            "context": dict(context),
        }
        try:
            entities = self._parse(_entities(who, resource))
            result = cedarpy.is_authorized(request, self._policies, entities, self._schema)
            errors, names = result.diagnostics.errors, result.diagnostics.id_annotations_by_reason
            policies = tuple(sorted(names.get(id) or id for id in result.diagnostics.reasons))
            allowed = result.allowed
        except Exception as error:  # noqa: BLE001 - whatever fails in there; the reason is recorded
            return Decision(False, (), f"{_NO_ANSWER}: {error}")
        if errors:
            return Decision(False, policies, f"{_NO_ANSWER}: {'; '.join(errors)}")
        if allowed:
            return Decision(True, policies, f"permitted by {', '.join(policies)}")
        if policies:
            return Decision(False, policies, f"forbidden by {', '.join(policies)}")
        return Decision(False, policies, "no policy permits it")


def _beyond_key(who: Principal, action: Action, context: Mapping[str, Any]) -> str:
    """Say why the API key that was used does not cover an act; nothing when it does."""
    if who.actions is not None and action not in who.actions:
        return f"the API key is not for {action}"
    if who.purpose is not None and context.get("purpose", who.purpose) != who.purpose:
        return f"the API key is for the purpose {who.purpose!r} only"
    narrowed = who.actions is not None or who.purpose is not None
    return "a narrowed API key opens no wider one" if narrowed and action in _WIDENING else ""


def _entities(who: Principal, resource: Resource) -> str:
    """Describe the caller with its roles, and the resource, as Cedar's JSON entities."""
    roles = [{"type": "Role", "id": str(role)} for role in who.roles]
    models = [ALL_MODELS] if who.models is None else sorted(who.models)
    tenant = {} if who.tenant is None else {"tenant": who.tenant}
    return json.dumps(
        [
            {
                "uid": {"type": "Principal", "id": who.id},
                "attrs": {"name": who.name, "models": models, **tenant},
                "parents": roles,
            },
            {
                "uid": {"type": resource.type, "id": resource.id},
                "attrs": {**_CAUTIOUS[resource.type], **resource.attributes, "name": resource.id},
                "parents": [],
            },
        ]
    )


def _refused(place: str, why: str) -> PolicyError:
    return PolicyError(
        f"{place}: {why}; nothing is allowed until this is corrected",
        hint=f"the policies that LLMOS ships are in {DEFAULTS}",
    )
