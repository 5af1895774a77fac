from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from llmos.engines.base import ENTRY_POINT_GROUP, Assurance
from llmos.engines.federated import ENGINE

ROOT = Path(__file__).parents[4]


def test_the_engine_comes_in_by_the_public_door() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"][ENTRY_POINT_GROUP]["federated"]
    assert EntryPoint("federated", value, ENTRY_POINT_GROUP).load() is ENGINE
    assert (ENGINE.name, ENGINE.assurance) == ("federated", Assurance.TESTED)
