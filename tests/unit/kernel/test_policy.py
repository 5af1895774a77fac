from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.errors import PolicyError
from llmos.kernel.identity import Principal, Role
from llmos.kernel.policy import DEFAULTS, Action, Decision, Policy, Resource

HOME = Resource("Home", "h")
SENSITIVE = Resource(
    "Dataset", "patients", {"classification": "sensitive", "purposes": ("research", "training")}
)
SYNTHETIC = Resource(
    "Dataset", "made-up", {"classification": "synthetic", "purposes": ("training",)}
)
BASE = Resource("Model", "base", {"kind": "base", "classification": "public", "private": False})
LEAKY = Resource(
    "Model", "leaky", {"kind": "adapter", "classification": "sensitive", "private": False}
)
PRIVATE = Resource(
    "Model", "safe", {"kind": "adapter", "classification": "sensitive", "private": True}
)
TRAINING = {"purpose": "training"}
FEDERATED = TRAINING | {
    "method": "ffa-lora", "private": True, "epsilon_millionths": 3_000_000,
    "epsilon_year_millionths": 5_000_000, "minimum_sites": 3, "secure_aggregation": True,
    "shared_noise": False,
    "hour_utc": 21,
}  # fmt: skip

# What each action may be asked of, and with which resources of the defaults' matrix.
SUBJECT = {
    Action.IMPORT_DATA: SENSITIVE,
    Action.READ_DATA: SENSITIVE,
    Action.ERASE_DATA: SENSITIVE,
    Action.TRAIN_PRIVATE: SENSITIVE,
    Action.TRAIN_WITHOUT_PRIVACY: SYNTHETIC,
    Action.MEASURE: SENSITIVE,
    Action.REPORT: PRIVATE,
    Action.PULL_MODEL: BASE,
    Action.EXPORT_MODEL: PRIVATE,
    Action.CHAT: PRIVATE,
    Action.LIST_MODELS: HOME,
    Action.MANAGE_KEYS: HOME,
    Action.MANAGE_BUDGET: SENSITIVE,
    Action.MANAGE_JOBS: HOME,
    Action.MANAGE_VAULT: HOME,
    Action.READ_LOG: HOME,
    Action.PLAN: SENSITIVE,
    Action.SERVE: HOME,
    Action.APPROVE: HOME,
    Action.MANAGE_PARTNERS: HOME,
    Action.WITNESS: HOME,
    Action.MANAGE_PARTIES: HOME,
    Action.ADMIT_PARTIES: HOME,
    Action.MANAGE_POLICY: HOME,
    Action.LOGIN: HOME,
    Action.COORDINATE: HOME,
    Action.FEDERATE: SENSITIVE,
}
RIGHTS = {
    Role.ADMINISTRATOR: set(Action),
    Role.STEWARD: {
        Action.IMPORT_DATA, Action.READ_DATA, Action.ERASE_DATA, Action.MANAGE_BUDGET,
        Action.MEASURE, Action.REPORT, Action.READ_LOG, Action.APPROVE, Action.MANAGE_PARTIES,
        Action.ADMIT_PARTIES, Action.LOGIN,
    },
    Role.ENGINEER: {
        Action.TRAIN_PRIVATE, Action.TRAIN_WITHOUT_PRIVACY, Action.COORDINATE, Action.PLAN,
        Action.MEASURE, Action.REPORT, Action.PULL_MODEL, Action.CHAT, Action.EXPORT_MODEL,
        Action.LOGIN,
    },
    Role.DEVELOPER: {Action.CHAT, Action.LIST_MODELS, Action.LOGIN},
    Role.AUDITOR: {Action.READ_LOG, Action.REPORT, Action.MEASURE, Action.LOGIN},
    Role.SITE: {Action.LIST_MODELS, Action.FEDERATE},
}  # fmt: skip

# Conditions that parse and fit the schema, and fail when they are evaluated.
FAILING = (
    "9223372036854775807 + 1 > 0",
    "-9223372036854775807 - 2 < 0",
    "9223372036854775807 * 2 > 0",
)


@pytest.fixture(scope="module")
def vectors() -> Path:
    return Path(__file__).parents[2] / "vectors"


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(DEFAULTS)


def someone(*roles: Role, models: frozenset[str] | None = None) -> Principal:
    return Principal("p1", "someone", frozenset(roles), models)


