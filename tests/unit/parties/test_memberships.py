"""What this home knows of its own certificate and of the list by which it believes others."""

from __future__ import annotations

from datetime import timedelta

import pytest
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CERTIFICATE_LIFE
from llmos.parties.memberships import Membership
from llmos.parties.tls import Credentials

PKI = Pki()
OWN, OTHER = PKI.credentials("north"), PKI.credentials("south")
DAY = timedelta(days=1)


def membership(credentials: Credentials | None, *revoked: Credentials) -> Membership:
    return Membership(
        id=PKI.id("north"),
        url="https://hospital.example:8443",
        authority=PKI.authority.certificate,
        crl=PKI.crl(*revoked),
        certificate=None if credentials is None else credentials.certificate,
        key="key",
        next_key=None,
    )


@pytest.mark.parametrize(
    ("member", "after", "good"),
    [
        (membership(OWN, OTHER), timedelta(0), True),
        (membership(OWN), CERTIFICATE_LIFE + DAY, False),  # it has run out
        (membership(OWN, OWN), timedelta(0), False),  # it is revoked
        (membership(None), timedelta(0), False),  # it has not come yet
    ],
)
def test_a_certificate_is_good_while_it_is_there_in_date_and_not_revoked(
    member: Membership, after: timedelta, good: bool
) -> None:
    assert member.is_good(NOW + after) is good


def test_a_list_is_over_at_its_end() -> None:
    member = membership(OWN)
    end = member.crl.next_update_utc
    assert end is not None
    assert not member.list_is_over(end - timedelta(seconds=1))
    assert member.list_is_over(end)
