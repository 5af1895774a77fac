"""Federated learning: a coordinator learns the sum of the sites' updates and no single one."""

from __future__ import annotations

from typing import Final

from llmos.engines.base import Assurance, EngineInfo

ENGINE: Final = EngineInfo(
    name="federated",
    protects="each site's update, from a coordinator together with fewer than a third of the sites",
    assurance=Assurance.TESTED,
)