def context_of(action: Action) -> dict[str, Any]:
    if action is Action.LOGIN:
        return {"second_factor": "none"}
    if action is Action.FEDERATE:
        return FEDERATED | {"consent": "p-2"}
    on_data = {Action.TRAIN_PRIVATE, Action.TRAIN_WITHOUT_PRIVACY, Action.MEASURE}
    return dict(TRAINING) if action in on_data else {}


def folder_with(folder: Path, **policies: str) -> Path:
    for name, text in policies.items():
        (folder / f"{name}.cedar").write_text(text)
    return folder


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("action", Action)
def test_defaults_give_each_role_its_rights(policy: Policy, role: Role, action: Action) -> None:
    decision = policy.decide(someone(role), action, SUBJECT[action], context_of(action))
    assert decision.allowed is (action in RIGHTS[role])
    if decision.allowed:
        special = ("people-with-a-role-log-in", "federated-training-takes-consent")
        assert decision.policies[0].startswith((role.value, *special))
    else:
        assert decision == Decision(False, (), "no policy permits it")


def test_rights_of_roles_add_up_and_nobody_has_none(policy: Policy) -> None:
    both = someone(Role.DEVELOPER, Role.AUDITOR)
    assert policy.decide(both, Action.CHAT, BASE, {}).allowed
    assert policy.decide(both, Action.READ_LOG, HOME, {}).allowed
    for action in Action:
        assert not policy.decide(someone(), action, SUBJECT[action], context_of(action)).allowed


def test_a_coordinator_trains_here_only_with_consent_or_a_rule_of_this_site(
    policy: Policy, tmp_path: Path
) -> None:
    asks = someone(Role.SITE)
    consent = FEDERATED | {"consent": "p-2"}
    assert not policy.decide(asks, Action.FEDERATE, SENSITIVE, FEDERATED).allowed
    assert policy.decide(asks, Action.FEDERATE, SENSITIVE, consent).allowed
    clear = policy.decide(asks, Action.FEDERATE, SENSITIVE, consent | {"private": False})
    assert clear.policies == ("no-federated-training-without-privacy-on-sensitive-data",)
    other = policy.decide(asks, Action.FEDERATE, SENSITIVE, consent | {"purpose": "marketing"})
    assert other.policies == ("purpose-limitation",)
    shipped = (DEFAULTS / "default.cedar").read_text()
    rule = """@id("at-night") permit (principal == Principal::"p1", action == Action::"federate",
      resource == Dataset::"patients") when { context.epsilon_year_millionths <= 5000000 &&
      context.secure_aggregation && context.minimum_sites >= 3 && context.hour_utc >= 20 };"""
    own = Policy.load(folder_with(tmp_path, default=shipped, own=rule))
    assert own.decide(asks, Action.FEDERATE, SENSITIVE, FEDERATED).policies == ("at-night",)
    for change in (
        {"epsilon_year_millionths": 5_000_001},
        {"secure_aggregation": False},
        {"minimum_sites": 2},
        {"hour_utc": 19},
    ):
        assert not own.decide(asks, Action.FEDERATE, SENSITIVE, FEDERATED | change).allowed
    assert not own.decide(asks, Action.FEDERATE, SYNTHETIC, FEDERATED).allowed


@pytest.mark.parametrize("role", Role)
def test_nobody_trains_without_privacy_on_sensitive_data(policy: Policy, role: Role) -> None:
    decision = policy.decide(someone(role), Action.TRAIN_WITHOUT_PRIVACY, SENSITIVE, TRAINING)
    assert not decision.allowed
    assert decision.policies == ("no-training-without-privacy-on-sensitive-data",)
    assert "forbidden by no-training-without-privacy" in decision.reason


@pytest.mark.parametrize("classification", ["public", "synthetic"])
def test_engineers_train_without_privacy_on_data_of_nobody(
    policy: Policy, classification: str
) -> None:
    data = Resource("Dataset", "d", {"classification": classification, "purposes": ("training",)})
    engineer = someone(Role.ENGINEER)
    assert policy.decide(engineer, Action.TRAIN_WITHOUT_PRIVACY, data, TRAINING).allowed


