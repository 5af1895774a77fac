from __future__ import annotations

from pathlib import Path

import cedarpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.errors import PolicyError
from llmos.kernel.policy import DEFAULTS, Policy
from llmos.workflows.policy_text import check, statements

TRICKY = """// a comment; with "a quote
@id("first;") // and another;
permit (principal, action, resource)
when { principal.name == "a;b \\" c" };

forbid (principal, action, resource)
when { principal.name == "// no comment" }; permit (principal, action, resource) when { false };
// the end
"""


def test_policies_are_found_where_they_begin() -> None:
    found = statements(TRICKY)
    assert [(s.line, s.name) for s in found] == [(2, "first;"), (6, "policy1"), (7, "policy2")]
    assert found[0].text.startswith("@id")
    assert found[2].text == "permit (principal, action, resource) when { false };"
    assert [s.name for s in statements(TRICKY, 4)][1:] == ["policy5", "policy6"]


@pytest.mark.parametrize("text", [TRICKY, (DEFAULTS / "default.cedar").read_text()])
def test_cedar_counts_the_same_policies(text: str) -> None:
    assert len(cedarpy.policies_to_pst(text).static_policies) == len(statements(text))


@pytest.mark.parametrize("text", ["", "\n\n", "// nothing", "// nothing;\n"])
def test_there_may_be_none(text: str) -> None:
    assert statements(text) == []


@given(st.text(alphabet='ab;"/\\\n @id()', max_size=60))
def test_nothing_is_lost_but_blanks_and_comments(text: str) -> None:
    joined = "".join(s.text for s in statements(text))
    position = 0
    for character in joined:
        position = text.index(character, position) + 1


def test_what_is_wrong_is_said_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.cedar"
    file.write_text(
        "permit (principal, action, resource);\n\n"
        "forbid (principal, action, resource)\nwhen { resource.legal_hold };\n"
        "permit (principle, action, resource);\npermit (principal"
    )
    for place in (file, tmp_path):
        with pytest.raises(PolicyError) as refused:
            check(place)
        said = refused.value.message.split("; ")
        assert said[0].startswith(f"{file}, line 3: ")
        assert "legal_hold" in said[0]
        assert any(part.startswith(f"{file}, line 5: ") and "principle" in part for part in said)
        assert any(part.startswith(f"{file}, line 6: ") for part in said)
        assert not any("line 1:" in part for part in said)


def test_what_is_right_is_parsed(tmp_path: Path) -> None:
    assert check(DEFAULTS).digest == Policy.load(DEFAULTS).digest
    assert check(DEFAULTS / "default.cedar").digest == Policy.load(DEFAULTS).digest
    with pytest.raises(PolicyError, match="no"):
        check(tmp_path)
    (tmp_path / "x.cedar").write_bytes(b"\xff")
    with pytest.raises(PolicyError, match="decode"):
        check(tmp_path)
