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

    def enough(changes: Iterator[_Change]) -> tuple[str, ...]:
        allowed = (c for c in changes if policy.decide(c.who, action, resource, c.context).allowed)
        return tuple(change.words for change in allowed)

    changes: tuple[str, ...] = ()
    if not decision.allowed:
        asked = (who, action, resource, context)
        changes = enough(_single_changes(*asked)) or enough(_double_changes(*asked))
    return Explanation(decision.allowed, decision.reason, texts, changes)


def _texts(policy: Policy) -> Iterator[dict[str, Any]]:
    before = 0
    for file, text in policy.files.items():
        found = statements(text, before)
        before += len(found)
        yield from ({"file": file, **asdict(statement)} for statement in found)


@dataclass(frozen=True, slots=True)
class _Change:
    """What could be different, in words, and who would then ask what."""

    words: str
    who: Principal
    context: dict[str, str]


def _single_changes(
    who: Principal, action: Action, resource: Resource, context: dict[str, str]
) -> Iterator[_Change]:
    if who.key_id is not None:
        yield _Change("a key that is not narrowed", _unnarrowed(who), context)
    for role in sorted(set(Role) - who.roles):
        yield _Change(f"the role {role}", replace(who, roles=who.roles | {role}), context)
    purposes = resource.attributes.get("purposes", ())
    for purpose in sorted(purposes) if isinstance(purposes, tuple) else ():
        yield _Change(f"the purpose {purpose}", who, {**context, "purpose": purpose})
    if action is Action.EXPORT_MODEL:
        yield _Change("another person's approval", who, {**context, "approval": "wanted"})


def _double_changes(
    who: Principal, action: Action, resource: Resource, context: dict[str, str]
) -> Iterator[_Change]:
    """Yield what takes a role and something else."""
    for role in sorted(set(Role) - who.roles):
        trusted = replace(who, roles=who.roles | {role})
        for other in _single_changes(trusted, action, resource, context):
            if trusted.roles == other.who.roles:
                yield replace(other, words=f"the role {role} and {other.words}")


def _unnarrowed(who: Principal) -> Principal:
    return replace(who, models=None, actions=None, purpose=None)
