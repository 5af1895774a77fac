"""The door over real TLS: joining, renewing, being revoked, and what is refused on the way."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.parties import ORGANISATION, Pki, door, kernel_at, meet

from llmos.crypto.certificates import PartyId
from llmos.errors import (
    CertificateRefused,
    ConfigError,
    JoinRefused,
    NetworkError,
    PartyExists,
    PermissionDenied,
    StorageError,
    UnknownParty,
)
from llmos.kernel.identity import Role
from llmos.kernel.kernel import Kernel
from llmos.parties import authority, memberships, trust
from llmos.parties.authority import TOKEN_LIFE, PartyAuthority
from llmos.parties.encoding import generate_key, load_key, serial_of
from llmos.parties.exchange import call
from llmos.parties.memberships import Membership, crl_number, request
from llmos.parties.tls import (
    Credentials,
    Terms,
    client_context,
    introduction_context,
    server_context,
)
from llmos.parties.tokens import JoinToken
from llmos.server import listener
from llmos.server.party import (
    MAX_BODY_BYTES,
    MAX_CONCURRENT_REQUESTS,
    MAX_STRANGERS,
    PeerProtocol,
    serve_parties,
)
from llmos.workflows import join_party, renew_parties


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def ca(tmp_path: Path) -> Iterator[PartyAuthority]:
    """Return the CA of a fresh home; it began 40 days ago."""
    with kernel_at(tmp_path / "ca") as made:
        yield authority.create(ORGANISATION, made.principal(), made, now() - timedelta(days=40))


@pytest.fixture
def url(ca: PartyAuthority) -> Iterator[str]:
    """Return the URL of its door."""
    with door(ca) as url:
        yield url


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Kernel]:
    """Return the home of a partner."""
    with kernel_at(tmp_path / "site") as made:
        yield made


def invite(ca: PartyAuthority, name: str = "site", *, at: datetime | None = None) -> JoinToken:
    return ca.invite(name, (), TOKEN_LIFE, ca.kernel.principal(), at or now())


def join(url: str, token: JoinToken, site: Kernel) -> Membership:
    return join_party.run(url, token.text, site.principal(), site, now())


def renew(site: Kernel, at: datetime | None = None) -> renew_parties.Renewed:
    (done,) = renew_parties.run(site.principal(), site, at or now())
    return done


def answered(
    url: str, context: ssl.SSLContext, path: str, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPSConnection(urlsplit(url).netloc, context=context, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body=body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def code(content: bytes) -> str:
    return str(json.loads(content)["error"]["code"])


def test_a_partner_joins_and_is_revoked(ca: PartyAuthority, url: str, site: Kernel) -> None:
    member = join(url, invite(ca), site)
    assert member.id == PartyId(ORGANISATION, "site")
    assert member.certificate is not None
    assert memberships.all_memberships(site) == [member]
    context = client_context(member.terms(site))
    assert call(url, context, "/party/crl")
    assert not renew(site).renewed  # nothing is due
    ca.revoke("site", ca.kernel.principal(), now())
    with pytest.raises((NetworkError, CertificateRefused)):
        call(url, context, "/party/crl")
    again = renew(site)  # the list itself is for anybody
    assert isinstance(again.error, CertificateRefused)
    assert "revoked this home's certificate" in again.error.message
    assert crl_number(memberships.membership(ORGANISATION, site).crl) > crl_number(member.crl)
    memberships.leave(ORGANISATION, site.principal(), site)
    assert join(url, invite(ca), site).certificate != member.certificate


def test_two_partners_meet_until_one_learns_that_the_other_was_revoked(
    ca: PartyAuthority, url: str, site: Kernel, tmp_path: Path
) -> None:
    with kernel_at(tmp_path / "bank") as bank:
        join(url, invite(ca), site)
        join(url, invite(ca, "bank"), bank)
        ids = {name: frozenset({PartyId(ORGANISATION, name)}) for name in ("site", "bank")}
        server = server_context(lambda: trust.terms(ORGANISATION, ids["bank"], site))
        client = client_context(trust.terms(ORGANISATION, ids["site"], bank))
        assert meet(server, client).answer == b"welcome"
        ca.revoke("bank", ca.kernel.principal(), now())
        assert meet(server, client).answer == b"welcome"  # the list has not been fetched yet
        renew(site)
        met = meet(server, client)
        assert (met.answer, "certificate revoked" in str(met.server)) == (b"", True)
        # The CA's home, were it a party, would know at once: it believes its own list.
        (own,) = trust.anchors(ca.kernel)
        assert len(list(own.crls[0])) == 1


def test_a_home_without_a_certificate_meets_nobody(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    with pytest.raises(UnknownParty, match="no party of"):
        trust.terms(ORGANISATION, frozenset(), site)
    with pytest.raises(UnknownParty, match="no party of"):
        memberships.leave(ORGANISATION, site.principal(), site)
    anchor = join_party.introduce(url, invite(ca), now())
    memberships.begin(PartyId(ORGANISATION, "site"), url, anchor, site.principal(), site)
    with pytest.raises(UnknownParty, match="no certificate"):
        trust.terms(ORGANISATION, frozenset(), site)


def test_the_private_key_stays_and_is_sealed(ca: PartyAuthority, url: str, site: Kernel) -> None:
    member = join(url, invite(ca), site)
    der = site.vault.secret(member.key)
    for home in (site.config.home, ca.kernel.config.home):
        for path in (path for path in home.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert der not in content
            assert b"PRIVATE KEY" not in content


def test_renewal_makes_a_new_key_and_destroys_the_old_one(ca: PartyAuthority, site: Kernel) -> None:
    with joined_long_ago(ca, site) as before:
        done = renew(site)
        assert (done.renewed, done.error) == (True, None)
        after = memberships.membership(ORGANISATION, site)
        assert after == done.member
        assert before.certificate is not None
        assert after.certificate is not None
        assert after.certificate.public_key() != before.certificate.public_key()
        assert after.certificate.not_valid_after_utc > before.certificate.not_valid_after_utc
        assert after.next_key is None
        with pytest.raises(StorageError, match="no secret"):
            site.vault.secret(before.key)
        assert call(after.url, client_context(after.terms(site)), "/party/crl")
        assert not renew(site).renewed


@contextmanager
def joined_long_ago(ca: PartyAuthority, site: Kernel) -> Iterator[Membership]:
    """Join as it would have been done 21 days ago, and open the door in the present."""
    from llmos.parties import admission

    ago, who = now() - timedelta(days=21), site.principal()
    token, party = invite(ca, at=ago), PartyId(ORGANISATION, "site")
    anchor = ca.anchor(ca.kernel.principal(), ago)
    _, asked = memberships.begin(party, "https://a.example", anchor, who, site)
    issued = admission.join(token, asked, ca, ca.kernel.principal(), ago)
    with door(ca) as url:
        anchor = join_party.introduce(url, token, now())
        member, _ = memberships.begin(party, url, anchor, who, site)
        yield memberships.finish(member, issued, who, site, now())


def test_a_renewal_whose_answer_was_lost_goes_on_with_the_same_key(
    ca: PartyAuthority, site: Kernel
) -> None:
    with joined_long_ago(ca, site) as joined:
        member, asked = memberships.begin_renewal(joined, site.principal(), site)
        lost = call(member.url, client_context(member.terms(site)), "/party/renew", asked)
        done = renew(site)
        assert done.member.certificate == join_party.parse_certificate(lost)


def test_a_join_whose_answer_was_lost_goes_on_with_the_same_key(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    token = invite(ca)
    anchor = join_party.introduce(url, token, now())
    party = PartyId(ORGANISATION, "site")
    pending, asked = memberships.begin(party, url, anchor, site.principal(), site)
    context = client_context(pending.terms(site))
    lost = call(url, context, "/party/join", f"{token.text}\n".encode() + asked)
    assert renew_parties.run(site.principal(), site, now()) == []  # there is nothing to renew yet
    assert join(url, token, site).certificate == join_party.parse_certificate(lost)
    with pytest.raises(PartyExists, match="already"):
        join(url, token, site)


def test_a_stolen_token_is_refused_after_its_use_and_leaves_nothing(
    ca: PartyAuthority, url: str, site: Kernel, tmp_path: Path
) -> None:
    token = invite(ca)
    join(url, token, site)
    with kernel_at(tmp_path / "thief") as thief:
        with pytest.raises(JoinRefused, match="used already"):
            join(url, token, thief)
        (pending,) = memberships.all_memberships(thief)
        assert pending.certificate is None
        assert pending.terms(thief).credentials is None
        memberships.leave(ORGANISATION, thief.principal(), thief)
        assert memberships.all_memberships(thief) == []
        with pytest.raises(StorageError, match="no secret"):
            thief.vault.secret(pending.key)


def test_a_token_of_another_ca_is_shown_to_nobody(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    elsewhere = JoinToken.create("site", Pki().authority.certificate)
    with pytest.raises(CertificateRefused, match="its CA is another one"):
        join(url, elsewhere, site)
    assert memberships.all_memberships(site) == []


@pytest.mark.parametrize("answer", [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\n"])
def test_an_answer_that_is_no_certificate_is_refused(answer: bytes) -> None:
    with pytest.raises(CertificateRefused, match="no certificate"):
        join_party.parse_certificate(answer)


def test_a_certificate_that_names_no_organisation_is_no_ca() -> None:
    pki = Pki()
    for leaf in (pki.credentials("site"), pki.credentials("", names=[])):
        with pytest.raises(CertificateRefused, match="names no organisation"):
            join_party.organisation_of(leaf.certificate)


def test_another_partys_certificate_is_not_kept(ca: PartyAuthority, url: str, site: Kernel) -> None:
    token, party = invite(ca), PartyId(ORGANISATION, "site")
    anchor = join_party.introduce(url, token, now())
    who = site.principal()
    pending, _ = memberships.begin(party, url, anchor, who, site)
    other = ca.authority.issue(generate_key().public_key(), party.names(()), now())
    with pytest.raises(CertificateRefused, match="of another key"):
        memberships.finish(pending, other, who, site, now())
    assert memberships.all_memberships(site)[0].certificate is None


def test_what_the_door_answers(ca: PartyAuthority, url: str) -> None:
    anybody = introduction_context()
    status, headers, body = answered(url, anybody, "/party/authority")
    assert (status, headers["content-type"]) == (200, "application/x-pem-file")
    assert join_party.parse_certificate(body) == ca.authority.certificate
    asked = request(generate_key(), PartyId(ORGANISATION, "site"))
    elsewhere = JoinToken.create("site", ca.authority.certificate)
    for body, status, says in (
        (b"", 400, "request_error"),
        (b"no token\n" + asked, 403, "join_refused"),
        (f"{elsewhere.text}\n".encode() + asked, 403, "join_refused"),
        (invite(ca).text.encode() + b"\nno request", 403, "certificate_refused"),
        (b"\xff\n" + asked, 403, "join_refused"),
        (bytes(MAX_BODY_BYTES + 1), 413, "request_too_large"),
    ):
        found, headers, content = answered(url, anybody, "/party/join", body)
        assert (found, code(content)) == (status, says)
        assert headers["x-request-id"]
    assert answered(url, anybody, "/party/renew", asked)[0] == 401  # no certificate was shown
    assert answered(url, anybody, "/party/join")[0] == 405
    assert answered(url, anybody, "/v1/models")[0] == 404  # nothing but the door is here
    with pytest.raises(NetworkError, match="could not be reached"):
        call(url.replace("https://127.0.0.1", "https://127.0.0.2"), anybody, "/party/crl")


def test_the_door_lets_in_nobody_whom_it_does_not_know(ca: PartyAuthority, url: str) -> None:
    key = generate_key()
    stranger = PartyId(ORGANISATION, "stranger")  # signed past the books, with the CA's key
    issued = ca.authority.issue(key.public_key(), stranger.names(()), now())
    anchor = ca.anchor(ca.kernel.principal(), now())
    me = Terms(Credentials(issued, key), (anchor,), frozenset({PartyId(ORGANISATION, None)}))
    with pytest.raises(NetworkError, match="closed the connection"):
        call(url, client_context(me), "/party/crl")


class Quick(PeerProtocol):
    request_s = 0.5


@contextmanager
def connected(url: str) -> Iterator[ssl.SSLSocket]:
    """Shake hands without a certificate, and say nothing."""
    parts = urlsplit(url)
    with (
        socket.create_connection((str(parts.hostname), parts.port or 0), timeout=30) as raw,
        introduction_context().wrap_socket(raw) as connection,
    ):
        yield connection


def is_closed(connection: socket.socket) -> bool:
    """Read what the other side says, and tell whether it hangs up."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("said", [b"", b"GET /party/crl HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_who_does_not_ask_is_not_waited_for(ca: PartyAuthority, said: bytes) -> None:
    with door(ca, protocol=Quick) as url, connected(url) as silent:
        silent.sendall(said)
        began = time.monotonic()
        assert is_closed(silent)
        assert time.monotonic() - began < 10
        assert call(url, introduction_context(), "/party/crl")


