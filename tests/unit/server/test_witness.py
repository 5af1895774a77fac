"""The body of `add-checkpoint` by the letter of C2SP tlog-witness."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.errors import RequestError
from llmos.server.witness import parse_body
from llmos.workflows.cosign import request_body

# https://c2sp.org/tlog-witness, the example of a request
EXAMPLE = """old 20852014
PlRNCrwHpqhGrupue0L7gxbjbMiKA9temvuZZDDpkaw=
jrJZDmY8Y7SyJE0MWLpLozkIVMSMZcD5kvuKxPC3swk=
5+pKlUdi2LeF/BcMHBn+Ku6yhPGNCswZZD1X/6QgPd8=
/6WVhPs2CwSsb5rYBH5cjHV/wSmA79abXAwhXw3Kj/0=

example.com/behind-the-sofa
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
"""  # noqa: E501


def test_the_documents_example_is_read_and_written() -> None:
    old_size, proof, note = parse_body(EXAMPLE.encode())
    assert (old_size, len(proof), {len(node) for node in proof}) == (20852014, 4, {32})
    assert note.startswith("example.com/behind-the-sofa\n20852163\n")
    assert request_body(old_size, proof, note) == EXAMPLE.encode()


@given(
    st.integers(0, 2**63 - 1), st.lists(st.binary(min_size=32, max_size=32), max_size=63), st.text()
)
def test_what_is_written_is_read(old_size: int, proof: list[bytes], note: str) -> None:
    try:
        body = request_body(old_size, proof, note)
    except UnicodeEncodeError:
        return
    assert parse_body(body) == (old_size, tuple(proof), note)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n\n",
        b"old 1",
        b"old 1\n",
        b"old 01\n\nx",
        b"old -1\n\nx",
        b"old  1\n\nx",
        b"new 1\n\nx",
        b"old 1\nnot base64\n\nx",
        b"old 1\n\xff\n\nx",
        "old ١\n\nx".encode(),
        request_body(1, [bytes(32)] * 64, "x"),
    ],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(body)
