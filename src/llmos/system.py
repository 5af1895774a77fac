"""Boot: a Config becomes a System, the one object behind command line, server and Python API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import rfc8785

from llmos import config as configuration
from llmos.config import Config
from llmos.data.datasets import DatasetCard, Datasets
from llmos.errors import ConfigError, UnknownModel
from llmos.kernel import kernel as kernels
from llmos.kernel.identity import IssuedKey, Principal, Role
from llmos.kernel.jobs import Job, JobState
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action, Resource
from llmos.kernel.root import Ask
from llmos.models.registry import ModelEntry, Registry
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.verbs.party import PartyVerbs
    from llmos.crypto.root_keys import RootKeyProvider
    from llmos.kernel.approvals import Approval
    from llmos.workflows.cosign import Cosigning
    from llmos.workflows.measure import Measured
    from llmos.workflows.partners import Cosigned, Partner
    from llmos.workflows.report import ReportFiles
    from llmos.workflows.training_plan import TrainPlan
    from llmos.workflows.training_view import OnStep
    from llmos.workflows.what_if import WhatIf


def boot(config: Config, *, ask: Ask | None = None) -> System:
    """Open a home and join its parts.

    Raises:
        HomeMissing: there is no home.
        WrongPassphrase, TokenUnavailable: the root key cannot be had.
        TamperedLog: the log does not agree with its checkpoint.
    """
    return _system(kernels.open_kernel(config, ask=ask))


def create(home: str | Path, *, passphrase: str | None = None, **settings: Any) -> System:  # noqa: ANN401
    """Make a new home and open it; see `llmos init`."""
    config = configuration.load(home=Path(home), **settings)
    return _system(kernels.create(config, passphrase=passphrase))


def open_home(home: str | Path | None = None, **settings: Any) -> System:  # noqa: ANN401
    """Open a home; without a path the configured one."""
    return boot(configuration.load(home=None if home is None else Path(home), **settings))


def verify(file: str | Path, *, keys: str | Path | None = None) -> dict[str, Any]:
    """Verify a certificate or log proof offline with nothing but the public keys.

    Raises:
        VerificationFailed: the message says which check failed.
    """
    from llmos.workflows import verify as workflow

    return workflow.run(Path(file), None if keys is None else Path(keys))


def _system(kernel: Kernel) -> System:
    registry = Registry(kernel.store, kernel.vault, kernel.config.home)
    datasets = Datasets(kernel.store, kernel.vault, kernel.monitor)
    return System(Parts(kernel, datasets, registry))


@dataclass(frozen=True, slots=True)
class System:
    """One opened home; every method is one verb of the command line."""

    parts: Parts

    @property
    def kernel(self) -> Kernel:
        """Return the kernel."""
        return self.parts.kernel

    @property
    def datasets(self) -> Datasets:
        """Return the catalogue of datasets."""
        return self.parts.datasets

    @property
    def registry(self) -> Registry:
        """Return the registry of models."""
        return self.parts.registry

    @property
    def party(self) -> PartyVerbs:
        """Return what this home does as CA and as party of others."""
        from llmos.verbs.party import PartyVerbs

        return PartyVerbs(self.kernel)

    @property
    def who(self) -> Principal:
        """Return who this process acts as."""
        return self.kernel.principal()

    def pull(self, source: str, *, name: str | None = None) -> ModelEntry:
        """Fetch a base model: smollm2-135m, a directory, or hf:ORG/NAME."""
        from llmos.workflows import pull

        return pull.run(pull.PullRequest(source, name), self.who, self.parts)

    def import_data(
        self,
        path: str | Path,
        *,
        unit: str,
        epsilon: float,
        delta: float,
        name: str | None = None,
        text: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        classification: str = "sensitive",
        purposes: Sequence[str] = ("training",),
        holdout: float = 0.1,
        canaries: int = 0,
        purpose_epsilons: Mapping[str, float] | None = None,
        derived_from: Sequence[str] = (),
    ) -> DatasetCard:
        """Import a JSONL, CSV or Parquet file as an encrypted dataset with a privacy budget."""
        from llmos.workflows import import_data

        request = import_data.request(
            Path(path),
            name=name,
            unit=unit,
            text=text,
            prompt=prompt,
            completion=completion,
            classification=classification,
            purposes=tuple(purposes),
            epsilon=epsilon,
            delta=delta,
            holdout_fraction=holdout,
            canaries=canaries,
            purpose_epsilons=purpose_epsilons or {},
            parents=tuple(derived_from),
        )
        return import_data.run(request, self.who, self.parts)

    def plan(self, **options: Any) -> TrainPlan:  # noqa: ANN401 - checked by TrainOptions
        """Derive a training's plan without opening data; see TrainOptions for the options."""
        from pydantic import ValidationError

        from llmos.workflows import training_plan

        try:
            checked = training_plan.TrainOptions(**options)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
                hint="llmos train --help",
            ) from error
        self.kernel.monitor.authorize(self.who, Action.PLAN, self._home())
        return training_plan.make_plan(checked, self.parts)

    def submit(self, plan: TrainPlan) -> str:
        """Reserve the plan's budget and store it as a job; return the job's id."""
        from llmos.workflows import train

        return train.submit(plan, self.who, self.parts)

    def train(self, *, on_step: OnStep | None = None, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """Plan, submit and run a training to its end."""
        return self.resume(self.submit(self.plan(**options)), on_step=on_step)

    def resume(
        self, job_id: str, *, on_step: OnStep | None = None, interrupt: Event | None = None
    ) -> dict[str, Any]:
        """Run a submitted job, or go on with one that was cut off; others' jobs need a right."""
        from llmos.workflows import train

        if self.kernel.jobs.job(job_id).principal != self.who.name:
            self.kernel.monitor.authorize(self.who, Action.MANAGE_JOBS, self._home())
        show = on_step or (lambda _view: None)
        stop = interrupt or Event()
        return train.run(job_id, self.who, self.parts, interrupt=stop, on_step=show)

    def retry(self, job_id: str, *, reason: str, on_step: OnStep | None = None) -> dict[str, Any]:
        """Put a failed job back into the queue, record why, and run it; see `resume`."""
        from llmos.workflows import train

        train.retry(job_id, self.who, self.parts, reason=reason)
        return self.resume(job_id, on_step=on_step)

    def work(
        self,
        *,
        once: bool = True,
        watch: Callable[[str], AbstractContextManager[OnStep]] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Run queued and interrupted jobs, oldest first, and return how each was left.

        Without `once` it goes on until Ctrl-C. `watch` makes the callback for a job's steps,
        `report` is called when a job was left.
        """
        from llmos.workflows import worker

        interrupt, done = Event(), list[dict[str, Any]]()
        watched = watch or (lambda _job_id: nullcontext(lambda _view: None))

        def run(job_id: str) -> None:
            with watched(job_id) as on_step:
                self.resume(job_id, on_step=on_step, interrupt=interrupt)

        def left(job: Job, error: str | None) -> None:
            state = self._job_state(job.id, job.state)
            done.append({"id": job.id, "state": state, "error": error, "result": job.result})
            if report is not None:
                report(done[-1])

        worker.work(self.kernel.jobs, run, left, once=once, interrupt=interrupt)
        return done

    def cancel(self, job_id: str) -> JobState:
        """Stop a job at its next step; only steps that were run are charged."""
        from llmos.workflows import train

        return train.cancel(job_id, self.who, self.parts)

    def propose_raise(self, pool: str, *, epsilon: float, reason: str) -> Approval:
        """Propose a larger budget; another person decides."""
        from llmos.workflows import raise_cap

        return raise_cap.run(pool, epsilon, reason, self.who, self.parts)

    def explain_budget(self, pool: str) -> dict[str, Any]:
        """Return a pool's numbers, each with the theorem that stands behind it."""
        from llmos.workflows import budget_advice

        ledger = self.kernel.budget
        return budget_advice.explain(ledger.pool(pool), ledger.holders(pool))

    def approvals(self) -> list[dict[str, Any]]:
        """Return every proposal with its people by name, oldest first."""
        return [self._approval_facts(found) for found in self.kernel.approvals.approvals()]

    def approval(self, approval_id: str) -> dict[str, Any]:
        """Return one proposal with its people by name."""
        return self._approval_facts(self.kernel.approvals.approval(approval_id))

    def decide(self, approval_id: str, *, approve: bool) -> dict[str, Any]:
        """Approve or refuse what another person proposed."""
        from llmos.workflows import decide

        return self._approval_facts(decide.run(approval_id, self.who, self.parts, approve=approve))

    def _approval_facts(self, approval: Approval) -> dict[str, Any]:
        names = {principal.id: principal.name for principal in self.kernel.identity.principals()}
        people = {"proposer": names[approval.proposer]}
        if approval.decider is not None:
            people["decider"] = names[approval.decider]
        return asdict(approval) | people

    def what_if(self, dataset: str, **job: Any) -> WhatIf:  # noqa: ANN401 - see the workflow
        """Price a training without reserving anything; takes the arguments of `what_if.run`."""
        from llmos.workflows import what_if

        return what_if.run(dataset, self.parts, **job)

    def job_steps(self, job_id: str) -> int:
        """Return how many steps a job has in all."""
        return int(self.kernel.jobs.job(job_id).request["steps"])

    def job_overview(self) -> list[dict[str, Any]]:
        """Return a line for each job, newest first."""
        return [
            {
                "id": job.id,
                "state": self._job_state(job.id, job.state),
                "dataset": job.request["dataset"],
                "model": job.request["model"],
                "output": job.request["output"],
                "created_at": job.created_at,
            }
            for job in self.kernel.jobs.jobs()
        ]

    def job_facts(self, job_id: str) -> dict[str, Any]:
        """Return all that is known about a job."""
        job = self.kernel.jobs.job(job_id)
        facts: dict[str, Any] = {
            "id": job.id,
            "state": self._job_state(job.id, job.state),
            "principal": job.principal,
            "created_at": job.created_at,
            "updated_at": job.updated_at,
            "checkpoint": job.checkpoint,
            "error": job.error,
            "result": job.result,
            "request": job.request,
        }
        if job.request["noise_multiplier"] is not None:
            reservation = self.kernel.budget.reservation(job_id)
            facts["reservation"] = f"{reservation.state}, {reservation.steps_done} steps done"
        return facts

    def _job_state(self, job_id: str, state: JobState) -> str:
        if state is JobState.RUNNING and not self.kernel.jobs.is_live(job_id):
            return "interrupted"
        return str(state)

    def measure(self, *models: str) -> Measured:
        """Measure what models leak about their training data."""
        from llmos.workflows import measure

        return measure.run(models, self.who, self.parts)

    def report(
        self, model: str, *, compare: Sequence[str] = (), folder: str | Path | None = None
    ) -> ReportFiles:
        """Write a signed, logged certificate and an HTML page for a measured model."""
        from llmos.workflows import report

        return report.run(
            model,
            self.who,
            self.parts,
            compare=compare,
            folder=None if folder is None else Path(folder),
        )

    def export(self, model: str, folder: str | Path) -> list[Path]:
        """Write a trained adapter in PEFT format, in the clear."""
        from llmos.workflows import export

        return export.run(model, Path(folder), self.who, self.parts)

    def create_key(
        self,
        *,
        user: str | None = None,
        label: str = "",
        models: Sequence[str] = (),
        days: int | None = None,
    ) -> IssuedKey:
        """Make an API key; its token is shown once."""
        known = {entry.name for entry in self.registry.models()}
        for model in models:
            if model not in known:
                raise UnknownModel(f"no model {model!r}", hint="`llmos model ls` lists them")
        owner = self.kernel.identity.principal(user or self.who.name)
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        details = {"owner": owner.name, "models": list(models) or ["*"], "label": label}
        with self.kernel.monitor.act(
            self.who, Action.MANAGE_KEYS, self._home(), details=details, context={}
        ) as conn:
            return self.kernel.identity.create_key(
                conn, owner, label, frozenset(models) or None, expires
            )

    def key_overview(self) -> list[dict[str, Any]]:
        """Return a line for each API key; never its secret."""
        return [
            {
                "id": key.id,
                "principal": key.principal,
                "label": key.label,
                "models": ["*"] if key.models is None else sorted(key.models),
                "created_at": key.created_at,
                "expires_at": key.expires_at,
                "revoked_at": key.revoked_at,
            }
            for key in self.kernel.identity.keys()  # noqa: SIM118 - not a mapping's
        ]

    def revoke_key(self, key_id: str) -> None:
        """Revoke an API key at once."""
        with self.kernel.monitor.act(
            self.who, Action.MANAGE_KEYS, self._home(), details={"revoke": key_id}, context={}
        ) as conn:
            self.kernel.identity.revoke_key(conn, key_id)

    def add_user(self, name: str, roles: Sequence[str]) -> Principal:
        """Add a person or program.

        Raises:
            ConfigError: a role is unknown.
            PrincipalExists: the name is taken.
        """
        if unknown := sorted(set(roles) - set(Role)):
            raise ConfigError(f"unknown role {unknown[0]!r}", hint=f"one of: {', '.join(Role)}")
        with self.kernel.monitor.act(
            self.who,
            Action.MANAGE_KEYS,
            self._home(),
            details={"user": name, "roles": sorted(roles)},
            context={},
        ) as conn:
            return self.kernel.identity.add_principal(
                conn, name, frozenset(Role(role) for role in roles)
            )

    def rotate_vault(self) -> dict[str, int]:
        """Give the tenant a new key, wrap every object's key under it, destroy the old one."""
        from llmos.workflows import vault

        return vault.rotate(self.who, self.parts)

    def rekey_vault(self, to: RootKeyProvider, *, ask: Ask | None = None) -> None:
        """Change how the root key is kept; the root key and all that it opens stay."""
        from llmos.workflows import vault

        vault.rekey(to, self.who, self.parts, ask=ask)

    def vault_overview(self) -> list[dict[str, Any]]:
        """Return a line for each version of a tenant's key, oldest first."""
        from llmos.workflows import vault

        return vault.versions(self.parts)

    def read_log(self, *, after: int = -1, limit: int = 50) -> list[tuple[int, dict[str, Any]]]:
        """Return entries of the audit log with their indices."""
        self.kernel.monitor.authorize(self.who, Action.READ_LOG, self._home())
        return [(e.index, e.fields) for e in self.kernel.auditlog.entries(after, limit)]

    def verify_log(self) -> int:
        """Recompute the whole log, check all cosignatures, and return its size."""
        from llmos.workflows import partners

        self.kernel.monitor.authorize(self.who, Action.READ_LOG, self._home())
        partners.cosigned(self.parts)
        return self.kernel.auditlog.verify().size

    def cosigned_log(self) -> list[Cosigned]:
        """Return which partner cosigned which size of the log, newest first."""
        from llmos.workflows import partners

        self.kernel.monitor.authorize(self.who, Action.READ_LOG, self._home())
        return partners.cosigned(self.parts)

    def add_partner(self, name: str, vkey: str, *, url: str | None = None) -> Partner:
        """Add a partner of the log by the log key of its home.pub."""
        from llmos.workflows import partners

        return partners.add(name, vkey, url, self.who, self.parts)

    def remove_partner(self, name: str) -> None:
        """Remove a partner of the log."""
        from llmos.workflows import partners

        partners.remove(name, self.who, self.parts)

    def partners(self) -> list[Partner]:
        """Return the partners of the log."""
        from llmos.workflows import partners

        self.kernel.monitor.authorize(self.who, Action.READ_LOG, self._home())
        return partners.partners(self.kernel.store)

    def cosign_log(self) -> Cosigning:
        """Send the newest checkpoint to the partners and keep their cosignatures."""
        from llmos.workflows import cosign

        return cosign.run(self.who, self.parts)

    def export_log(self, form: str, folder: str | Path) -> int:
        """Write the log as ocsf, jsonl or tiles into a new folder; return how many entries."""
        from llmos.reports.log_export import ExportFormat
        from llmos.workflows import export_log

        try:
            wanted = ExportFormat(form)
        except ValueError:
            raise ConfigError(
                f"unknown format {form!r}", hint=f"one of: {', '.join(ExportFormat)}"
            ) from None
        return export_log.run(wanted, Path(folder), self.who, self.parts).size

    def prove_entry(self, index: int, path: Path) -> None:
        """Write a proof that an entry is in the log, for `llmos verify`."""
        from llmos.workflows import outputs, partners

        self.kernel.monitor.authorize(self.who, Action.READ_LOG, self._home())
        outputs.write(path, rfc8785.dumps(partners.prove(index, self.parts).to_dict()))

    def test_policy(
        self, user: str, action: str, dataset: str | None, model: str | None, purpose: str
    ) -> dict[str, Any]:
        """Ask the policy what it would decide, without acting."""
        try:
            asked = Action(action)
        except ValueError:
            raise ConfigError(
                f"unknown action {action!r}", hint=f"one of: {', '.join(Action)}"
            ) from None
        resource = self._home()
        if dataset is not None:
            resource = self.datasets.card(dataset).resource
        elif model is not None:
            resource = self.registry.model(model).resource
        decision = self.kernel.policy.decide(
            self.kernel.identity.principal(user), asked, resource, {"purpose": purpose}
        )
        return {
            "allowed": decision.allowed,
            "policies": list(decision.policies),
            "reason": decision.reason,
        }

    def _home(self) -> Resource:
        return Resource("Home", self.kernel.home_id, {})
