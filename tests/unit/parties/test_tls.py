"""Handshakes over real sockets: who is let in, and who is not."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from tests.parties import NOW, Pki, meet

from llmos.crypto.certificates import CRL_LIFE, PartyId
from llmos.errors import IntegrityError
from llmos.parties.peers import Anchor
from llmos.parties.tls import (
    Credentials,
    Terms,
    client_context,
    introduction_context,
    server_context,
)

HOSPITAL = Pki()
BANK = Pki("bank.example")
SITE = HOSPITAL.credentials("site")
HUB = HOSPITAL.credentials("hub")


def hub_terms(**changes: object) -> Terms:
    return replace(HOSPITAL.terms(HUB, "site"), **changes)  # type: ignore[arg-type]


def site_context(me: Credentials | None = SITE, **changes: object) -> ssl.SSLContext:
    return client_context(replace(HOSPITAL.terms(me, "hub"), **changes))  # type: ignore[arg-type]


def test_two_parties_meet() -> None:
    met = meet(server_context(hub_terms), site_context())
    assert (met.server, met.client, met.answer) == (None, None, b"welcome")


def test_every_context_asks_for_all_checks() -> None:
    for context in (server_context(hub_terms), site_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
        assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert introduction_context().minimum_version is ssl.TLSVersion.TLSv1_3


# What is wrong with the client's certificate, and what the server says about it.
BAD_CLIENTS: dict[str, tuple[Callable[[], Credentials | None], str]] = {
    "none": (lambda: None, "PEER_DID_NOT_RETURN_A_CERTIFICATE|peer did not return"),
    "expired": (
        lambda: HOSPITAL.credentials("site", at=NOW - timedelta(days=31)),
        "certificate has expired",
    ),
    "of the future": (
        lambda: HOSPITAL.credentials("site", at=NOW + timedelta(hours=1)),
        "not yet valid",
    ),
    "of another CA of the same name": (
        lambda: Pki().credentials("site"),
        "certificate signature failure|unable to get local issuer|CRL",
    ),
    "of another organisation": (lambda: BANK.credentials("site"), "unable to get local issuer"),
    "of another party": (lambda: HOSPITAL.credentials("other"), "is not expected here"),
    "of the CA's own server": (lambda: HOSPITAL.credentials(None), "is not expected here"),
    "that names an organisation which its CA is not of": (
        lambda: HOSPITAL.credentials("", names=PartyId("bank.example", "site").names(())),
        "organisation bank.example is not trusted",
    ),
    "without a URI": (
        lambda: HOSPITAL.credentials("", names=[x509.DNSName("site.example")]),
        "0 URIs",
    ),
    "with two URIs": (
        lambda: HOSPITAL.credentials(
            "", names=[*HOSPITAL.id("site").names(()), *HOSPITAL.id("other").names(())]
        ),
        "2 URIs",
    ),
    "with a URI of another scheme": (
        lambda: HOSPITAL.credentials(
            "", names=[x509.UniformResourceIdentifier("https://hospital.example/party/site")]
        ),
        "names no party",
    ),
}


@pytest.mark.parametrize("wrong", BAD_CLIENTS)
def test_a_certificate_is_refused(wrong: str) -> None:
    make, says = BAD_CLIENTS[wrong]
    me = make()
    met = meet(server_context(hub_terms), site_context(me))
    assert met.answer == b""
    assert isinstance(met.server, ssl.SSLError)
    assert re.search(says, str(met.server)), met.server


def test_an_organisation_cannot_name_another_ones_party() -> None:
    # Both CAs are trusted, each for its own organisation.
    expected = frozenset({PartyId("bank.example", "site"), HOSPITAL.id("site")})
    terms = hub_terms(anchors=(HOSPITAL.anchor(), BANK.anchor()), expected=expected)
    bank_server = client_context(
        Terms(BANK.credentials("site"), (HOSPITAL.anchor(),), frozenset({HOSPITAL.id("hub")}))
    )
    assert meet(server_context(lambda: terms), bank_server).answer == b"welcome"
    forged = HOSPITAL.credentials("", names=PartyId("bank.example", "site").names(()))
    met = meet(server_context(lambda: terms), site_context(forged))
    assert "certificate of spiffe://bank.example/party/site is no good" in str(met.server)


def test_a_client_refuses_a_server_that_is_another_party() -> None:
    met = meet(
        server_context(lambda: hub_terms(credentials=HOSPITAL.credentials("other"))),
        site_context(),
    )
    assert met.answer == b""
    assert "spiffe://hospital.example/party/other is not expected here" in str(met.client)


def test_a_revocation_holds_from_the_next_handshake_of_a_running_server_on() -> None:
    now = [hub_terms()]
    server = server_context(lambda: now[0])
    assert meet(server, site_context()).answer == b"welcome"
    now[0] = hub_terms(anchors=(HOSPITAL.anchor(SITE),))
    met = meet(server, site_context())
    assert met.answer == b""
    assert "certificate revoked" in str(met.server)
    assert "revoked" in str(met.client)  # the alert of TLS
    assert meet(server, site_context(HOSPITAL.credentials("site"))).answer == b"welcome"


def test_a_client_refuses_a_server_that_was_revoked() -> None:
    met = meet(server_context(hub_terms), site_context(anchors=(HOSPITAL.anchor(HUB),)))
    assert "certificate revoked" in str(met.client)


def without_list() -> Anchor:
    return Anchor("hospital.example", HOSPITAL.anchor().issuers, ())


def with_expired_list() -> Anchor:
    return HOSPITAL.anchor(at=NOW - CRL_LIFE)


def with_future_list() -> Anchor:
    return HOSPITAL.anchor(at=NOW + timedelta(hours=1))


def with_forged_list() -> Anchor:
    return Anchor("hospital.example", HOSPITAL.anchor().issuers, (Pki().crl(),))


@pytest.mark.parametrize(
    ("anchor", "says"),
    [
        (without_list, "unable to get certificate CRL"),
        (with_expired_list, "CRL has expired"),
        (with_future_list, "CRL is not yet valid"),
        (with_forged_list, "CRL signature failure|unable to get certificate CRL"),
    ],
)
def test_without_a_good_revocation_list_nobody_is_believed(
    anchor: Callable[[], Anchor], says: str
) -> None:
    met = meet(server_context(lambda: hub_terms(anchors=(anchor(),))), site_context())
    assert met.answer == b""
    assert re.search(says, str(met.server)), met.server
    met = meet(server_context(hub_terms), site_context(anchors=(anchor(),)))
    assert re.search(says, str(met.client)), met.client


def test_a_session_cannot_be_resumed_past_a_revocation() -> None:
    now = [hub_terms()]
    server, client = server_context(lambda: now[0]), site_context()
    first = meet(server, client)
    assert first.answer == b"welcome"
    now[0] = hub_terms(anchors=(HOSPITAL.anchor(SITE),))
    again = meet(server, client, session=first.session)
    assert again.answer == b""
    assert "certificate revoked" in str(again.server)


def test_older_tls_is_refused() -> None:
    client = site_context()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    met = meet(server_context(hub_terms), client)
    assert met.answer == b""
    assert isinstance(met.server, ssl.SSLError)


def test_a_server_may_let_in_callers_without_certificate_but_not_with_a_bad_one() -> None:
    server = server_context(hub_terms, optional=True)
    assert meet(server, site_context(None)).answer == b"welcome"
    assert meet(server, site_context()).answer == b"welcome"
    assert meet(server, site_context(HOSPITAL.credentials("other"))).answer == b""
    gone = server_context(lambda: hub_terms(anchors=(HOSPITAL.anchor(SITE),)), optional=True)
    assert "certificate revoked" in str(meet(gone, site_context()).server)


def test_a_server_that_cannot_tell_its_terms_refuses(caplog: pytest.LogCaptureFixture) -> None:
    terms = iter([hub_terms()])

    def current() -> Terms:
        for known in terms:
            return known
        raise IntegrityError("the clock was set back")

    server = server_context(current)
    met = meet(server, site_context())
    assert met.answer == b""
    assert isinstance(met.client, ssl.SSLError)
    assert "the clock was set back" in caplog.text


def test_a_garbled_certificate_is_refused() -> None:
    context = client_context(hub_terms())
    with pytest.raises(ssl.SSLCertVerificationError):
        context.check_peer(b"\x30\x03\x02\x01\x01")