@pytest.mark.parametrize("role", [Role.ADMINISTRATOR, Role.ENGINEER])
def test_data_serves_only_its_purposes(policy: Policy, role: Role) -> None:
    for purpose, allowed in (("research", True), ("marketing", False), ("", False)):
        decision = policy.decide(
            someone(role), Action.TRAIN_PRIVATE, SENSITIVE, {"purpose": purpose}
        )
        assert decision.allowed is allowed
        assert ("purpose-limitation" in decision.policies) is not allowed


@pytest.mark.parametrize("role", [Role.ADMINISTRATOR, Role.ENGINEER])
def test_one_person_exports_only_what_cannot_hold_sensitive_data(
    policy: Policy, role: Role
) -> None:
    who = someone(role)
    assert policy.decide(who, Action.EXPORT_MODEL, PRIVATE, {}).allowed
    assert policy.decide(who, Action.EXPORT_MODEL, BASE, {}).allowed
    alone = policy.decide(who, Action.EXPORT_MODEL, LEAKY, {})
    assert alone.policies == ("two-people-export-what-may-hold-data",)
    assert policy.decide(who, Action.EXPORT_MODEL, LEAKY, {"approval": "approval-1"}).allowed
    outsider = someone(Role.AUDITOR)
    assert not policy.decide(outsider, Action.EXPORT_MODEL, LEAKY, {"approval": "a"}).allowed


@pytest.mark.parametrize("action", [Action.CHAT, Action.EXPORT_MODEL])
def test_models_serve_only_what_they_were_trained_for(policy: Policy, action: Action) -> None:
    model = Resource("Model", "m", {**PRIVATE.attributes, "purposes": ("research",)})
    who = someone(Role.ENGINEER)
    assert policy.decide(who, action, model, {}).allowed  # no purpose is named
    assert policy.decide(who, action, model, {"purpose": "research"}).allowed
    assert policy.decide(who, action, BASE, {"purpose": "marketing"}).allowed
    decision = policy.decide(who, action, model, {"purpose": "marketing"})
    assert decision.policies == ("purpose-limitation-of-models",)


def test_measuring_is_a_use_of_the_data(policy: Policy) -> None:
    who = someone(Role.ADMINISTRATOR)
    assert policy.decide(who, Action.MEASURE, SENSITIVE, {"purpose": "research"}).allowed
    for context in ({}, {"purpose": "marketing"}):
        decision = policy.decide(who, Action.MEASURE, SENSITIVE, context)
        assert decision.policies == ("purpose-limitation-of-measuring",)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("action", Action)
def test_a_key_for_some_actions_never_does_more_than_its_owner(
    policy: Policy, role: Role, action: Action
) -> None:
    every = replace(someone(role), key_id="k", actions=frozenset(map(str, Action)))
    allowed = policy.decide(every, action, SUBJECT[action], context_of(action)).allowed
    widening = action in {Action.MANAGE_KEYS, Action.LOGIN}
    assert allowed is (action in RIGHTS[role] and not widening)
    other = replace(every, actions=every.actions - {str(action)})  # type: ignore[operator]
    decision = policy.decide(other, action, SUBJECT[action], context_of(action))
    assert (decision.allowed, decision.reason) == (False, f"the API key is not for {action}")


def test_a_key_for_a_purpose_names_it_for_its_holder(policy: Policy) -> None:
    bound = replace(someone(Role.ADMINISTRATOR), key_id="k", purpose="research")
    assert policy.decide(bound, Action.TRAIN_PRIVATE, SENSITIVE, {}).allowed
    assert policy.decide(bound, Action.TRAIN_PRIVATE, SENSITIVE, {"purpose": "research"}).allowed
    decision = policy.decide(bound, Action.TRAIN_PRIVATE, SENSITIVE, TRAINING)
    assert (decision.allowed, decision.policies) == (False, ())
    assert "for the purpose 'research' only" in decision.reason
    assert not policy.decide(bound, Action.TRAIN_PRIVATE, SYNTHETIC, {}).allowed
    assert not policy.decide(bound, Action.MANAGE_KEYS, HOME, {}).allowed


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("action", Action)
def test_a_restricted_key_only_uses_its_models(policy: Policy, role: Role, action: Action) -> None:
    narrow = someone(role, models=frozenset({"safe"}))
    allowed = policy.decide(narrow, action, SUBJECT[action], context_of(action)).allowed
    assert allowed is (action in RIGHTS[role] & {Action.CHAT, Action.LIST_MODELS})
    assert not policy.decide(narrow, Action.CHAT, BASE, {}).allowed
    assert not policy.decide(someone(role, models=frozenset()), Action.CHAT, BASE, {}).allowed


