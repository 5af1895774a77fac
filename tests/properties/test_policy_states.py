"""Who may do what, against a dict: people, roles and API keys come, go and are narrowed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule
from tests.unit.kernel.test_policy import HOME, PRIVATE, RIGHTS, SENSITIVE, SUBJECT, context_of

from llmos.errors import AuthenticationError, PrincipalExists
from llmos.kernel.identity import Identity, Principal, Role
from llmos.kernel.policy import DEFAULTS, Action, Policy
from llmos.kernel.schema import KERNEL
from llmos.kernel.store import Store

PEPPER = bytes(range(32))
POLICY = Policy.load(DEFAULTS)
MODELS = st.one_of(st.none(), st.frozensets(st.sampled_from(["safe", "other"]), min_size=1))
ROLES = st.frozensets(st.sampled_from(Role))


@dataclass
class Person:
    roles: frozenset[Role]
    disabled: bool = False


@dataclass
class Key:
    owner: str
    id: str
    models: frozenset[str] | None
    valid: bool


def may(roles: frozenset[Role], models: frozenset[str] | None, action: Action) -> bool:
    """Say what the default policies are meant to allow on `SUBJECT`."""
    allowed = any(action in RIGHTS[role] for role in roles)
    if models is None:
        return allowed
    if action is Action.CHAT:
        return allowed and PRIVATE.id in models
    return allowed and action is Action.LIST_MODELS


class PolicyAndDict(RuleBasedStateMachine):
    """Whoever asks, in whatever order, gets what the dict says, or is nobody."""

    people = Bundle("people")
    tokens = Bundle("tokens")

    @initialize()
    def make(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.known: dict[str, Person] = {}
        self.keys: dict[str, Key] = {}
        self.open()

    def open(self) -> None:
        self.store = Store.open(Path(self.folder.name) / "kernel.db", KERNEL)
        self.identity = Identity(self.store, PEPPER)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(target=people, name=st.sampled_from("abcde"), roles=ROLES)
    def add(self, name: str, roles: frozenset[Role]) -> object:
        if name in self.known:
            with pytest.raises(PrincipalExists), self.store.transaction() as conn:
                self.identity.add_principal(conn, name, roles)
            return multiple()
        with self.store.transaction() as conn:
            self.identity.add_principal(conn, name, roles)
        self.known[name] = Person(roles)
        return name

    @rule(name=people)
    def disable(self, name: str) -> None:
        with self.store.transaction() as conn:
            self.identity.disable_principal(conn, name)
        self.known[name].disabled = True

    @rule(target=tokens, name=people, models=MODELS, days=st.sampled_from([None, -1, 1]))
    def issue(self, name: str, models: frozenset[str] | None, days: int | None) -> object:
        if self.known[name].disabled:
            return multiple()
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        with self.store.transaction() as conn:
            owner = self.identity.principal(name)
            key = self.identity.create_key(conn, owner, "", models, expires)
        self.keys[key.token] = Key(name, key.id, models, valid=days != -1)
        return key.token

    @rule(token=tokens)
    def revoke(self, token: str) -> None:
        with self.store.transaction() as conn:
            self.identity.revoke_key(conn, self.keys[token].id)
        self.keys[token].valid = False

    @rule(name=people, action=st.sampled_from(Action))
    def ask_by_name(self, name: str, action: Action) -> None:
        person = self.known[name]
        if person.disabled:
            with pytest.raises(AuthenticationError):
                self.identity.principal(name)
            return
        self.decide(self.identity.principal(name), person.roles, None, action)

    @rule(token=tokens, action=st.sampled_from(Action))
    def ask_by_key(self, token: str, action: Action) -> None:
        key = self.keys[token]
        if not key.valid or self.known[key.owner].disabled:
            with pytest.raises(AuthenticationError):
                self.identity.authenticate(token)
            return
        who = self.identity.authenticate(token)
        assert (who.name, who.key_id) == (key.owner, key.id)
        self.decide(who, self.known[key.owner].roles, key.models, action)

    @rule(token=tokens, position=st.integers(6, 57))
    def ask_with_a_wrong_key(self, token: str, position: int) -> None:
        wrong = token[:position] + ("0" if token[position] != "0" else "1") + token[position + 1 :]
        with pytest.raises(AuthenticationError):
            self.identity.authenticate(wrong)

    def decide(
        self,
        who: Principal,
        roles: frozenset[Role],
        models: frozenset[str] | None,
        action: Action,
    ) -> None:
        decision = POLICY.decide(who, action, SUBJECT[action], context_of(action))
        assert decision.allowed is may(roles, models, action)
        # what is forbidden to everybody stays so, whatever roles add up
        wrong_purpose = {"purpose": "advertising"}
        assert not POLICY.decide(who, Action.TRAIN_PRIVATE, SENSITIVE, wrong_purpose).allowed
        assert not POLICY.decide(who, Action.TRAIN_PRIVATE, HOME, context_of(action)).allowed

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()


TestPolicyAndDict = PolicyAndDict.TestCase
TestPolicyAndDict.settings = settings.get_profile("machines")
