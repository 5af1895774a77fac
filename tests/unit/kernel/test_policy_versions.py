"""The policies in force are those of a kept version; nothing else can take their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import update

from llmos.errors import IntegrityError, PolicyError
from llmos.kernel import policy_versions, schema
from llmos.kernel.policy import DEFAULTS, Policy
from llmos.kernel.store import Store

ALL = Policy.parse({"all.cedar": "permit (principal, action, resource);"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store.open(tmp_path / "kernel.db", schema.KERNEL)) as store:
        yield store


def test_a_home_made_before_has_none(store: Store) -> None:
    with store.read() as conn:
        assert policy_versions.in_force(conn) is None


def test_versions_are_kept_and_one_is_in_force(store: Store) -> None:
    shipped = Policy.load(DEFAULTS)
    for policy in (shipped, ALL, shipped):  # to keep it again changes nothing
        with store.transaction() as conn:
            policy_versions.keep(conn, policy)
            policy_versions.enact(conn, policy.digest)
        with store.read() as conn:
            found = policy_versions.in_force(conn)
        assert found is not None
        assert (found.digest, found.files) == (policy.digest, policy.files)
    with store.read() as conn:
        assert policy_versions.version(conn, ALL.digest).files == ALL.files


def test_a_version_that_was_changed_is_not_in_force(store: Store) -> None:
    with store.transaction() as conn:
        policy_versions.keep(conn, Policy.load(DEFAULTS))
        policy_versions.enact(conn, Policy.load(DEFAULTS).digest)
        other = '{"all.cedar": "permit (principal, action, resource);"}'
        conn.execute(update(schema.policy_versions).values(files=other))
    with store.read() as conn, pytest.raises(IntegrityError, match="were changed"):
        policy_versions.in_force(conn)


def test_a_version_that_is_missing_is_refused(store: Store) -> None:
    with store.transaction() as conn:
        policy_versions.enact(conn, ALL.digest)
    with store.read() as conn, pytest.raises(PolicyError, match="no "):
        policy_versions.in_force(conn)
