"""Joining and renewing: once, by whom was invited, in one transaction."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from sqlalchemy import select
from tests.parties import NOW, Pki

from llmos.crypto.certificates import CRL_LIFE, PartyId
from llmos.errors import (
    CertificateRefused,
    IntegrityError,
    JoinRefused,
    PartyExists,
    PermissionDenied,
    UnknownParty,
)
from llmos.kernel.identity import Role
from llmos.kernel.kernel import Kernel
from llmos.parties import admission, register
from llmos.parties.authority import TOKEN_LIFE, PartyAuthority, load
from llmos.parties.encoding import generate_key, serial_of, to_pem
from llmos.parties.memberships import crl_number, request
from llmos.parties.peers import check_crl, renewal_due, verify
from llmos.parties.tables import join_tokens, party_certificates
from llmos.parties.tokens import JoinToken, fingerprint

KEY = generate_key()
LATER = timedelta(days=20, hours=1)


def invite(ca: PartyAuthority, name: str = "site", at: datetime = NOW) -> JoinToken:
    return ca.invite(name, (), TOKEN_LIFE, ca.kernel.principal(), at)


def join(
    ca: PartyAuthority,
    token: JoinToken,
    key: object = KEY,
    *,
    name: str = "site",
    at: datetime = NOW,
) -> x509.Certificate:
    pem = request(key, PartyId(ca.organisation, name))  # type: ignore[arg-type]
    return admission.join(token, pem, ca, ca.kernel.principal(), at)


def renew(
    ca: PartyAuthority, present: x509.Certificate, key: object, *, at: datetime = NOW + LATER
) -> x509.Certificate:
    pem = request(key, PartyId(ca.organisation, "site"))  # type: ignore[arg-type]
    return admission.renew(present, pem, ca, ca.kernel.principal(), at)


def serials(ca: PartyAuthority) -> set[str]:
    with ca.kernel.store.read() as conn:
        return set(conn.execute(select(party_certificates.c.serial)).scalars())


def entries(ca: PartyAuthority) -> int:
    return ca.kernel.auditlog.verify().size


def test_a_token_becomes_a_certificate_for_the_invited_name(ca: PartyAuthority) -> None:
    issued = join(ca, invite(ca))
    anchor = ca.anchor(ca.kernel.principal(), NOW)
    assert verify(issued, [anchor], NOW) == PartyId("hospital.example", "site")
    assert issued.public_key() == KEY.public_key()
    assert serials(ca) == {serial_of(issued)}
    (facts,) = register.overview(ca.kernel, NOW)
    assert (facts["state"], facts["certificates"][0]["serial"]) == ("active", serial_of(issued))
    (entry,) = ca.kernel.auditlog.entries(entries(ca) - 2, 1)
    assert entry.fields["action"] == "admit-parties"
    assert entry.fields["details"]["serial"] == serial_of(issued)
    assert entry.fields["details"]["party"] == "spiffe://hospital.example/party/site"


def test_the_token_is_nowhere_in_the_home(ca: PartyAuthority) -> None:
    token = invite(ca)
    join(ca, token)
    files = [path for path in ca.kernel.config.home.rglob("*") if path.is_file()]
    assert not [path for path in files if token.secret.encode() in path.read_bytes()]
    assert token.secret not in repr(token)


def test_who_asks_again_with_the_same_key_gets_the_same_certificate(ca: PartyAuthority) -> None:
    token = invite(ca)
    first = join(ca, token)
    size = entries(ca)
    assert join(ca, token) == first
    assert serials(ca) == {serial_of(first)}
    assert entries(ca) == size


def test_a_token_is_used_once(ca: PartyAuthority) -> None:
    token = invite(ca)
    first = join(ca, token)
    size = entries(ca)
    with pytest.raises(JoinRefused, match="used already"):
        join(ca, token, generate_key())
    assert serials(ca) == {serial_of(first)}
    assert entries(ca) == size  # refusals do not make the log grow


@pytest.mark.parametrize(
    "changed",
    [
        {"secret": "A" * 43},
        {"id": "0" * 16},
        {"party": "other"},
        {"authority": "0" * 64},
    ],
)
def test_a_changed_token_is_not_valid(ca: PartyAuthority, changed: dict[str, str]) -> None:
    token = replace(invite(ca), **changed)
    with pytest.raises(JoinRefused, match="not valid"):
        join(ca, token)
    assert serials(ca) == set()
    assert join(ca, invite(ca, "another"), name="another")


def test_a_token_is_for_one_name(ca: PartyAuthority) -> None:
    token = invite(ca)
    with pytest.raises(CertificateRefused, match="own names"):
        join(ca, token, name="other")
    assert serials(ca) == set()
    assert join(ca, token)  # and is not used up by that


def test_a_token_expires(ca: PartyAuthority) -> None:
    token = invite(ca)
    with pytest.raises(JoinRefused, match="expired"):
        join(ca, token, at=NOW + TOKEN_LIFE)
    assert serials(ca) == set()


def test_a_clock_that_was_set_back_makes_no_token_good_again(ca: PartyAuthority) -> None:
    token = invite(ca)
    invite(ca, "later", NOW + TOKEN_LIFE + timedelta(hours=1))
    with pytest.raises(IntegrityError, match="clock"):
        join(ca, token, at=NOW)
    assert serials(ca) == set()
    with pytest.raises(IntegrityError, match="clock"):
        ca.revoke("site", ca.kernel.principal(), NOW)
    with pytest.raises(IntegrityError, match="clock"):
        ca.certify_server(KEY.public_key(), CRL_LIFE, ca.kernel.principal(), NOW)


def test_a_new_invitation_voids_the_one_before(ca: PartyAuthority) -> None:
    first, second = invite(ca), invite(ca)
    with pytest.raises(JoinRefused, match="not valid"):
        join(ca, first)
    assert join(ca, second)


def test_of_many_that_join_at_once_one_gets_a_certificate(ca: PartyAuthority) -> None:
    token, barrier = invite(ca), threading.Barrier(4)
    got: list[x509.Certificate] = []
    refused: list[JoinRefused] = []

    def try_to() -> None:
        barrier.wait()
        try:
            got.append(join(ca, token, generate_key()))
        except JoinRefused as error:
            refused.append(error)

    threads = [threading.Thread(target=try_to) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)
    assert serials(ca) == {serial_of(got[0])}


def test_a_crash_before_the_end_leaves_the_token_unused(
    ca: PartyAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = invite(ca)

    def die(_certificate: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(admission, "serial_of", die)  # after the row of the certificate
        with pytest.raises(KeyboardInterrupt):
            join(ca, token)
    assert serials(ca) == set()
    with ca.kernel.store.read() as conn:
        assert conn.execute(select(join_tokens.c.serial)).all() == [(None,)]
    assert join(ca, token)


def test_names_are_the_invitations_not_the_requests(ca: PartyAuthority) -> None:
    who = ca.kernel.principal()
    token = ca.invite("site", ("b.site.example", "a.site.example"), TOKEN_LIFE, who, NOW)
    names = join(ca, token).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.site.example", "b.site.example"]


def test_renewal_at_two_thirds_of_life(ca: PartyAuthority) -> None:
    first, key = join(ca, invite(ca)), generate_key()
    due = renewal_due(first)
    assert due == NOW.replace(microsecond=0) + timedelta(days=20) - timedelta(minutes=5) / 3
    with pytest.raises(CertificateRefused, match="can be renewed from"):
        renew(ca, first, key, at=due - timedelta(seconds=1))
    second = renew(ca, first, key, at=due)
    assert second.public_key() == key.public_key()
    assert second.not_valid_after_utc > first.not_valid_after_utc
    assert serials(ca) == {serial_of(first), serial_of(second)}


def test_a_certificate_is_renewed_once(ca: PartyAuthority) -> None:
    first, key = join(ca, invite(ca)), generate_key()
    second = renew(ca, first, key)
    assert renew(ca, first, key) == second
    with pytest.raises(CertificateRefused, match="renewed already"):
        renew(ca, first, generate_key())
    assert serials(ca) == {serial_of(first), serial_of(second)}


def test_of_many_that_renew_at_once_one_gets_a_certificate(ca: PartyAuthority) -> None:
    first, barrier = join(ca, invite(ca)), threading.Barrier(2)
    ended: list[str] = []

    def try_to() -> None:
        barrier.wait()
        try:
            renew(ca, first, generate_key())
            ended.append("renewed")
        except CertificateRefused:
            ended.append("refused")

    threads = [threading.Thread(target=try_to) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["refused", "renewed"]
    assert len(serials(ca)) == 2


def test_only_good_certificates_of_this_ca_are_renewed(ca: PartyAuthority) -> None:
    first = join(ca, invite(ca))
    with pytest.raises(CertificateRefused, match="not of this CA"):
        renew(ca, Pki().credentials("site").certificate, generate_key())
    with pytest.raises(CertificateRefused, match="out of date"):
        renew(ca, first, generate_key(), at=NOW + timedelta(days=30))
    ca.revoke("site", ca.kernel.principal(), NOW)
    with pytest.raises(CertificateRefused, match="revoked"):
        renew(ca, first, generate_key())
    assert serials(ca) == {serial_of(first)}


def test_a_revoked_party_is_on_the_list_and_may_be_invited_again(ca: PartyAuthority) -> None:
    who, issued = ca.kernel.principal(), join(ca, token := invite(ca))
    with pytest.raises(PartyExists, match="valid certificate"):
        invite(ca)
    before = ca.anchor(who, NOW).crls[0]
    assert before.get_revoked_certificate_by_serial_number(issued.serial_number) is None
    assert ca.revoke("site", who, NOW) == 1
    after = ca.anchor(who, NOW).crls[0]
    assert after.get_revoked_certificate_by_serial_number(issued.serial_number) is not None
    assert crl_number(after) == crl_number(before) + 1
    assert PartyId("hospital.example", "site") not in ca.active()
    with pytest.raises(JoinRefused, match="not valid"):
        join(ca, token)
    assert register.overview(ca.kernel, NOW)[0]["state"] == "revoked"
    again = join(ca, invite(ca), generate_key())
    assert PartyId("hospital.example", "site") in ca.active()
    listed = ca.anchor(who, NOW).crls[0]
    assert [entry.serial_number for entry in listed] == [issued.serial_number]
    assert again.serial_number != issued.serial_number


def test_a_revocation_voids_an_unused_token(ca: PartyAuthority) -> None:
    token = invite(ca)
    assert ca.revoke("site", ca.kernel.principal(), NOW) == 0
    with pytest.raises(JoinRefused, match="not valid"):
        join(ca, token)


def test_an_unknown_party_cannot_be_revoked(ca: PartyAuthority) -> None:
    number = crl_number(ca.anchor(ca.kernel.principal(), NOW).crls[0])
    with pytest.raises(UnknownParty):
        ca.revoke("nobody", ca.kernel.principal(), NOW)
    assert crl_number(ca.anchor(ca.kernel.principal(), NOW).crls[0]) == number


def test_the_list_is_signed_anew_at_half_of_its_life_and_forgets_old_certificates(
    ca: PartyAuthority,
) -> None:
    who = ca.kernel.principal()
    join(ca, invite(ca))
    ca.revoke("site", who, NOW)
    first = ca.anchor(who, NOW + CRL_LIFE / 3).crls[0]
    assert first == ca.anchor(who, NOW).crls[0]
    second = ca.anchor(who, NOW + CRL_LIFE / 2).crls[0]
    assert crl_number(second) == crl_number(first) + 1
    assert check_crl(second, ca.authority.certificate, NOW + CRL_LIFE * 1.4) == crl_number(second)
    end = NOW + timedelta(days=30)
    assert len(list(ca.anchor(who, end + CRL_LIFE).crls[0])) == 1  # RFC 5280 section 3.3
    assert len(list(ca.anchor(who, end + CRL_LIFE * 3).crls[0])) == 0


def test_states_of_a_party(ca: PartyAuthority) -> None:
    assert register.overview(ca.kernel, NOW) == []
    token = invite(ca)
    assert register.overview(ca.kernel, NOW)[0]["state"] == "invited"
    join(ca, token)
    assert register.overview(ca.kernel, NOW + timedelta(days=30))[0]["state"] == "expired"
    assert invite(ca, at=NOW + timedelta(days=30))  # who is out of date may be invited again


def test_a_home_is_one_ca_and_finds_it_again(ca: PartyAuthority) -> None:
    from llmos.parties import authority

    with pytest.raises(PartyExists, match=r"hospital\.example already"):
        authority.create("other.example", ca.kernel.principal(), ca.kernel, NOW)
    again = load(ca.kernel)
    assert fingerprint(again.authority.certificate) == fingerprint(ca.authority.certificate)
    assert join(again, invite(ca))


def test_only_stewards_and_administrators_invite_and_admit(ca: PartyAuthority) -> None:
    kernel = ca.kernel
    with kernel.store.transaction() as conn:
        engineer = kernel.identity.add_principal(conn, "erin", frozenset({Role.ENGINEER}))
        steward = kernel.identity.add_principal(conn, "stew", frozenset({Role.STEWARD}))
    with pytest.raises(PermissionDenied):
        ca.invite("site", (), TOKEN_LIFE, engineer, NOW)
    token = ca.invite("site", (), TOKEN_LIFE, steward, NOW)
    pem = request(KEY, PartyId(ca.organisation, "site"))
    with pytest.raises(PermissionDenied):
        admission.join(token, pem, ca, engineer, NOW)
    assert serials(ca) == set()
    assert admission.join(token, pem, ca, steward, NOW)
    with pytest.raises(PermissionDenied):
        ca.revoke("site", engineer, NOW)
    assert PartyId("hospital.example", "site") in ca.active()


def test_a_home_that_is_no_ca_says_so(kernel: Kernel) -> None:
    with pytest.raises(UnknownParty, match="this home is no CA"):
        load(kernel)
    assert register.overview(kernel, NOW) == []


def test_the_newest_valid_certificate_of_a_party_is_shown(ca: PartyAuthority) -> None:
    uri = PartyId(ca.organisation, "site").uri
    with pytest.raises(UnknownParty):
        ca.certificates([uri], NOW)
    first = join(ca, invite(ca))
    assert ca.certificates([uri], NOW) == {uri: to_pem(first)}
    second = renew(ca, first, generate_key())
    assert ca.certificates([uri], NOW + LATER) == {uri: to_pem(second)}
    ca.revoke("site", ca.kernel.principal(), NOW + LATER)
    with pytest.raises(UnknownParty):
        ca.certificates([uri], NOW + LATER)
