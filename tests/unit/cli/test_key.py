from __future__ import annotations

from tests.unit.cli.conftest import Type

from llmos.cli.key import _covers


def test_a_key_is_narrowed_rotated_and_listed(typed: Type) -> None:
    typed("user", "add", "app", "--role", "developer", "--service")
    made = typed(
        "key", "create", "--user", "app", "--action", "chat", "--action", "list-models",
        "--purpose", "care", "--days", "30", "--json",
    ).value  # fmt: skip
    rotated = typed("key", "rotate", made["id"], "--overlap", "2", "--json").value
    assert rotated["id"] != made["id"]
    old, new = typed("key", "ls", "--json").value
    assert (new["actions"], new["purpose"]) == (["chat", "list-models"], "care")
    assert (old["last_used_at"], old["expires_at"] < new["expires_at"]) == (None, True)
    assert _covers(new) == "chat, list-models; for care"
    assert _covers({"models": ["*"], "actions": ["*"], "purpose": None}) == "*"
    assert typed("key", "ls").status == 0
    assert typed("key", "rotate", rotated["id"]).out.startswith("llmos_")


def test_what_is_refused_makes_no_key(typed: Type) -> None:
    assert typed("key", "create", "--action", "fly").status == 3
    assert typed("key", "rotate", "00000000").status == 4
    assert typed("key", "rotate", "00000000", "--overlap", "-1").status == 2
    assert typed("key", "ls", "--json").value == []
    assert typed("key", "ls").out == "no API keys\n"