def test_what_is_not_known_counts_as_most_sensitive(policy: Policy) -> None:
    engineer = someone(Role.ENGINEER)
    assert policy.decide(engineer, Action.PULL_MODEL, Resource("Model", "m"), {}).allowed
    assert not policy.decide(engineer, Action.EXPORT_MODEL, Resource("Model", "m"), {}).allowed
    unknown = Resource("Dataset", "d", {"purposes": ("training",)})
    assert policy.decide(engineer, Action.TRAIN_PRIVATE, unknown, TRAINING).allowed
    assert not policy.decide(engineer, Action.TRAIN_WITHOUT_PRIVACY, unknown, TRAINING).allowed
    assert not policy.decide(
        engineer, Action.TRAIN_PRIVATE, Resource("Dataset", "d"), TRAINING
    ).allowed


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        (Action.TRAIN_PRIVATE, SENSITIVE, {}),  # no purpose
        (Action.TRAIN_PRIVATE, BASE, TRAINING),  # a model is no data
        (Action.CHAT, BASE, {"unheard": "of"}),
        (Action.SERVE, SENSITIVE, {}),
        (Action.CHAT, Resource("Model", "m", {"private": "yes"}), {}),
        (Action.CHAT, Resource("Model", "m", {"unheard": "of"}), {}),
        (Action.CHAT, Resource("Model", "\ud800"), {}),
    ],
)
def test_a_request_that_does_not_fit_the_schema_is_denied(
    policy: Policy, action: Action, resource: Resource, context: dict[str, str]
) -> None:
    decision = policy.decide(someone(Role.ADMINISTRATOR), action, resource, context)
    assert (decision.allowed, decision.policies) == (False, ())
    assert decision.reason.startswith("the policies could not be evaluated: ")


class Broken(Exception):
    """What nobody expects from the engine."""


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, RuntimeError, Broken])
@pytest.mark.parametrize("call", ["is_authorized", "Entities"])
def test_whatever_the_engine_raises_is_a_denial_that_says_so(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, error: type[Exception], call: str
) -> None:
    def fail(*_: object) -> None:
        raise error("out of order")

    if call == "Entities":
        policy = replace(policy, _parse=fail)
    else:
        monkeypatch.setattr(cedarpy, call, fail)
    decision = policy.decide(someone(Role.ADMINISTRATOR), Action.CHAT, BASE, {})
    assert not decision.allowed
    assert "out of order" in decision.reason


@pytest.mark.parametrize("answer", [{}, {"decision": "Maybe"}, {"decision": "NoDecision"}, None])
def test_an_answer_that_says_nothing_is_a_denial(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, answer: dict[str, str] | None
) -> None:
    said = None if answer is None else cedarpy.AuthzResult(answer)
    monkeypatch.setattr(cedarpy, "is_authorized", lambda *_: said)
    assert not policy.decide(someone(Role.ADMINISTRATOR), Action.CHAT, BASE, {}).allowed


@pytest.mark.parametrize("name", ['"', "a\nb", 'x", "y": "z', 'Model::"safe"', "模型", ""])
def test_names_are_only_names(policy: Policy, name: str) -> None:
    strange = Resource("Model", name, dict(BASE.attributes))
    narrow = someone(Role.DEVELOPER, models=frozenset({name}))
    assert policy.decide(narrow, Action.CHAT, strange, {}).allowed
    assert not policy.decide(narrow, Action.CHAT, PRIVATE, {}).allowed


def test_a_failing_forbid_denies_though_cedar_allows(tmp_path: Path) -> None:
    texts = {
        "all": '@id("all") permit (principal, action, resource);',
        "broken": f"forbid (principal, action, resource) when {{ {FAILING[0]} }};",
    }
    policy = Policy.load(folder_with(tmp_path, **texts))
    raw = cedarpy.is_authorized(
        {"principal": 'Principal::"p"', "action": 'Action::"chat"', "resource": 'Model::"m"'},
        "\n".join(texts.values()),
        [],
    )
    assert raw.allowed  # the pitfall is real
    decision = policy.decide(someone(Role.ADMINISTRATOR), Action.CHAT, BASE, {})
    assert (decision.allowed, decision.policies) == (False, ("all",))
    assert "overflow" in decision.reason


