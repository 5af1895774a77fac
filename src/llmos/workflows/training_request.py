"""The request of a training job: its complete description, stored with the job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping


class Start(BaseModel):
    """The federated adapter that a training starts from, on top of the base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    digest: str  # SHA-256 of its container, hex
    job: str
    learnt: bool  # whether this home took part in that job, with the dataset of this training
    private: bool


class TrainRequest(BaseModel):
    """A job's complete description: the worker needs nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    fingerprint: str
    model: str  # the base model, whatever the training starts from
    start: Start | None = None
    output: str
    purpose: str
    tenant: str | None = None  # of who planned it, for whose part of the budget it counts
    epsilon: float | None  # what was asked for; the guarantee is derived from the mechanism
    delta: float | None
    units: int
    batch: int
    steps: int
    clip: float
    noise_multiplier: float | None  # None: training without privacy
    learning_rate: float
    rank: int
    last_layers: int | None
    max_tokens: int
    max_records_per_unit: int
    microbatch_tokens: int | None
    checkpoint_every_s: float
    seed: int | None

    @property
    def plan(self) -> DPPlan:
        """Return the engine's plan, from which sampler, noise and mechanism derive."""
        privacy = (
            None
            if self.noise_multiplier is None
            else GaussianClipping(clip_norm=self.clip, noise_multiplier=self.noise_multiplier)
        )
        return DPPlan(
            units=self.units,
            expected_batch_units=float(self.batch),
            steps=self.steps,
            privacy=privacy,
            max_records_per_unit=self.max_records_per_unit,
            optimizer=AdamWSettings(learning_rate=self.learning_rate),
        )
