"""The work of a training job: fit under a grant, then settle and publish; safe to kill anywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import Performance
from llmos.engines.dp.randomness import Randomness
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.dp.trainer import FitResult, fit
from llmos.errors import JobCancelled, JobInterrupted, UnaccountableMechanism
from llmos.jobs.jobs import Job
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.monitor import Grant
from llmos.models import lora, lora_sum
from llmos.models.devices import resolve_device
from llmos.models.encoding import encode
from llmos.models.loading import load_base
from llmos.workflows import checkpoints, starting_point, training_acts
from llmos.workflows.checkpoints import Checkpoints
from llmos.workflows.parts import Parts
from llmos.workflows.training_request import TrainRequest
from llmos.workflows.training_view import OnStep, Viewer

_CANCEL_POLL_S: Final = 1.0


@dataclass(slots=True)
class TrainingJob:
    """The step of a training job that computes."""

    who: Principal
    parts: Parts
    interrupt: Event
    on_step: OnStep
    _cancel_checked: float = 0.0
    _base_dtype: str = ""

    def fit(self, job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Train to the end under a grant; the final adapter is in the vault when this returns."""
        del results
        request = TrainRequest.model_validate(job.request)
        card = self.parts.datasets.card(request.dataset)
        if card.fingerprint != request.fingerprint:
            raise UnaccountableMechanism(f"{card.name} changed after this job was planned")
        start = time.monotonic()
        while (outcome := self._fit_admitted(job, request, card)) is None:
            job = self.parts.jobs.job(job.id)
            if request.noise_multiplier is None:
                job = checkpoints.drop(job, self.parts)
        fitted, object_id, digest = outcome
        return {
            "adapter": object_id,
            "digest": digest,
            "steps": fitted.steps,
            "seconds": time.monotonic() - start,
            "tokens_per_s": fitted.tokens / max(fitted.seconds, 1e-9),
            "randomness": str(fitted.randomness),
            "dtype_path": f"base {self._base_dtype}; adapter, gradients, noise, optimizer float32",
            "self_test": {"gradient_norms_against_autograd": fitted.self_tested},
        }

    def _fit_admitted(
        self, job: Job, request: TrainRequest, card: DatasetCard
    ) -> tuple[FitResult, str, str] | None:
        """Fit under a grant; None if the data lost a unit and the fit is to go on without it.

        With privacy that is from the checkpoint on: its steps were charged, and what is left is a
        neighbouring dataset. Without it nothing bounds what the steps hold, so all are done anew.
        """
        starting_point.authorize(request, self.who, self.parts)
        action, resource, context = training_acts.act(request, card)
        start = None
        if request.start is not None:
            start = starting_point.locate(request.start, self.parts.registry)
        erased = self.parts.datasets.erased(card)
        with self.parts.kernel.monitor.admit(
            self.who,
            action,
            resource,
            key=job.id,
            objects=frozenset(filter(None, (card.object_id, job.checkpoint, start))),
            charge=training_acts.charge(request, card),
            context=context,
            details={
                "step": "fit",
                "resumed": job.checkpoint is not None,
                **training_acts.public(request),
            },
        ) as grant:
            fitted, object_id, digest = self._fit_under(grant, job, request, card, erased)
        lost = self.parts.datasets.erased(card) != erased
        if fitted.steps < request.steps:
            if self.interrupt.is_set() or not lost or self.parts.jobs.job(job.id).cancel_requested:
                self._stopped(job, fitted.steps)
            return None
        if lost and request.noise_multiplier is None:
            self.parts.kernel.vault.delete(object_id)
            return None
        return fitted, object_id, digest

    def _fit_under(
        self, grant: Grant, job: Job, request: TrainRequest, card: DatasetCard, erased: int
    ) -> tuple[FitResult, str, str]:
        kernel = self.parts.kernel
        base = self.parts.registry.model(request.model)
        device = resolve_device(kernel.config.device)
        resume = kernel.vault.read(job.checkpoint, "checkpoint", grant) if job.checkpoint else None
        loaded = load_base(kernel.config.home / base.location, device)
        earlier = None
        if request.start is not None:
            earlier = self.parts.registry.open_adapter(request.start.model, grant)
            lora.merge(loaded.model, earlier)
        records = tuple(
            TrainingRecord(record.unit, encoded.ids, encoded.labels_from)
            for record in self.parts.datasets.open_records(card, grant)
            for encoded in [
                encode(record.prompt, record.completion, loaded.tokenizer, request.max_tokens)
            ]
        )
        self._base_dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        adapter = lora.attach(loaded.model, _adapter(request), seed=request.seed)
        charged = request.noise_multiplier is not None
        saver = Checkpoints(self.parts, grant, job, card, charged=charged, erased=erased)
        fitted = fit(
            adapter,
            records,
            request.plan,
            _performance(request, kernel, device.type),
            randomness=Randomness.fresh()
            if request.seed is None
            else Randomness.insecure_test(request.seed),
            resume=resume,
            save=saver.save,
            save_every_s=request.checkpoint_every_s,
            on_step=Viewer(request, card, self.on_step).show,
            stop=lambda: self.interrupt.is_set() or self._must_stop(job.id, card, erased),
        )
        if fitted.steps < request.steps:
            return fitted, "", ""
        whole = adapter if earlier is None else lora_sum.add(adapter, earlier)
        files = lora.to_peft(whole, base.name)
        return fitted, *self.parts.registry.store_adapter(files)

    def _stopped(self, job: Job, steps: int) -> None:
        """Tell why a fit ended before its last step."""
        if self.parts.jobs.job(job.id).cancel_requested:
            training_acts.cancel(job, self.who, self.parts)
            raise JobCancelled(f"job {job.id} was cancelled after {steps} steps")
        raise JobInterrupted(
            f"job {job.id} stopped after step {steps}; nothing is lost",
            hint=f"go on with: llmos jobs resume {job.id}",
        )

    def _must_stop(self, job_id: str, card: DatasetCard, erased: int) -> bool:
        """Look once a second whether another process cancelled the job or erased a person."""
        if time.monotonic() - self._cancel_checked < _CANCEL_POLL_S:
            return False
        self._cancel_checked = time.monotonic()
        lost = self.parts.datasets.erased(card) != erased
        return lost or self.parts.jobs.job(job_id).cancel_requested


def _adapter(request: TrainRequest) -> lora.LoraConfig:
    return lora.LoraConfig(request.rank, 2.0 * request.rank, last_layers=request.last_layers)


def _performance(request: TrainRequest, kernel: Kernel, device: str) -> Performance:
    given = (
        {}
        if request.microbatch_tokens is None
        else {"microbatch_tokens": request.microbatch_tokens}
    )
    return Performance(threads=kernel.config.threads, device=device, **given)