CONDITIONS = st.sampled_from(
    [*FAILING, "true", "false", 'principal.name == "someone"', "context has purpose"]
)


@settings(max_examples=60, deadline=None)
@given(
    rules=st.lists(
        st.tuples(st.sampled_from(["permit", "forbid"]), CONDITIONS, st.booleans()), max_size=6
    )
)
def test_no_failing_policy_ever_allows(
    tmp_path_factory: pytest.TempPathFactory, rules: list[tuple[str, str, bool]]
) -> None:
    text = "permit (principal, action, resource);\n"
    for effect, condition, positive in rules:
        clause = f"{'when' if positive else 'unless'} {{ {condition} }}"
        text += f"{effect} (principal, action, resource) {clause};\n"
    policy = Policy.load(folder_with(tmp_path_factory.mktemp("policy"), generated=text))
    allowed = policy.decide(someone(Role.ADMINISTRATOR), Action.CHAT, BASE, {}).allowed

    def forbids(effect: str, condition: str, positive: bool) -> bool:
        truth = condition in {"true", 'principal.name == "someone"'}
        return effect == "forbid" and truth is positive

    fails = any(condition in FAILING for _, condition, _ in rules)
    assert allowed is (not fails and not any(forbids(*rule) for rule in rules))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("permit (principal, action", "parse"),
        ("permit (principal, action, resource) when { resource.legal_hold };", "legal_hold"),
        ('permit (principal, action == Action::"fly", resource);', "fly"),
        ('permit (principal == User::"x", action, resource);', "User"),
    ],
)
def test_one_wrong_policy_refuses_all(tmp_path: Path, text: str, why: str) -> None:
    shutil.copy(DEFAULTS / "default.cedar", tmp_path)
    folder = folder_with(tmp_path, wrong=text)
    with pytest.raises(PolicyError, match="nothing is allowed") as caught:
        Policy.load(folder)
    assert "wrong.cedar" in caught.value.message
    assert why in caught.value.message


def test_missing_or_unreadable_files_refuse_all(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"no \*\.cedar file"):
        Policy.load(tmp_path)
    (tmp_path / "a.cedar").write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="decode"):
        Policy.load(tmp_path)


def test_the_schema_is_that_of_the_code_not_of_the_folder(tmp_path: Path) -> None:
    """A folder of a home made before has a schema that does not know the newest actions."""
    shutil.copy(DEFAULTS / "default.cedar", tmp_path)
    (tmp_path / "policy.cedarschema").write_text("entity Nothing;")
    assert (
        Policy.load(tmp_path)
        .decide(someone(Role.ADMINISTRATOR), Action.LOGIN, HOME, {"second_factor": "totp"})
        .allowed
    )


def test_policies_of_the_first_release_still_fit(vectors: Path) -> None:
    text = (vectors / "default_0_1_0.cedar").read_text()
    policy = Policy.parse({"default.cedar": text})
    admin = someone(Role.ADMINISTRATOR)
    assert policy.decide(admin, Action.MANAGE_POLICY, HOME, {}).allowed
    assert policy.decide(someone(Role.STEWARD), Action.APPROVE, HOME, {}).allowed


def test_several_files_are_one_policy_and_have_one_digest(tmp_path: Path) -> None:
    shutil.copy(DEFAULTS / "default.cedar", tmp_path)
    before = Policy.load(tmp_path)
    assert before.digest == Policy.load(DEFAULTS).digest == Policy.parse(before.files).digest
    hold = '@id("hold") forbid (principal, action == Action::"chat", resource);  // no newline'
    after = Policy.load(folder_with(tmp_path, a_hold=hold, b_empty=""))
    assert after.digest != before.digest
    decision = after.decide(someone(Role.ADMINISTRATOR), Action.CHAT, BASE, {})
    assert decision.policies == ("hold",)


def test_the_schema_knows_exactly_our_actions() -> None:
    text = (DEFAULTS / "policy.cedarschema").read_text()
    for action in Action:
        assert f'"{action}"' in text
    rules = "\n".join(f'permit (principal, action == Action::"{a}", resource);' for a in Action)
    assert cedarpy.validate_policies(rules, text).validation_passed


def test_resources_are_shown_with_their_kind() -> None:
    assert str(SENSITIVE) == "Dataset::patients"
