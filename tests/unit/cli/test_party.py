"""`llmos party`: what people type to join, renew, be revoked and trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.homes import running
from tests.parties import ORGANISATION, Pki, door, kernel_at
from tests.unit.cli.conftest import Type

from llmos.kernel.kernel import open_kernel
from llmos.parties import authority


@pytest.fixture
def hospital(tmp_path: Path, typing: Callable[[Path], Type]) -> Type:
    """Return the function that types commands for the home of a CA."""
    with kernel_at(tmp_path / "hospital"):
        pass
    typed = typing(tmp_path / "hospital")
    assert typed("party", "ca", "create", ORGANISATION).status == 0
    return typed


@pytest.fixture
def site(tmp_path: Path, typing: Callable[[Path], Type]) -> Type:
    """Return the function that types commands for the home of a partner."""
    with kernel_at(tmp_path / "site"):
        pass
    return typing(tmp_path / "site")


@pytest.fixture
def url(hospital: Type, tmp_path: Path) -> Iterator[str]:
    """Return the URL of the CA's door."""
    from llmos.config import Config

    kernel = open_kernel(Config(home=tmp_path / "hospital"))
    try:
        with door(authority.load(kernel)) as url:
            yield url
    finally:
        kernel.store.close()
        kernel.vault._store.close()


def test_a_partner_joins_by_token_and_is_revoked(
    hospital: Type, site: Type, url: str, tmp_path: Path
) -> None:
    invited = hospital("party", "invite", "clinic", "--hours", "2")
    token = tmp_path / "token"
    token.write_text(invited.out)  # nothing but the token is on standard output
    assert "good for 2 hours, and once" in invited.err
    joined = site("party", "join", url, "--token-file", str(token))
    assert joined.out.startswith("spiffe://hospital.example/party/clinic until ")
    again = site("party", "join", url, "--token-file", str(token))
    assert (again.status, "already" in again.err) == (4, True)
    assert "hospital.example   clinic " in site("party", "ls").out
    assert "is due from" in site("party", "renew").out
    listed = hospital("party", "ls", "--json").value
    (facts,) = listed["parties"]
    assert (facts["name"], facts["state"], listed["memberships"]) == ("clinic", "active", [])
    assert hospital("party", "invite", "clinic").status == 4  # it has a valid certificate
    shown = hospital("party", "show", "clinic")
    assert "active" in shown.out
    assert hospital("party", "show", "nobody").status == 4
    revoked = hospital("party", "revoke", "clinic")
    assert revoked.out == "clinic is revoked: 1 certificate is on the revocation list\n"
    assert "revoked" in hospital("party", "ls").out
    crl = hospital("party", "crl", "--out", str(tmp_path / "crl.pem"))
    assert crl.out == f"{tmp_path / 'crl.pem'}: revocation list\n"
    assert hospital("party", "crl").out == (tmp_path / "crl.pem").read_text()
    told = site("party", "renew")
    assert (told.status, "revoked this home's certificate" in told.err) == (4, True)
    left = site("party", "leave", ORGANISATION)
    assert left.out == "this home is no party of hospital.example any more\n"
    assert site("party", "leave", ORGANISATION).status == 4
    assert site("party", "ls", "--json").value == {"parties": [], "memberships": []}


def test_every_command_speaks_json(hospital: Type, site: Type, url: str, tmp_path: Path) -> None:
    token = hospital("party", "invite", "clinic", "--dns", "clinic.example", "--json").value
    (tmp_path / "token").write_text(token["token"])
    joined = site("party", "join", url, "--token-file", str(tmp_path / "token"), "--json").value
    assert joined["id"] == "spiffe://hospital.example/party/clinic"
    (renewed,) = site("party", "renew", "--json").value
    assert (renewed["renewed"], renewed["serial"]) == (False, joined["serial"])
    shown = hospital("party", "show", "clinic", "--json").value
    assert (shown["dns"], shown["certificates"][0]["serial"]) == (
        ["clinic.example"],
        joined["serial"],
    )
    bundle = hospital("party", "ca", "show", "--json").value
    assert bundle["sha256"] == [joined["authority_sha256"]]
    assert hospital("party", "crl", "--json").value["crl"] in bundle["bundle"]
    assert hospital("party", "revoke", "clinic", "--json").value == {
        "revoked": "clinic",
        "certificates": 1,
    }
    assert site("party", "leave", ORGANISATION, "--json").value == {
        "left": ORGANISATION,
        "running": [],
    }
    assert site("party", "trust", "ls", "--json").value == []


def test_an_organisations_own_ca_is_trusted(hospital: Type, site: Type, tmp_path: Path) -> None:
    bundle = tmp_path / "bank.pem"
    bundle.write_bytes(Pki("bank.example").anchor().pem)
    trusted = site("party", "trust", "add", str(bundle), "--organisation", "bank.example")
    assert trusted.out.startswith("bank.example is trusted: SHA-256 ")
    assert "bank.example" in site("party", "trust", "ls").out
    assert hospital("party", "ca", "show", "--out", str(tmp_path / "own.pem")).status == 0
    assert hospital("party", "ca", "show").out == (tmp_path / "own.pem").read_text()
    other = ("--organisation", ORGANISATION, "--json")
    found = site("party", "trust", "add", str(tmp_path / "own.pem"), *other).value
    assert found["organisation"] == ORGANISATION
    assert site("party", "trust", "remove", "bank.example").out == (
        "bank.example is not trusted any more\n"
    )
    assert site("party", "trust", "remove", ORGANISATION, "--json").value == {
        "removed": ORGANISATION
    }
    assert site("party", "trust", "ls").out == "no trusted organisations\n"


def test_errors_say_what_to_do(hospital: Type, site: Type, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("not a token\n")
    refused = site("party", "join", "https://127.0.0.1:1", "--token-file", str(tmp_path / "token"))
    assert (refused.status, "not a token\n" in refused.err) == (4, False)
    assert "this is not a join token" in refused.err
    assert "llmos party ca create" in site("party", "invite", "clinic").err
    again = hospital("party", "ca", "create", "other.example", "--json")
    assert again.value["error"]["type"] == "PartyExists"
    token = hospital("party", "invite", "clinic").out
    (tmp_path / "token").write_text(token)
    away = site("party", "join", "https://127.0.0.1:1", "--token-file", str(tmp_path / "token"))
    assert (away.status, "llmos party serve" in away.err) == (13, True)
    assert token.split(".")[3] not in away.err
    assert hospital("party", "ls").out.count("invited") == 1


def test_serve_says_its_url_and_ends_at_ctrl_c(hospital: Type, tmp_path: Path) -> None:
    import signal

    with running(tmp_path / "hospital", "party", "serve", "--port", "0") as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("parties join at https://127.0.0.1:"), process.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_renewal_that_fails_is_told(hospital: Type, site: Type, tmp_path: Path) -> None:
    from llmos.config import Config

    kernel = open_kernel(Config(home=tmp_path / "hospital"))
    try:
        with door(authority.load(kernel)) as url:
            (tmp_path / "token").write_text(hospital("party", "invite", "clinic").out)
            assert site("party", "join", url, "--token-file", str(tmp_path / "token")).status == 0
    finally:
        kernel.store.close()
        kernel.vault._store.close()
    failed = site("party", "renew")  # the door is closed now
    assert failed.status == 13
    assert f"{url} could not be reached" in failed.err
