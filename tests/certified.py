"""A federated job as its homes' logs and ledgers have it, without the training in it."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rfc8785
import torch
from tests.homes import close, opened, write_notes
from tests.unit.federations.test_manifest import FIELDS

import llmos
from llmos.crypto import dsse
from llmos.crypto.certificates import PartyId
from llmos.federations import invitations, register
from llmos.federations import manifest as manifests
from llmos.federations.invitations import InvitationState
from llmos.federations.manifest import ANSWER_TYPE, SignedManifest
from llmos.federations.register import FederatedState
from llmos.kernel.policy import Action
from llmos.models import folders, lora
from llmos.models.loading import load_base
from llmos.parties import authority
from llmos.parties.encoding import generate_key
from llmos.parties.tls import Credentials
from llmos.reports.federated_rounds import rounds_sha256
from llmos.workflows import (
    consent,
    federated_adapter,
    publish_federated,
    site_plan,
    site_settlement,
    site_statement,
)
from llmos.workflows.federated_round import Task

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from llmos.kernel.identity import Principal
    from llmos.models.lora import LoraAdapter
    from llmos.system import System

ORGANISATION: Final = "research.example"
DIGEST: Final = hashlib.sha256(b"the adapter").hexdigest()
NAMES: Final = ("east", "north", "south")


@dataclass
class Job:
    """A coordinator and its sites after a job of two rounds."""

    folder: Path
    model: Path
    fields: dict[str, Any] = field(default_factory=dict)
    stack: ExitStack = field(default_factory=ExitStack)
    sites: dict[str, System] = field(default_factory=dict)
    credentials: dict[str, Credentials] = field(default_factory=dict)
    terms: dict[str, Any] = field(default_factory=dict)  # of the sites' data
    leaver: str | None = None  # withdraws
    leaves_after: int = 1  # rounds
    misled: tuple[str, ...] = ()  # told after the last round that the job has failed

    def home(self, name: str, place: int = 0) -> System:
        """Make a home with the model and, at a site, data."""
        home = self.folder / name
        close(llmos.create(home))
        system = self.stack.enter_context(opened(home))
        system.pull(str(self.model), name="tiny")
        if name in NAMES:
            notes = write_notes(self.folder / f"{name}.jsonl", 24 + place)
            terms: dict[str, Any] = {"epsilon": 8, "delta": 1e-4, "text": "text", **self.terms}
            system.import_data(notes, name="notes", unit="patient_id", **terms)
        return system

    def run(self) -> Job:
        """Let everything happen but the training itself."""
        self.coordinator = self.home("coordinator")
        self.coordinator.parties.create_authority(ORGANISATION)
        self.sites = {name: self.home(name, place) for place, name in enumerate(NAMES)}
        key = self.coordinator.kernel.certificate_key
        digest = self.coordinator.registry.model("tiny").digest
        fields = FIELDS | {"rounds": 2, "model_digest": digest} | self.fields
        self.signed = manifests.sign(manifests.parse(fields), key)
        self._certify_parties()
        parts: dict[str, dict[str, Any]] = {}
        for uri in self.signed.manifest.sites:
            name = uri.rpartition("/")[2]
            parts[uri] = self.site(name)
        self._coordinate(parts)
        return self

    def _certify_parties(self) -> None:
        kernel, at = self.coordinator.kernel, datetime.now(UTC)
        ca = authority.load(kernel)
        for name in NAMES:
            key, party = generate_key(), PartyId(ORGANISATION, name)
            self.coordinator.parties.invite(name)
            with kernel.store.transaction() as conn:
                issued = ca.issue(conn, party, key.public_key(), party.names(()), at)
            self.credentials[name] = Credentials(issued, key)

    def site(self, name: str) -> dict[str, Any]:
        """Run a job's acts at a site and return what it states."""
        system, manifest = self.sites[name], self.signed.manifest
        kernel, parts, job_id = system.kernel, system.parts, manifest.id
        with kernel.store.transaction() as conn:
            invitations.receive(conn, self.signed, ORGANISATION)
        job = consent.approve(job_id, system.who, parts)
        card = parts.datasets.card(manifest.dataset)
        at, agreed = datetime.now(UTC), consent.given(job, parts)
        plan = site_plan.make_plan(manifest, card)
        plan = replace(plan, admitted_at=at.isoformat(), consent=agreed)
        dp_plan = site_plan.training_plan(manifest, plan)
        context = site_plan.policy_context(job, plan, agreed, parts, at=at)
        asks, left = site_plan.coordinator_principal(manifest), name == self.leaver
        with kernel.monitor.admit(
            asks,
            Action.FEDERATE,
            card.resource,
            key=job_id,
            objects=(),
            charge=site_settlement.charge_of(manifest, card, dp_plan),
            context=context,
            details={"manifest_sha256": manifest.digest, "purpose": manifest.purpose},
        ) as grant:
            rounds = self.leaves_after if left else manifest.rounds
            self._train(system, asks, rounds)
            if rounds:
                grant.progress(manifest.local.steps * rounds)
            details = {"step": "publish", "job": job_id, "digest": DIGEST}
            done = not left and name not in self.misled
            ended = InvitationState.WITHDRAWN if left else InvitationState.FAILED
            with kernel.monitor.act(
                asks, Action.FEDERATE, card.resource, details=details, context=context
            ) as conn:
                site_settlement.settle(grant, dp_plan, job_id, parts, conn=conn)
                if done:
                    publish(conn, system, self.signed)
                state = InvitationState.DONE if done else ended
                invitations.change(
                    conn, job_id, InvitationState.APPROVED, state=state, plan=plan.text
                )
        return self.state(name)

    def _train(self, system: System, asks: Principal, rounds: int) -> None:
        """Record rounds as `ResidentTrainer.train` does, but all in one transaction."""
        kernel, card = system.kernel, system.datasets.card("notes")
        entry = {"actor": asks.name, "action": "federate", "resource": str(card.resource)}
        with kernel.store.transaction() as conn:
            for number in range(rounds):
                details = {"step": "round", **self.task(number).to_dict()}
                kernel.auditlog.append(conn, entry | {"outcome": "done", "details": details})

    def task(self, number: int) -> Task:
        """Return what the coordinator asks in a round."""
        manifest = self.signed.manifest
        asked = [uri for uri in manifest.sites if number == 0 or self.stays(uri, number)]
        weights = weights_after(number, manifest.parameters)
        return Task(manifest.id, manifest.digest, number, 1, weights, dict.fromkeys(asked, 24))

    def stays(self, uri: str, number: int) -> bool:
        """Tell whether a site is in a round, and not only asked for it."""
        return number < self.leaves_after or not uri.endswith(f"/{self.leaver}")

    def state(self, name: str) -> dict[str, Any]:
        """Let a site state what it has spent."""
        system = self.sites[name]
        job = invitations.invitation(system.kernel.store, self.signed.manifest.id)
        uri = PartyId(ORGANISATION, name).uri
        return site_statement.make(job, uri, self.credentials[name], system.parts)

    def _coordinate(self, parts: dict[str, dict[str, Any]]) -> None:
        system, manifest = self.coordinator, self.signed.manifest
        kernel, who = system.kernel, system.who
        act = kernel.monitor.act
        proposed = {"propose": manifest.id, "manifest_sha256": manifest.digest}
        with act(who, Action.COORDINATE, kernel.home, details=proposed) as conn:
            register.propose(conn, self.signed, who.name, None)
        with kernel.store.transaction() as conn:
            self._keep_rounds(conn)
        rounds = register.rounds(kernel.store, manifest.id)
        published = {
            "job": manifest.id,
            "model": manifest.output,
            "digest": DIGEST,
            "weights": weights_after(manifest.rounds, manifest.parameters),
            "rounds_sha256": rounds_sha256(rounds),
        }
        with act(who, Action.COORDINATE, kernel.home, details=published) as conn:
            publish(conn, system, self.signed, sites=list(manifest.sites))
            job = register.job(kernel.store, manifest.id)
            register.end(conn, job, FederatedState.DONE)
        with kernel.store.transaction() as conn:
            register.keep_loss(conn, manifest.id, 0, 2.5)
            for uri, part in parts.items():
                register.keep_answer(conn, manifest.id, uri, self.answer(uri))
                register.keep_statement(conn, manifest.id, uri, part)

    def _keep_rounds(self, conn: Connection) -> None:
        manifest = self.signed.manifest
        for number in range(manifest.rounds):
            task = self.task(number)
            stay = [uri for uri in manifest.sites if self.stays(uri, number)]
            facts = {
                "sites": stay,
                "attempts": 1,
                "seconds": 1.5,
                "bytes_up": dict.fromkeys(stay, 1000),
                "task_sha256": hashlib.sha256(rfc8785.dumps(task.to_dict())).hexdigest(),
                "weights_before": task.weights_sha256,
                "weights_after": weights_after(number + 1, manifest.parameters),
            }
            register.keep_round(conn, manifest.id, number, f"object-{number}", facts)

    def answer(self, uri: str) -> dict[str, Any]:
        """Let a site say yes, as its agent does; the one that left says no."""
        name, manifest = uri.rpartition("/")[2], self.signed.manifest
        key = self.sites[name].kernel.certificate_key
        left = name == self.leaver
        said: dict[str, Any] = {
            "site": uri,
            "manifest_sha256": manifest.digest,
            "vkey": key.vkey,
            "accepted": not left,
            "reason": "a patient objected" if left else "",
            "units": 0 if left else 24,
            "epsilon": None if left else 2.5,
        }
        return dsse.sign(rfc8785.dumps(said), ANSWER_TYPE, key)


