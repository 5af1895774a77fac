"""Discovery of engines."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from llmos.engines import base
from llmos.engines.base import Assurance, EngineInfo, discover
from llmos.errors import EngineError


def test_our_engine_is_found_through_its_entry_point() -> None:
    info = discover()["dp"]
    assert info.name == "dp"
    assert info.assurance is Assurance.TESTED
    assert info.extra is None


def test_discovery_loads_no_learning_library() -> None:
    code = "import sys; from llmos.engines.base import discover; discover(); "
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("llmos.engines.nothing:ENGINE", "cannot be loaded"),
        ("llmos.engines.dp:NOTHING", "cannot be loaded"),
        ("llmos.engines.base:discover", "no engine of that name"),
        ("llmos.engines.dp:ENGINE", "no engine of that name"),
    ],
)
def test_a_broken_entry_point_is_an_error_and_not_a_gap(
    value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("other", value, base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(base, "entry_points", lambda **_: [point])
    with pytest.raises(EngineError, match=message):
        discover()


def test_infos_are_values() -> None:
    assert EngineInfo("a", "b", Assurance.AUDITED) == EngineInfo("a", "b", Assurance.AUDITED)
