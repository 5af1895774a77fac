from __future__ import annotations

import pytest

from llmos.kernel.identity import Principal, Role
from llmos.kernel.policy import DEFAULTS, Action, Policy, Resource
from llmos.workflows import explain_policy
from llmos.workflows.explain_policy import Explanation

POLICY = Policy.load(DEFAULTS)
WARD = Resource(
    "Dataset", "ward", {"classification": "sensitive", "purposes": ("care", "research")}
)
LEAKY = Resource("Model", "m", {"kind": "adapter", "classification": "sensitive"})
BASE = Resource("Model", "b", {"kind": "base", "classification": "public"})


def explain(
    role: Role, action: Action, resource: Resource, context: dict[str, str] | None = None
) -> Explanation:
    who = Principal("p", "ada", frozenset({role}))
    return explain_policy.run(POLICY, who, action, resource, context or {})


def test_an_allowed_act_shows_the_policy_word_for_word() -> None:
    found = explain(Role.DEVELOPER, Action.CHAT, BASE)
    assert (found.allowed, found.would_allow) == (True, ())
    (text,) = found.policies
    assert text["name"] == "developer-uses-models"
    assert text["file"] == "default.cedar"
    line = (DEFAULTS / "default.cedar").read_text().splitlines()[text["line"] - 1]
    assert line == '@id("developer-uses-models")'
    assert text["text"].endswith(";")
    assert found.to_dict()["policies"][0]["text"] == text["text"]


def test_a_missing_role_is_named() -> None:
    found = explain(Role.DEVELOPER, Action.TRAIN_PRIVATE, WARD, {"purpose": "care"})
    assert (found.allowed, found.policies) == (False, ())
    assert found.would_allow == ("the role administrator", "the role engineer")


def test_a_purpose_that_would_do_is_named() -> None:
    found = explain(Role.ENGINEER, Action.TRAIN_PRIVATE, WARD, {"purpose": "marketing"})
    assert [text["name"] for text in found.policies] == ["purpose-limitation"]
    assert found.would_allow == ("the purpose care", "the purpose research")


def test_a_second_person_is_named() -> None:
    found = explain(Role.ENGINEER, Action.EXPORT_MODEL, LEAKY)
    assert found.would_allow == ("another person's approval",)
    outsider = explain(Role.AUDITOR, Action.EXPORT_MODEL, LEAKY)
    assert "the role engineer and another person's approval" in outsider.would_allow


def test_a_role_and_a_purpose_are_named_together() -> None:
    found = explain(Role.AUDITOR, Action.TRAIN_PRIVATE, WARD, {"purpose": "marketing"})
    assert "the role engineer and the purpose care" in found.would_allow
    assert "the role steward and the purpose care" not in found.would_allow


def test_what_nothing_would_allow() -> None:
    found = explain(Role.ADMINISTRATOR, Action.TRAIN_WITHOUT_PRIVACY, WARD, {"purpose": "care"})
    assert (found.allowed, found.would_allow) == (False, ())


def test_a_narrowed_key_is_named() -> None:
    who = Principal("p", "ada", frozenset({Role.ENGINEER}), key_id="k", actions=frozenset())
    found = explain_policy.run(POLICY, who, Action.CHAT, BASE, {})
    assert found.would_allow == ("a key that is not narrowed",)
    assert "API key" in found.reason


@pytest.mark.parametrize("named", [True, False])
def test_policies_of_several_files_are_found(named: bool) -> None:
    forbid = "forbid (principal, action, resource);"
    files = {"a.cedar": "permit (principal, action, resource);", "b.cedar": forbid}
    if named:
        files["b.cedar"] = f'@id("stop") {forbid}'
    policy = Policy.parse(files)
    who = Principal("p", "ada", frozenset())
    found = explain_policy.run(policy, who, Action.CHAT, BASE, {})
    (text,) = found.policies
    assert (text["file"], text["name"]) == ("b.cedar", "stop" if named else "policy1")
