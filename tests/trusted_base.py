"""Checks on the trusted base: small enough to read in a day, every branch tested.

Run by `make test` after pytest: `python tests/trusted_base.py .coverage.json`.
"""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
import tokenize
from pathlib import Path
from typing import Any, Final

SOURCE: Final = Path("src/llmos")
TRUSTED: Final = ("privacy.py", "errors.py", "config.py", "crypto", "kernel")
LINES_CAP: Final = 3500
# Not trusted, but money, proofs and identities hang on them: every branch is tested, lines do not
# count.
COVERED_TOO: Final = (
    "databases",
    "accounts",
    "jobs",
    "parties",
    "transparency/audit_paths.py",
    "transparency/cosignatures.py",
    "transparency/proofs.py",
    "workflows/login.py",
)
# Files with tests that are skipped where these programs are not installed.
NEEDS: Final = {
    "softhsm2-util": ("crypto/tokens.py",),
    "/usr/lib/postgresql/15/bin/initdb": ("databases", "jobs", "kernel/kernel.py"),
}


def python_files(names: tuple[str, ...] = TRUSTED) -> list[Path]:
    """Return the Python files under these names; migrations are data, run once."""
    found: list[Path] = []
    for name in names:
        path = SOURCE / name
        found += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return [path for path in found if "migrations" not in path.parts]


def code_lines(source: str) -> int:
    r"""Count the lines that hold code: neither blank, nor comment, nor docstring.

    >>> code_lines("# why\n\nx = 1\n")
    1
    """
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored and token.string.strip():
            held.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                held.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def uncovered(path: Path, report: dict[str, Any]) -> str | None:
    """Name the first lines or branches of a file that no test ran, if there are any."""
    coverage = report["files"].get(str(path))
    if coverage is None:
        return None if not path.read_text().strip() else f"{path}: not imported by any test"
    lines, branches = coverage["missing_lines"], coverage["missing_branches"]
    if lines or branches:
        return f"{path}: lines {lines[:8]}, branches {branches[:8]} are not tested"
    return None


def main(report_path: str) -> int:
    """Print what is wrong and return 1, or print the size and return 0."""
    report = json.loads(Path(report_path).read_text())
    lines = sum(code_lines(f.read_text()) for f in python_files())
    files = python_files(TRUSTED + COVERED_TOO)
    missing = [program for program in NEEDS if shutil.which(program) is None]
    untested = {f for program in missing for f in python_files(NEEDS[program])}
    wrong = [text for f in files if f not in untested and (text := uncovered(f, report))]
    if lines > LINES_CAP:
        wrong.append(f"the trusted base has {lines} lines of code; {LINES_CAP} are allowed")
    for text in wrong:
        sys.stderr.write(f"trusted base: {text}\n")
    for program in missing:
        names = ", ".join(NEEDS[program])
        sys.stderr.write(f"trusted base: {names}: not all is tested, there is no {program}\n")
    if not wrong:
        sys.stdout.write(
            f"trusted base: {lines} of {LINES_CAP} lines of code, every branch tested\n"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
