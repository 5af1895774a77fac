"""Differentially private fine-tuning: clip each unit's gradient, sum, add Gaussian noise."""

from __future__ import annotations

from typing import Final

from llmos.engines.base import Assurance, EngineInfo

ENGINE: Final = EngineInfo(
    name="dp",
    protects="whether one privacy unit's records were in the training data, from the trained model",
    assurance=Assurance.TESTED,
)
