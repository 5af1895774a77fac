"""Boot: a Config becomes a System, the one object behind command line, server and Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmos import config as configuration
from llmos.config import Config
from llmos.data.datasets import DatasetCard, Datasets
from llmos.errors import ConfigError
from llmos.jobs.jobs import Jobs
from llmos.kernel import kernel as kernels
from llmos.kernel.identity import Principal
from llmos.kernel.kernel import Kernel
from llmos.kernel.policy import Action
from llmos.kernel.root import Ask
from llmos.models.registry import ModelEntry, Registry
from llmos.verbs.access import AccessVerbs
from llmos.verbs.approvals import ApprovalVerbs
from llmos.verbs.budgets import BudgetVerbs
from llmos.verbs.data import DataVerbs
from llmos.verbs.federation import FederationVerbs
from llmos.verbs.jobs import JobVerbs
from llmos.verbs.log import LogVerbs
from llmos.verbs.parties import PartyVerbs
from llmos.verbs.people import PeopleVerbs
from llmos.verbs.policies import PolicyVerbs
from llmos.verbs.vault import VaultVerbs
from llmos.workflows import change_policy
from llmos.workflows.parts import Parts

if TYPE_CHECKING:
    from llmos.workflows.invert import Inverted
    from llmos.workflows.measure import Measured
    from llmos.workflows.report import ReportFiles
    from llmos.workflows.training_plan import TrainPlan
    from llmos.workflows.training_view import OnStep


def boot(config: Config, *, ask: Ask | None = None) -> System:
    """Open a home and join its parts.

    Raises:
        HomeMissing: there is no home.
        WrongPassphrase, TokenUnavailable: the root key cannot be had.
        TamperedLog: the log does not agree with its checkpoint.
        StorageError: an approved erasure could not be finished.
    """
    system = _system(kernels.open_kernel(config, ask=ask))
    system.data.finish_erasures()
    return system


def create(home: str | Path, *, passphrase: str | None = None, **settings: Any) -> System:  # noqa: ANN401
    """Make a new home and open it; see `llmos init`."""
    config = configuration.load(home=Path(home), **settings)
    return _system(kernels.create(config, passphrase=passphrase))


def open_home(home: str | Path | None = None, **settings: Any) -> System:  # noqa: ANN401
    """Open a home; without a path the configured one."""
    return boot(configuration.load(home=None if home is None else Path(home), **settings))


def verify(
    file: str | Path,
    *,
    keys: str | Path | None = None,
    sites: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """Verify a certificate, an erasure receipt or a log proof with nothing but the public keys.

    Args:
        file: what to verify.
        keys: the home's public keys; default: home.pub beside the file.
        sites: for a federated model's certificate: public keys that sites published, by name.

    Raises:
        VerificationFailed: the message says which check failed.
    """
    from llmos.workflows import verify as workflow

    given = {name: Path(path) for name, path in (sites or {}).items()}
    return workflow.run(Path(file), None if keys is None else Path(keys), given)


def _system(kernel: Kernel) -> System:
    change_policy.adopt(kernel)
    registry = Registry(kernel.store, kernel.vault, kernel.config.home)
    datasets = Datasets(kernel.store, kernel.vault, kernel.monitor)
    return System(Parts(kernel, datasets, registry, Jobs(kernel.store, kernel.config.home)))


@dataclass(frozen=True, slots=True)
class System:
    """One opened home; every method, here or in a group of verbs, is one of the command line."""

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
    def who(self) -> Principal:
        """Return who this process acts as."""
        return self.parts.who

    @property
    def jobs(self) -> JobVerbs:
        """Return the verbs on jobs."""
        return JobVerbs(self.parts)

    @property
    def data(self) -> DataVerbs:
        """Return the verbs on people in datasets."""
        return DataVerbs(self.parts)

    @property
    def budgets(self) -> BudgetVerbs:
        """Return the verbs on privacy budgets."""
        return BudgetVerbs(self.parts)

    @property
    def approvals(self) -> ApprovalVerbs:
        """Return the verbs on acts that take two people."""
        return ApprovalVerbs(self.parts)

    @property
    def log(self) -> LogVerbs:
        """Return the verbs on the audit log and its partners."""
        return LogVerbs(self.parts)

    @property
    def access(self) -> AccessVerbs:
        """Return the verbs on people, programs and their keys."""
        return AccessVerbs(self.parts)

    @property
    def parties(self) -> PartyVerbs:
        """Return the verbs on parties: this home's CA, its memberships, whom it trusts."""
        return PartyVerbs(self.parts)

    @property
    def federation(self) -> FederationVerbs:
        """Return the verbs on federated trainings, of a coordinator and of a site."""
        return FederationVerbs(self.parts)

    @property
    def people(self) -> PeopleVerbs:
        """Return the verbs on who is known here and how they log in."""
        return PeopleVerbs(self.parts)

    @property
    def policies(self) -> PolicyVerbs:
        """Return the verbs on the access policies."""
        return PolicyVerbs(self.parts)

    @property
    def vault(self) -> VaultVerbs:
        """Return the verbs on the vault's own keys."""
        return VaultVerbs(self.parts)

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
        tenant_epsilons: Mapping[str, float] | None = None,
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
            purpose_epsilons=purpose_epsilons,
            tenant_epsilons=tenant_epsilons,
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
        self.kernel.monitor.authorize(self.who, Action.PLAN, self.kernel.home)
        return training_plan.make_plan(checked, self.parts)

    def submit(self, plan: TrainPlan) -> str:
        """Reserve the plan's budget and store it as a job; return the job's id."""
        from llmos.workflows import train

        return train.submit(plan, self.who, self.parts)

    def train(self, *, on_step: OnStep | None = None, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        """Plan, submit and run a training to its end."""
        return self.jobs.resume(self.submit(self.plan(**options)), on_step=on_step)

    def measure(self, *models: str, records: int | None = None) -> Measured:
        """Measure what models leak about their training data, on so many records at most."""
        from llmos.workflows import measure

        most = measure.MOST_RECORDS if records is None else records
        return measure.run(models, self.who, self.parts, most)

    def measure_inversion(self, model: str) -> Inverted:
        """Measure what the messages of a federated job betray of this site's records."""
        from llmos.workflows import invert

        return invert.run(model, self.who, self.parts)

    def report(
        self,
        model: str,
        *,
        compare: Sequence[str] = (),
        folder: str | Path | None = None,
        answers: str | Path | None = None,
    ) -> ReportFiles:
        """Write a signed, logged certificate and an HTML page for a measured model."""
        from llmos.workflows import report

        return report.run(
            model,
            self.who,
            self.parts,
            compare=compare,
            folder=None if folder is None else Path(folder),
            answers=None if answers is None else Path(answers),
        )

    def export(self, model: str, folder: str | Path, *, reason: str = "") -> list[Path]:
        """Write a trained adapter in PEFT format, in the clear.

        Where that takes a second person it is proposed to them with the reason; see the workflow.
        """
        from llmos.workflows import export

        return export.run(model, Path(folder), self.who, self.parts, reason=reason)
