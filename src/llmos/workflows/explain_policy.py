"""Explain a decision: the policies behind it, word for word, and what would make it another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmos.kernel.identity import Principal, Role
from llmos.kernel.policy import Action, Policy, Resource
from llmos.workflows.policy_text import statements


@dataclass(frozen=True, slots=True)
class Explanation:
    """One decision in words."""

    allowed: bool
    reason: str
    policies: tuple[dict[str, Any], ...]  # file, line, name, text of each that decided
    would_allow: tuple[str, ...]  # any one of these changes would; none are known where it is empty

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return asdict(self)


def run(
    policy: Policy, who: Principal, action: Action, resource: Resource, context: dict[str, str]
) -> Explanation:
    """Ask the policies, and where they deny ask them again about each thing that could differ."""
    decision = policy.decide(who, action, resource, context)
    texts = tuple(found for found in _texts(policy) if found["name"] in decision.policies)
    changes: tuple[str, ...] = ()
    if not decision.allowed:
        changes = tuple(
            words
            for words, changed, asked in _changes(who, action, resource, context)
            if policy.decide(changed, action, resource, asked).allowed
        )
    return Explanation(decision.allowed, decision.reason, texts, changes)


def _texts(policy: Policy) -> Iterator[dict[str, Any]]:
    before = 0
    for file, text in policy.files.items():
        found = statements(text, before)
        before += len(found)
        yield from ({"file": file, **asdict(statement)} for statement in found)


def _changes(
    who: Principal, action: Action, resource: Resource, context: dict[str, str]
) -> Iterator[tuple[str, Principal, dict[str, str]]]:
    """Yield what could be different, in words, with who would then ask what."""
    if who.key_id is not None:
        yield "a key that is not narrowed", _unnarrowed(who), context
    for role in Role:
        if role not in who.roles:
            yield f"the role {role}", replace(who, roles=who.roles | {role}), context
    purposes = resource.attributes.get("purposes", ())
    for purpose in sorted(purposes) if isinstance(purposes, tuple) else ():
        if purpose != context.get("purpose"):
            yield f"the purpose {purpose}", who, {**context, "purpose": purpose}
    if action is Action.EXPORT_MODEL:
        yield "another person's approval", who, {**context, "approval": "wanted"}
        for role in Role:
            if role not in who.roles:
                both = f"the role {role} and another person's approval"
                changed = replace(who, roles=who.roles | {role})
                yield both, changed, {**context, "approval": "wanted"}


def _unnarrowed(who: Principal) -> Principal:
    return replace(who, models=None, actions=None, purpose=None)
