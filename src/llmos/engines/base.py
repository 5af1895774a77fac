"""What an engine says about itself, readable without loading what it computes with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from llmos.errors import EngineError

ENTRY_POINT_GROUP: Final = "llmos.engines"


class Assurance(StrEnum):
    """How much an engine has been checked; policy may demand a minimum."""

    EXPERIMENTAL = "experimental"
    TESTED = "tested"
    AUDITED = "audited"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine's account of itself."""

    name: str
    protects: str  # one sentence: what nobody can learn, and from what
    assurance: Assurance
    extra: str | None = None  # the optional dependency set it needs: pip install llmos[extra]


def discover() -> dict[str, EngineInfo]:
    """Find all installed engines by their entry points; ours come in by the same door.

    Raises:
        EngineError: an entry point cannot be loaded, or is no `EngineInfo` of that name.
    """
    return {point.name: _load(point) for point in entry_points(group=ENTRY_POINT_GROUP)}


def _load(point: EntryPoint) -> EngineInfo:
    try:
        info = point.load()
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"engine {point.name} cannot be loaded: {error}",
            hint="install it again, or uninstall the package that offers it",
        ) from error
    if not isinstance(info, EngineInfo) or info.name != point.name:
        raise EngineError(f"entry point {point.name} = {point.value} is no engine of that name")
    return info