def test_who_does_not_shake_hands_is_not_waited_for(
    ca: PartyAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.3)
    with door(ca) as url:
        parts = urlsplit(url)
        with socket.create_connection((str(parts.hostname), parts.port or 0), timeout=10) as raw:
            assert is_closed(raw)


def test_the_second_request_of_a_connection_has_its_time_too(ca: PartyAuthority) -> None:
    with door(ca, protocol=Quick) as url, connected(url) as slow:
        ask = b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n"
        slow.sendall(ask)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 404")
        slow.sendall(ask[:10])
        assert is_closed(slow)


def test_slow_bodies_are_cut_off_and_keep_nobody_from_joining(
    ca: PartyAuthority, site: Kernel
) -> None:
    head = b"POST /party/join HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx"
    with door(ca, body_s=60) as url, ExitStack() as stack:
        for _ in range(MAX_CONCURRENT_REQUESTS + 1):
            stack.enter_context(connected(url)).sendall(head)
        assert join(url, invite(ca), site).certificate
    with door(ca, body_s=0.2) as url, connected(url) as slow:
        slow.sendall(head)
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_one_address_has_so_many_connections_of_strangers(ca: PartyAuthority) -> None:
    with door(ca) as url, ExitStack() as stack:
        ask = b"GET /none HTTP/1.1\r\nHost: a\r\n\r\n"
        opened = [stack.enter_context(connected(url)) for _ in range(MAX_STRANGERS)]
        opened[-1].sendall(ask)
        assert opened[-1].recv(16).startswith(b"HTTP/1.1 404")
        assert is_closed(stack.enter_context(connected(url)))


