"""The pins: complete, free of machine-specific parts, and together satisfying every extra."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
# Installed by venv itself, or this project; they are nobody's requirement at run time.
UNPINNED = {"pip", "setuptools", "llmos", "wheel"}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.]+)", line).groups()  # type: ignore[union-attr]
            found[str(canonicalize_name(name))] = Version(version)
    return found


def test_every_requirement_of_every_extra_is_satisfied_by_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    texts = [text for group in groups for text in group]
    for requirement in map(Requirement, texts):
        name = str(canonicalize_name(requirement.name))
        if name != "llmos":
            assert pins()[name] in requirement.specifier, requirement


def test_what_is_installed_is_what_is_pinned_and_fits_together() -> None:
    pinned = pins()
    installed = {
        str(canonicalize_name(d.metadata["Name"])): d
        for d in distributions()
        if canonicalize_name(d.metadata["Name"]) not in UNPINNED
    }
    for name, distribution in installed.items():
        public = Version(Version(distribution.version).public)
        assert pinned.get(name) == public, f"{name} {public} is installed, not what is pinned"
        for text in distribution.requires or []:
            requirement = Requirement(text)
            needed = str(canonicalize_name(requirement.name))
            if needed in installed and (not requirement.marker or requirement.marker.evaluate()):
                have = Version(installed[needed].version).public
                assert requirement.specifier.contains(have, prereleases=True), (name, text)