def weights_after(rounds: int, parameters: int) -> str:
    """Return the SHA-256 of the global weights after so many rounds; they begin as zeros."""
    return hashlib.sha256(rounds.to_bytes(2) if rounds else bytes(4 * parameters)).hexdigest()


def publish(conn: Any, system: System, signed: SignedManifest, **fields: Any) -> None:
    """Enter the adapter in a registry."""
    manifest = signed.manifest
    card = publish_federated.model_card(manifest, {"sensitive"}) | fields
    if not fields:
        card |= {"dataset": "notes", "fingerprint": system.datasets.card("notes").fingerprint}
    system.registry.publish_adapter(
        conn, name=manifest.output, base="tiny", object_id="none", digest=DIGEST, card=card
    )


def adapter_of(model: Path) -> tuple[LoraAdapter, dict[str, Any]]:
    """Return an adapter of a model, and the fields of a manifest that asks for it."""
    fields = {"parametrisation": "ffa-lora", "rank": 12, "seed": 5}
    asked = manifests.Adapter.model_validate(fields)
    adapter = federated_adapter.attach(asked, load_base(model, torch.device("cpu")))
    made = {
        "adapter": fields,
        "layout": federated_adapter.layout(adapter, asked, folders.digest(model)),
        "parameters": adapter.vector().numel(),
    }
    return adapter, made


def with_adapter(folder: Path, model: Path, stack: ExitStack, **terms: Any) -> Job:
    """Return a job of the adapter that homes make of `model`; east has it, untrained, as `real`."""
    adapter, made = adapter_of(model)
    job = Job(folder, model, fields=made, stack=stack, terms=terms).run()
    east = job.sites["east"]
    object_id, digest = east.registry.store_adapter(lora.to_peft(adapter, "tiny"))
    entry = east.registry.model(job.signed.manifest.output)
    with east.kernel.monitor.act(
        east.who, Action.MEASURE, entry.resource, details={}, context={}
    ) as conn:
        east.registry.publish_adapter(
            conn, name="real", base="tiny", object_id=object_id, digest=digest, card=entry.card
        )
    return job
