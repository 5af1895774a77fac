"""The work of a training job: fit under a grant, then settle and publish; safe to kill anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any, Final

from sqlalchemy import Connection

from llmos.data.datasets import DatasetCard
from llmos.engines.dp.plan import Performance
from llmos.engines.dp.randomness import Randomness
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.dp.trainer import FitResult, fit
from llmos.errors import JobCancelled, JobInterrupted, UnaccountableMechanism
from llmos.jobs.jobs import Job, JobState
from llmos.kernel import accounting
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.monitor import Charge, Grant
from llmos.kernel.policy import Action, Resource
from llmos.models import lora
from llmos.models.encoding import encode
from llmos.models.loading import load_base, resolve_device
from llmos.privacy import PrivacyUnit
from llmos.workflows import checkpoints
from llmos.workflows.checkpoints import Checkpoints
from llmos.workflows.parts import Parts
from llmos.workflows.training_plan import TrainRequest
from llmos.workflows.training_view import OnStep, Viewer

_CANCEL_POLL_S: Final = 1.0


@dataclass(slots=True)
class TrainingJob:
    """The durable steps of a training job: `fit` and `publish`, or `cancel`."""

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
        action, resource, context = act(request, card)
        erased = self.parts.datasets.erased(card)
        with self.parts.kernel.monitor.admit(
            self.who,
            action,
            resource,
            key=job.id,
            objects=frozenset(filter(None, (card.object_id, job.checkpoint))),
            charge=charge(request, card),
            context=context,
            details={"step": "fit", "resumed": job.checkpoint is not None, **public(request)},
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
        records = tuple(
            TrainingRecord(record.unit, encoded.ids, encoded.labels_from)
            for record in self.parts.datasets.open_records(card, grant)
            for encoded in [
                encode(record.prompt, record.completion, loaded.tokenizer, request.max_tokens)
            ]
        )
        self._base_dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        adapter = lora.attach(loaded.model, request.lora, seed=request.seed)
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
        files = lora.to_peft(adapter, base.name)
        return fitted, *self.parts.registry.store_adapter(files)

    def publish(self, job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Settle, register the adapter and end the job in one transaction."""
        request = TrainRequest.model_validate(job.request)
        kernel, fitted = self.parts.kernel, results["fit"]
        card = self.parts.datasets.card(request.dataset)
        mechanism = request.plan.mechanism
        epsilon = None if mechanism is None else accounting.epsilon(mechanism, request.delta or 0.0)
        result = {
            "model": request.output,
            "epsilon": epsilon,
            "delta": request.delta,
            **{name: fitted[name] for name in ("steps", "seconds", "tokens_per_s", "digest")},
        }
        checkpoint = self.parts.jobs.job(job.id).checkpoint
        with self._closing(job, request, card, "publish", {"digest": fitted["digest"]}) as closing:
            grant, conn = closing
            if grant is not None and mechanism is not None:
                grant.settle(mechanism, conn=conn, details={"step": "settle"})
            self.parts.registry.publish_adapter(
                conn,
                name=request.output,
                base=request.model,
                object_id=fitted["adapter"],
                digest=fitted["digest"],
                card=_model_card(job, request, card, fitted, epsilon),
            )
            self.parts.jobs.set_checkpoint(conn, job, None)
            self.parts.jobs.finish(conn, job, JobState.DONE, result)
        if checkpoint is not None:
            kernel.vault.delete(checkpoint)
        return result

    def cancel(self, job: Job, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Charge a cancelled job for the steps recorded in the ledger, and end it."""
        del results
        request = TrainRequest.model_validate(job.request)
        kernel = self.parts.kernel
        card = self.parts.datasets.card(request.dataset)
        mechanism = request.plan.mechanism
        steps = 0 if mechanism is None else kernel.budget.reservation(job.id).steps_done
        checkpoint = self.parts.jobs.job(job.id).checkpoint
        with self._closing(job, request, card, "cancel", {"steps_done": steps}) as (grant, conn):
            if grant is not None and mechanism is not None:
                if steps == 0:
                    grant.abort(conn=conn)
                else:
                    grant.settle(mechanism.after(steps), conn=conn, details={"step": "settle"})
            self.parts.jobs.set_checkpoint(conn, job, None)
            self.parts.jobs.finish(conn, job, JobState.CANCELLED, {"steps": steps})
        if checkpoint is not None:
            kernel.vault.delete(checkpoint)
        return {"steps": steps}

    @contextmanager
    def _closing(
        self,
        job: Job,
        request: TrainRequest,
        card: DatasetCard,
        step: str,
        details: Mapping[str, Any],
    ) -> Iterator[tuple[Grant | None, Connection]]:
        """Yield the grant of the job's charge, if any, and the transaction that ends the job."""
        action, resource, context = act(request, card)
        monitor = self.parts.kernel.monitor
        facts = {"step": step, "job": job.id, **public(request), **details}
        with ExitStack() as stack:
            grant = None
            if (cost := charge(request, card)) is not None:
                grant = stack.enter_context(
                    monitor.admit(
                        self.who,
                        action,
                        resource,
                        key=job.id,
                        objects=(),
                        charge=cost,
                        context=context,
                        details={"step": f"before {step}"},
                    )
                )
            conn = stack.enter_context(
                monitor.act(self.who, action, resource, details=facts, context=context)
            )
            yield grant, conn

    def _stopped(self, job: Job, steps: int) -> None:
        """Tell why a fit ended before its last step."""
        if self.parts.jobs.job(job.id).cancel_requested:
            self.cancel(job, {})
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


def _model_card(
    job: Job,
    request: TrainRequest,
    card: DatasetCard,
    fitted: Mapping[str, Any],
    epsilon: float | None,
) -> dict[str, Any]:
    """Return what the registry keeps about a trained adapter."""
    return {
        "dataset": request.dataset,
        "fingerprint": request.fingerprint,
        "classification": str(card.classification),
        "job": job.id,
        "private": epsilon is not None,
        "epsilon": epsilon,
        "delta": request.delta,
        "request": request.model_dump(mode="json"),
        **{name: fitted[name] for name in ("steps", "randomness", "seconds", "dtype_path")},
        "self_test": fitted["self_test"],
    }


def act(request: TrainRequest, card: DatasetCard) -> tuple[Action, Resource, dict[str, str]]:
    """Return what policy is asked about a training: the action, the dataset and the purpose."""
    private = request.noise_multiplier is not None
    action = Action.TRAIN_PRIVATE if private else Action.TRAIN_WITHOUT_PRIVACY
    return action, card.resource, {"purpose": request.purpose}


def charge(request: TrainRequest, card: DatasetCard) -> Charge | None:
    """Return what a training costs whom; None without privacy."""
    mechanism = request.plan.mechanism
    if mechanism is None:
        return None
    unit = PrivacyUnit(card.unit_column).column
    return Charge(card.name, request.purpose, card.fingerprint, unit, mechanism)


def public(request: TrainRequest) -> dict[str, Any]:
    """Return the numbers of a request that its log records carry."""
    names = ("model", "output", "steps", "batch", "clip", "noise_multiplier", "delta", "purpose")
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}


def _performance(request: TrainRequest, kernel: Kernel, device: str) -> Performance:
    given = (
        {}
        if request.microbatch_tokens is None
        else {"microbatch_tokens": request.microbatch_tokens}
    )
    return Performance(threads=kernel.config.threads, device=device, **given)