def test_a_refusals_message_reaches_the_caller_on_one_line(url: str) -> None:
    with pytest.raises(JoinRefused, match="not a join token"):
        call(url, introduction_context(), "/party/join", b"a\tb\nc")


def test_a_certificate_that_is_not_due_is_not_renewed(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    member = join(url, invite(ca), site)
    asked = request(generate_key(), member.id)
    with pytest.raises(JoinRefused, match="can be renewed from"):
        call(url, client_context(member.terms(site)), "/party/renew", asked)


def test_one_membership_that_fails_does_not_keep_the_others(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    join(url, invite(ca), site)
    gone = Pki("bank.example")
    who = site.principal()
    member, _ = memberships.begin(gone.id("site"), "https://127.0.0.1:1", gone.anchor(), who, site)
    key = load_key(site.vault.secret(member.key)).public_key()
    issued = gone.authority.issue(key, member.id.names(()), now())
    memberships.finish(member, issued, who, site, now())
    first, second = renew_parties.run(who, site, now())
    assert (first.member.id.organisation, type(first.error)) == ("bank.example", NetworkError)
    assert second.error is None


def test_an_older_or_forged_list_is_not_kept(ca: PartyAuthority, url: str, site: Kernel) -> None:
    member, who = join(url, invite(ca), site), site.principal()
    ca.revoke("site", ca.kernel.principal(), now())
    newer = ca.anchor(ca.kernel.principal(), now()).crls[0]
    kept = memberships.keep_crl(member, newer, who, site, now())
    with pytest.raises(CertificateRefused, match="older"):
        memberships.keep_crl(kept, member.crl, who, site, now())
    with pytest.raises(CertificateRefused, match="not a complete"):
        memberships.keep_crl(kept, Pki().crl(number=99), who, site, now())
    assert memberships.membership(ORGANISATION, site).crl == newer


def test_only_who_manages_parties_joins_and_renews(
    ca: PartyAuthority, url: str, site: Kernel
) -> None:
    with site.store.transaction() as conn:
        erin = site.identity.add_principal(conn, "erin", frozenset({Role.ENGINEER}))
    token = invite(ca)
    with pytest.raises(PermissionDenied):
        join_party.run(url, token.text, erin, site, now())
    assert memberships.all_memberships(site) == []
    with pytest.raises(PermissionDenied):
        renew_parties.run(erin, site, now())
    assert join(url, token, site).certificate  # the token was not used up


def test_a_door_needs_the_right_to_serve(ca: PartyAuthority) -> None:
    kernel = ca.kernel
    with kernel.store.transaction() as conn:
        erin = kernel.identity.add_principal(conn, "erin", frozenset({Role.ENGINEER}))
        stew = kernel.identity.add_principal(conn, "stew", frozenset({Role.STEWARD}))
    for who in (erin, stew):  # a steward may admit parties, and not serve
        with pytest.raises(PermissionDenied):
            serve_parties(ca, who, host="127.0.0.1", port=0, on_ready=pytest.fail)


def test_a_door_serves_until_it_is_asked_to_stop(ca: PartyAuthority) -> None:
    said: list[str] = []

    def ready(url: str) -> None:
        said.append(url)
        signal.raise_signal(signal.SIGTERM)

    serve_parties(ca, ca.kernel.principal(), host="127.0.0.1", port=0, on_ready=ready)
    assert said[0].startswith("https://127.0.0.1:")
    size = ca.kernel.auditlog.verify().size
    (entry,) = ca.kernel.auditlog.entries(size - 2, 1)
    assert entry.fields["action"] == "serve"
    assert entry.fields["details"]["parties"] == ORGANISATION


@pytest.mark.parametrize(
    "url", ["", "http://a.example:1", "https://", "https://a.example:x", "https://a.example/x"]
)
def test_what_is_no_url_of_a_door_is_refused(url: str, site: Kernel) -> None:
    with pytest.raises(ConfigError):
        call(url, introduction_context(), "/party/crl")


def test_a_server_that_does_not_speak_tls_is_refused() -> None:
    import threading

    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(CertificateRefused, match="no handshake"):
            call(
                f"https://127.0.0.1:{listening.getsockname()[1]}",
                introduction_context(),
                "/party/crl",
            )
        thread.join()


def test_the_doors_certificate_is_made_anew_when_it_is_due(
    ca: PartyAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmos.parties import door as doors

    opened = doors.Door(ca, ca.kernel.principal())
    first = opened.terms().credentials
    assert opened.terms().credentials == first
    assert first is not None
    assert first.certificate.not_valid_after_utc < now() + timedelta(hours=25)
    monkeypatch.setattr(doors, "renewal_due", lambda _certificate: now() - timedelta(hours=1))
    second = opened.terms().credentials
    assert second is not None
    assert serial_of(second.certificate) != serial_of(first.certificate)
