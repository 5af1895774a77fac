"""Nothing ever allows what plain rules in Python deny, whatever is missing, broken or raised.

The reference says in a few lines what the shipped policies say in Cedar. Callers, keys, resources
and contexts are drawn at random, with attributes missing or of a wrong type; site policies that
parse and then fail are added; the engine is made to raise or to answer nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.kernel.identity import Kind, Principal, Role
from llmos.kernel.policy import DEFAULTS, Action, Policy, Resource

SHIPPED = Policy.load(DEFAULTS)
HARMLESS = ("public", "synthetic")
USES = {Action.CHAT, Action.LIST_MODELS}
ON_DATA = {Action.TRAIN_PRIVATE, Action.TRAIN_WITHOUT_PRIVACY}
ASKED_BY_A_COORDINATOR = {
    "purpose": "training", "method": "ffa-lora", "private": True, "epsilon_millionths": 3_000_000,
    "epsilon_year_millionths": 5_000_000, "minimum_sites": 3, "secure_aggregation": True,
    "shared_noise": False,
    "hour_utc": 21,
}  # fmt: skip
OF_MODELS = {Action.CHAT, Action.EXPORT_MODEL, Action.MEASURE}
RIGHTS: dict[Role, set[Action]] = {
    Role.ADMINISTRATOR: set(Action),
    Role.STEWARD: {
        Action.IMPORT_DATA, Action.READ_DATA, Action.ERASE_DATA, Action.MANAGE_BUDGET,
        Action.APPROVE, Action.MANAGE_PARTIES, Action.ADMIT_PARTIES, Action.MEASURE, Action.REPORT,
        Action.READ_LOG, Action.LOGIN,
    },
    Role.ENGINEER: {
        *ON_DATA, Action.COORDINATE, Action.PLAN, Action.MEASURE, Action.REPORT, Action.PULL_MODEL,
        Action.CHAT, Action.EXPORT_MODEL, Action.LOGIN,
    },
    Role.DEVELOPER: {Action.CHAT, Action.LIST_MODELS, Action.LOGIN},
    Role.AUDITOR: {Action.READ_LOG, Action.REPORT, Action.MEASURE, Action.LOGIN},
    Role.SITE: {Action.LIST_MODELS, Action.FEDERATE},
}  # fmt: skip


def reference(
    who: Principal, action: Action, resource: Resource, context: Mapping[str, Any]
) -> bool:
    """Tell what the shipped policies allow at most."""
    context = {**({} if who.purpose is None else {"purpose": who.purpose}), **context}
    rules = (
        any(
            action in RIGHTS[role] and not (role is Role.SITE and _lacks_consent(action, context))
            for role in who.roles
        ),
        _key_covers(who, action, resource, context),
        _data_allow(action, resource, context) if resource.type == "Dataset" else True,
        _models_allow(action, resource, context) if resource.type == "Model" else True,
    )
    return all(rules)


def _lacks_consent(action: Action, context: Mapping[str, Any]) -> bool:
    return action is Action.FEDERATE and "consent" not in context


def _key_covers(
    who: Principal, action: Action, resource: Resource, context: Mapping[str, Any]
) -> bool:
    models = None if who.models is None or "*" in who.models else who.models  # "*" is every model
    if models is not None and action not in USES:
        return False
    if models is not None and action is Action.CHAT and resource.id not in models:
        return False
    if who.actions is not None and action not in who.actions:
        return False
    if who.purpose is not None and context["purpose"] != who.purpose:
        return False
    narrowed = who.actions is not None or who.purpose is not None
    return not (narrowed and action in {Action.MANAGE_KEYS, Action.LOGIN})


def _data_allow(action: Action, resource: Resource, context: Mapping[str, Any]) -> bool:
    known = resource.attributes
    if action is Action.TRAIN_WITHOUT_PRIVACY and known.get("classification") not in HARMLESS:
        return False
    clear = action is Action.FEDERATE and context.get("private") is not True
    if clear and known.get("classification") not in HARMLESS:
        return False
    purposes = known.get("purposes", ())
    named = context.get("purpose")
    served = isinstance(purposes, tuple) and named in purposes
    return served if action in ON_DATA | {Action.MEASURE, Action.FEDERATE} else True


def _models_allow(action: Action, resource: Resource, context: Mapping[str, Any]) -> bool:
    known, named = resource.attributes, context.get("purpose")
    if action in OF_MODELS and named is not None and known.get("kind") != "base":
        purposes = known.get("purposes", ())
        if not isinstance(purposes, tuple) or named not in purposes:
            return False
    harmless = known.get("private") is True or known.get("classification") in HARMLESS
    return harmless or "approval" in context if action is Action.EXPORT_MODEL else True


NAMES = st.sampled_from(["a", "b", "training", "*", "", "\ud800", 'x"y'])
SOME = st.frozensets(NAMES, max_size=3)
PURPOSES = st.one_of(
    st.lists(st.sampled_from(["training", "research"]), max_size=2, unique=True).map(tuple),
    st.just("training"),  # of a wrong type
)
ATTRIBUTES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "classification": st.sampled_from(["public", "synthetic", "sensitive", "", True]),
        "purposes": PURPOSES,
        "kind": st.sampled_from(["base", "adapter", "unknown", False]),
        "private": st.sampled_from([True, False, "yes"]),
        "unheard": st.just("of"),
    },
)
PRINCIPALS = st.builds(
    Principal,
    id=NAMES,
    name=NAMES,
    roles=st.frozensets(st.sampled_from(Role), max_size=3),
    models=st.none() | SOME,
    key_id=st.just("k"),
    actions=st.none() | st.frozensets(st.sampled_from([str(a) for a in Action])),
    purpose=st.none() | st.sampled_from(["training", "research"]),
    kind=st.sampled_from(Kind),
    tenant=st.none() | NAMES,
)
RESOURCES = st.builds(Resource, st.sampled_from(["Home", "Dataset", "Model"]), NAMES, ATTRIBUTES)
CONTEXTS = st.fixed_dictionaries(
    {},
    optional={
        "purpose": st.sampled_from(["training", "research", "marketing", ""]),
        "approval": st.just("approval-1"),
        "second_factor": st.sampled_from(["totp", "none"]),
        "unheard": st.just("of"),
    },
)
REQUESTS = st.tuples(PRINCIPALS, st.sampled_from(Action), RESOURCES, CONTEXTS)


@settings(max_examples=1500, deadline=None)
@given(REQUESTS)
def test_nothing_is_allowed_that_the_reference_denies(
    request_: tuple[Principal, Action, Resource, dict[str, Any]],
) -> None:
    decision = SHIPPED.decide(*request_)
    if decision.allowed:
        assert reference(*request_)
        assert decision.policies
    elif reference(*request_):  # then it does not fit the schema, and that is said
        assert "could not be evaluated" in decision.reason


WELL_FORMED = st.sampled_from(
    [
        (Action.CHAT, "Model", {}),
        (Action.EXPORT_MODEL, "Model", {}),
        (Action.EXPORT_MODEL, "Model", {"approval": "a"}),
        (Action.TRAIN_PRIVATE, "Dataset", {"purpose": "training"}),
        (Action.TRAIN_WITHOUT_PRIVACY, "Dataset", {"purpose": "research"}),
        (Action.MEASURE, "Dataset", {"purpose": "training"}),
        (Action.READ_LOG, "Home", {}),
        (Action.LOGIN, "Home", {"second_factor": "none"}),
        (Action.MANAGE_KEYS, "Home", {}),
        (Action.COORDINATE, "Home", {}),
        (Action.FEDERATE, "Dataset", ASKED_BY_A_COORDINATOR),
        (Action.FEDERATE, "Dataset", ASKED_BY_A_COORDINATOR | {"consent": "p-1"}),
        (
            Action.FEDERATE,
            "Dataset",
            ASKED_BY_A_COORDINATOR | {"consent": "p-1", "private": False},
        ),
    ]
)
FITTING: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "Home": st.just({}),
    "Dataset": st.fixed_dictionaries(
        {},
        optional={
            "classification": st.sampled_from(["public", "sensitive"]),
            "purposes": st.sampled_from([(), ("training",), ("research", "training")]),
        },
    ),
    "Model": st.fixed_dictionaries(
        {},
        optional={
            "kind": st.sampled_from(["base", "adapter"]),
            "classification": st.sampled_from(["synthetic", "sensitive"]),
            "private": st.booleans(),
            "purposes": st.sampled_from([(), ("training",)]),
        },
    ),
}


@settings(max_examples=600, deadline=None)
@given(
    asked=WELL_FORMED,
    roles=st.frozensets(st.sampled_from(Role), max_size=2),
    purpose=st.none() | st.just("training"),
    data=st.data(),
)
def test_what_fits_the_schema_is_decided_exactly_as_the_reference_says(
    asked: tuple[Action, Any, dict[str, Any]],
    roles: frozenset[Role],
    purpose: str | None,
    data: st.DataObject,
) -> None:
    action, kind, context = asked
    attributes = data.draw(FITTING[kind])
    who = Principal("p", "someone", roles, key_id="k", purpose=purpose)
    resource = Resource(kind, "r", attributes)
    decision = SHIPPED.decide(who, action, resource, context)
    assert decision.allowed is reference(who, action, resource, context)


BROKEN = st.sampled_from(
    [
        "forbid (principal, action, resource) when { 9223372036854775807 + 1 > 0 };",
        "permit (principal, action, resource) when { 9223372036854775807 * 2 > 0 };",
        "forbid (principal, action, resource) unless { -9223372036854775807 - 2 < 0 };",
    ]
)


@settings(max_examples=200, deadline=None)
@given(REQUESTS, st.lists(BROKEN, min_size=1, max_size=3))
def test_policies_that_fail_when_they_are_evaluated_allow_nothing(
    request_: tuple[Principal, Action, Resource, dict[str, Any]], broken: list[str]
) -> None:
    everything = "permit (principal, action, resource);"
    policy = Policy.parse({"a.cedar": everything, "b.cedar": "\n".join(broken)})
    assert not policy.decide(*request_).allowed


ANSWERS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.sampled_from([ValueError, KeyError, TypeError, RuntimeError, MemoryError, RecursionError]),
    st.builds(
        dict,
        decision=st.sampled_from(["Allow", "Deny", "NoDecision", "allow", "", None]),
        diagnostics=st.sampled_from(
            [{}, {"errors": ["x"]}, {"errors": ["x"], "reason": ["p"]}, None]
        ),
    ),
)


@settings(max_examples=300, deadline=None)
@given(REQUESTS, ANSWERS)
def test_an_engine_that_raises_or_talks_nonsense_allows_nothing(
    request_: tuple[Principal, Action, Resource, dict[str, Any]], answer: Any
) -> None:
    def engine(*_: object) -> Any:
        if isinstance(answer, type):
            raise answer("out of order")
        return None if answer is None else cedarpy.AuthzResult(answer)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cedarpy, "is_authorized", engine)
        decision = SHIPPED.decide(*request_)
    clean = isinstance(answer, dict) and answer == {"decision": "Allow", "diagnostics": {}}
    assert not decision.allowed or clean  # a plain Allow is the engine's own word
