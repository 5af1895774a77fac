"""Where policies stand in a file: Cedar names a wrong one by its number, people by its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llmos.errors import PolicyError
from llmos.kernel.policy import Policy

# A comment, a string, or the end of a policy; each policy of Cedar ends with a semicolon.
_TOKEN: Final = re.compile(r'//[^\n]*|"(?:[^"\\]|\\.)*"|;', re.DOTALL)
_BLANK: Final = re.compile(r"(?:\s|//[^\n]*(?:\n|\Z))*")  # what may stand before a policy
_ID: Final = re.compile(r'@id\(\s*"((?:[^"\\]|\\.)*)"\s*\)')


@dataclass(frozen=True, slots=True)
class Statement:
    """One policy of a file."""

    line: int  # where it begins, from 1
    name: str  # its @id, or policyN as Cedar calls it
    text: str


def statements(text: str, before: int = 0) -> list[Statement]:
    r"""Split a file's text into its policies; what follows the last semicolon is one too.

    `before` policies of other files come first: Cedar numbers them all together.

    >>> [s.line for s in statements('permit(principal, action, resource);// a;\n\nforbid')]
    [1, 3]
    """
    found, begin = list[Statement](), 0
    ends = [token.end() for token in _TOKEN.finditer(text) if token[0] == ";"]
    for end in [*ends, len(text)]:
        blank = _BLANK.match(text, begin)
        start = begin if blank is None else blank.end()
        if policy := text[start:end]:
            named = _ID.match(policy)
            name = named[1] if named else f"policy{before + len(found)}"
            found.append(Statement(text.count("\n", 0, start) + 1, name, policy))
        begin = end
    return found


def problems(file: Path) -> list[str]:
    """Return what is wrong with a file, one line each, with the line where the policy begins."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{file}: {error}"]
    found = []
    for statement in statements(text):
        try:
            Policy.parse({file.name: statement.text})
        except PolicyError as error:
            why = error.message.removeprefix(f"{file.name}: ").partition("; nothing is allowed")[0]
            found.append(f"{file}, line {statement.line}: {why}")
    return found


def check(place: Path) -> Policy:
    """Return the policies of a file, or of the `*.cedar` files of a folder.

    Raises:
        PolicyError: they are not valid; the message has a line for each policy that is not.
    """
    files = [place] if place.is_file() else sorted(place.glob("*.cedar"))
    if wrong := [problem for file in files for problem in problems(file)]:
        raise PolicyError("; ".join(wrong), hint="`llmos policy schema` prints what they may say")
    if place.is_file():
        return Policy.parse({place.name: place.read_text(encoding="utf-8")}, f"{place.parent}/")
    return Policy.load(place)
