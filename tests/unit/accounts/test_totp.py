"""The vectors of RFC 4226 appendix D and RFC 6238 appendix B."""

from __future__ import annotations

import base64
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.accounts.totp import SEED_BYTES, STEP_S, code, matching_step, new_seed, uri

SEED = b"12345678901234567890"
HOTP = [755224, 287082, 359152, 969429, 338314, 254676, 287922, 162583, 399871, 520489]
TOTP = {
    59: "94287082",
    1111111109: "07081804",
    1111111111: "14050471",
    1234567890: "89005924",
    2000000000: "69279037",
    20000000000: "65353130",
}


@pytest.mark.parametrize(("counter", "expected"), list(enumerate(HOTP)))
def test_rfc_4226(counter: int, expected: int) -> None:
    assert code(SEED, counter) == f"{expected:06}"


@pytest.mark.parametrize(("time_s", "expected"), list(TOTP.items()))
def test_rfc_6238(time_s: int, expected: str) -> None:
    assert code(SEED, time_s // STEP_S, digits=8) == expected


@pytest.mark.parametrize("skew", range(-3, 4))
def test_clocks_may_differ_by_one_step(skew: int) -> None:
    now = 1_700_000_000
    step = now // STEP_S + skew
    found = matching_step(SEED, code(SEED, step), now, after=0)
    assert found == (step if abs(skew) <= 1 else None)


def test_a_step_counts_once_and_none_before_it() -> None:
    now = 1_700_000_000
    step = now // STEP_S
    assert matching_step(SEED, code(SEED, step), now, after=step - 1) == step
    assert matching_step(SEED, code(SEED, step), now, after=step) is None
    assert matching_step(SEED, code(SEED, step - 1), now, after=step) is None
    assert matching_step(SEED, code(SEED, step + 1), now, after=step) == step + 1


def test_spaces_around_a_code_do_not_matter() -> None:
    assert matching_step(SEED, f" {code(SEED, 10)}\n", 10 * STEP_S, after=0) == 10


@given(st.text())
def test_no_other_text_is_a_code(text: str) -> None:
    right = {code(SEED, step) for step in (9, 10, 11)}
    if text.strip() not in right:
        assert matching_step(SEED, text, 10 * STEP_S, after=0) is None


def test_the_uri_carries_the_seed_and_the_names() -> None:
    seed = new_seed()
    assert len(seed) == SEED_BYTES
    assert seed != new_seed()
    parts = urlsplit(uri(seed, "ada & bob", "LLMOS"))
    assert (parts.scheme, parts.netloc, unquote(parts.path)) == (
        "otpauth",
        "totp",
        "/LLMOS:ada & bob",
    )
    fields = parse_qs(parts.query)
    assert base64.b32decode(fields["secret"][0]) == seed  # 160 bits need no padding
    assert fields["issuer"] == ["LLMOS"]
