from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmos.engines.federated.shamir import PRIME, SHARE_BYTES, reconstruct, share
from llmos.errors import AggregationAborted, UpdateRefused

SECRETS = st.binary(min_size=32, max_size=32)


def points(secret: bytes, threshold: int, shares: int) -> dict[int, bytes]:
    return dict(enumerate(share(secret, threshold=threshold, shares=shares), start=1))


def interpolated(known: dict[int, int], at: int) -> int:
    """Lagrange, written apart from the code under test."""
    value = 0
    for x, y in known.items():
        term = y
        for other in known:
            if other != x:
                term = term * (at - other) * pow(x - other, PRIME - 2, PRIME) % PRIME
        value = (value + term) % PRIME
    return value


def test_the_field_is_a_field_above_every_secret() -> None:
    """Fermat to 40 bases: PRIME is no Carmichael number by the strong test, as OpenSSL does it."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        powers = [pow(base, odd << i, PRIME) for i in range(twos)]
        assert powers[0] == 1 or PRIME - 1 in powers
    assert PRIME > 2**256 - 1


@given(secret=SECRETS, shape=st.tuples(st.integers(1, 6), st.integers(0, 3)))
def test_any_threshold_of_shares_give_the_secret(secret: bytes, shape: tuple[int, int]) -> None:
    threshold, more = shape
    made = points(secret, threshold, threshold + more)
    for size in range(threshold, len(made) + 1):
        for chosen in combinations(made, size):
            some = {x: made[x] for x in reversed(chosen)}
            assert reconstruct(some, threshold=threshold, owner="a") == secret


@given(secret=SECRETS, other=SECRETS, threshold=st.integers(2, 6))
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, threshold: int) -> None:
    """The polynomial through t - 1 shares and any other secret: here it is, with its shares."""
    made = points(secret, threshold, threshold + 1)
    held = {x: int.from_bytes(made[x], "big") for x in range(1, threshold)}
    polynomial = {0: int.from_bytes(other, "big"), **held}
    forged = {
        x: interpolated(polynomial, x).to_bytes(SHARE_BYTES, "big") for x in range(1, threshold + 2)
    }
    assert all(forged[x] == made[x] for x in held)
    assert reconstruct(forged, threshold=threshold, owner="a") == other


@given(secret=SECRETS, threshold=st.integers(2, 6))
def test_too_few_shares_are_not_joined(secret: bytes, threshold: int) -> None:
    made = points(secret, threshold, 6)
    with pytest.raises(AggregationAborted, match=f"{threshold - 1} of the {threshold} shares"):
        reconstruct({x: made[x] for x in range(1, threshold)}, threshold=threshold, owner="a")


def test_shares_below_the_threshold_are_uniform() -> None:
    """Kolmogorov-Smirnov of the first of two shares of one secret; false alarm 1e-9."""
    first = [int.from_bytes(share(bytes(32), threshold=2, shares=2)[0], "big") for _ in range(2000)]
    assert stats.kstest([value / PRIME for value in first], "uniform").pvalue > 1e-9


@given(
    secret=SECRETS, wrong=st.integers(1, 5), change=st.integers(1, 2**200), more=st.integers(1, 2)
)
def test_a_wrong_share_is_seen_where_there_is_one_to_spare(
    secret: bytes, wrong: int, change: int, more: int
) -> None:
    made = points(secret, 3, 3 + more)
    place = min(wrong, len(made))
    moved = (int.from_bytes(made[place], "big") + change) % PRIME
    made[place] = moved.to_bytes(SHARE_BYTES, "big")
    with pytest.raises(UpdateRefused, match="do not fit together") as refused:
        reconstruct(made, threshold=3, owner="site-a")
    assert refused.value.site == "site-a"


def test_a_secret_that_is_none_is_refused() -> None:
    above = {x: (2**256).to_bytes(SHARE_BYTES, "big") for x in (1, 2)}
    with pytest.raises(UpdateRefused, match="do not fit together"):
        reconstruct(above, threshold=2, owner="a")


@pytest.mark.parametrize("place", [0, -1, PRIME])
def test_a_place_that_is_none_is_refused(place: int) -> None:
    made = points(bytes(32), 2, 2)
    with pytest.raises(UpdateRefused, match="no place"):
        reconstruct({1: made[1], place: made[2]}, threshold=2, owner="a")


@pytest.mark.parametrize("value", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big")])
def test_a_share_that_is_no_field_element_is_refused(value: bytes) -> None:
    made = points(bytes(32), 2, 2)
    with pytest.raises(UpdateRefused, match="no element"):
        reconstruct({1: made[1], 2: value}, threshold=2, owner="a")


@pytest.mark.parametrize(
    ("secret", "threshold", "shares"), [(bytes(31), 2, 3), (bytes(32), 0, 3), (bytes(32), 4, 3)]
)
def test_what_cannot_be_shared_is_refused(secret: bytes, threshold: int, shares: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        share(secret, threshold=threshold, shares=shares)
