from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.engines.federated.conftest import LAYOUT, make_session

from llmos.engines.federated.codec import Encoding, Header
from llmos.engines.federated.session import Session, default_threshold, framed
from llmos.errors import InvalidPrivacyParameter, UpdateRefused


@pytest.mark.parametrize(
    "sites", [(), ("a",), ("a", "b"), ("b", "a", "c"), ("a", "a", "b"), ("", "a", "b")]
)
def test_fewer_than_three_sites_or_a_list_that_is_none_are_refused(sites: tuple[str, ...]) -> None:
    header = make_session(3).update
    with pytest.raises(InvalidPrivacyParameter, match="sites must be"):
        Session("job", sites, 3, header)


@pytest.mark.parametrize(("sites", "threshold"), [(3, 2), (3, 4), (4, 2), (6, 3), (16, 8), (4, -3)])
def test_thresholds_that_prove_nothing_are_refused(sites: int, threshold: int) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="threshold must be"):
        make_session(sites, threshold=threshold)


@pytest.mark.parametrize(
    ("sites", "threshold"), [(3, 3), (4, 3), (5, 3), (6, 4), (16, 9), (16, 16)]
)
def test_thresholds_above_half_are_accepted(sites: int, threshold: int) -> None:
    assert make_session(sites, threshold=threshold).threshold == threshold


def test_floats_are_not_masked() -> None:
    with pytest.raises(InvalidPrivacyParameter, match="update must be"):
        replace(make_session(), update=Header(Encoding.FLOAT32, LAYOUT, 3, 0, 0))


@given(st.integers(3, 500))
def test_the_default_threshold_keeps_out_every_coalition_below_a_third(sites: int) -> None:
    threshold = default_threshold(sites)
    third = -(-sites // 3) - 1  # the largest number of sites below a third
    assert 3 <= threshold <= sites
    assert 2 * threshold > sites + third  # Theorem 6.5
    assert threshold - third >= 2 or sites == 3
    assert sites - threshold >= third or sites <= 5


def test_colluders_leave_two_honest_summands_and_one_half() -> None:
    assert [make_session(n).colluders for n in (3, 4, 5, 7, 16)] == [1, 1, 2, 2, 5]
    assert make_session(5, threshold=3).colluders == 0
    for session in (make_session(n) for n in range(3, 17)):
        assert 2 * session.threshold > len(session.sites) + session.colluders
        assert session.threshold >= session.colluders + 2


def test_everything_agreed_on_is_in_the_digest() -> None:
    sessions = [
        make_session(),
        make_session(job="job-2"),
        make_session(round=2),
        make_session(attempt=1),
        make_session(5, threshold=3),
        make_session(threshold=4),
        make_session(("site-a", "site-b", "site-c", "site-x")),
        make_session(entries=51),
        make_session(bits=21),
    ]
    assert len({session.digest for session in sessions}) == len(sessions)
    assert make_session().digest == sessions[0].digest


def test_a_message_of_another_session_is_refused() -> None:
    session = make_session()
    session.check(session.digest, "site-a")
    with pytest.raises(UpdateRefused, match="another job, round, attempt"):
        session.check(make_session(attempt=1).digest, "site-a")


def test_statements_differ_in_everything_they_say() -> None:
    session = make_session()
    statements = {
        session.key_statement("site-a", b"1" * 32, b"2" * 32),
        session.key_statement("site-b", b"1" * 32, b"2" * 32),
        session.key_statement("site-a", b"2" * 32, b"1" * 32),
        make_session(round=9).key_statement("site-a", b"1" * 32, b"2" * 32),
        session.survivor_statement(b"r", ("a", "b")),
        session.survivor_statement(b"r", ("ab",)),
        session.survivor_statement(b"q", ("a", "b")),
    }
    assert len(statements) == 7


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_framing_is_injective(one: list[bytes], other: list[bytes]) -> None:
    assert (framed(*one) == framed(*other)) == (one == other)
