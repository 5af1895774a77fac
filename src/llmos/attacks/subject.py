"""What a measurement is of: one model, and the data of this home that it has learnt."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """Which model was measured, on which data."""

    model: str
    digest: str  # SHA-256 over the model's files, hex
    base: str
    dataset: str
    fingerprint: str  # SHA-256 of the dataset's stored plaintext, hex
