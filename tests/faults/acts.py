"""The acts that are done on homes while their disk fails; each can be repeated after a refusal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.faults import training
from tests.homes import write_notes

import llmos
from llmos.crypto.root_keys import Argon2Cost, Passphrase
from llmos.kernel.monitor import Charge
from llmos.kernel.policy import Action
from llmos.kernel.pools import Part
from llmos.privacy import PoissonSampledGaussian

if TYPE_CHECKING:
    from llmos.kernel.monitor import Grant
    from llmos.system import System

PASSPHRASE: Final = "correct horse battery staple"
MECHANISM: Final = PoissonSampledGaussian(0.05, 4.0, 200)
_CHEAP: Final = Argon2Cost(memory_kib=8, passes=1, lanes=1)  # the disk is what is tested


@dataclass(slots=True)
class Stage:
    """One home and what its acts leave for those that follow."""

    home: Path
    tell: Callable[..., None] = lambda **_event: None  # where acts say what they have done so far
    _opened: System | None = None
    grants: dict[str, Grant] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)  # object ids by a name
    admitted: ExitStack = field(default_factory=ExitStack)  # not closed: the process may end first

    @property
    def system(self) -> System:
        """Return the home; it stays open from its first use on."""
        if self._opened is None:
            self._opened = llmos.open(self.home, device="cpu", threads=1, passphrase=PASSPHRASE)
        return self._opened

    @property
    def is_open(self) -> bool:
        """Tell whether the home was opened."""
        return self._opened is not None

    def make(self) -> None:
        """Make the home; one that was made and then could not be opened is opened."""
        if not self.home.exists():
            self._opened = llmos.create(self.home, device="cpu", threads=1)
        self.system.kernel.auditlog.check()

    def import_notes(self) -> None:
        """Import the notes that lie beside the home."""
        self.system.import_data(
            self.home.parent / "notes.jsonl",
            name="notes",
            unit="patient_id",
            text="text",
            classification="synthetic",
            epsilon=3,
            delta=1e-6,
            holdout=0,
        )

    def admit(self, job: str, mechanism: PoissonSampledGaussian = MECHANISM) -> None:
        """Reserve the budget of a training."""
        card = self.system.datasets.card("notes")
        column = card.unit_column
        charge = Charge(card.name, Part("training"), card.fingerprint, column, mechanism)
        admission = self.system.kernel.monitor.admit(
            self.system.who,
            Action.TRAIN_PRIVATE,
            card.resource,
            key=job,
            objects={card.object_id},
            charge=charge,
            context={"purpose": "training"},
        )
        self.grants[job] = self.admitted.enter_context(admission)

    def append(self, *numbers: int) -> None:
        """Add entries to the log under one signature."""
        kernel = self.system.kernel
        with kernel.store.transaction() as conn:
            kernel.auditlog.append_all(conn, [{"v": 1, "number": number} for number in numbers])

    def put(self, name: str, content: bytes) -> None:
        """Put an object into the vault."""
        self.objects[name] = self.system.kernel.vault.put("note", content)

    def delete(self, name: str) -> None:
        """Delete an object."""
        self.system.kernel.vault.delete(self.objects[name])

    def seal(self, name: str) -> None:
        """Seal a secret."""
        self.system.kernel.vault.seal_secret(name, bytes(32))

    def rotate(self) -> None:
        """Do all the stages of a rotation."""
        self.system.vault.rotate()

    def rekey(self) -> None:
        """Let a passphrase keep the root key from now on."""
        self.system.vault.rekey(Passphrase(PASSPHRASE, _CHEAP))

    def train(self) -> None:
        """Run the submitted training job to its end."""
        training.run(self.system, lambda step: self.tell(saved=step))

    def close(self) -> None:
        """Close the databases; SQLite then moves its log into the file."""
        if self._opened is not None:
            self._opened.kernel.store.close()
            self._opened.kernel.vault.keyring.store.close()


Act = tuple[str, Callable[[Stage], None]]


def _opening(stage: Stage) -> None:
    stage.system.kernel.auditlog.check()


OPENING: Final[Act] = ("open the home", _opening)

LEDGER: Final[tuple[Act, ...]] = (
    OPENING,
    ("reserve a", lambda stage: stage.admit("a")),
    ("run 3 steps of a", lambda stage: stage.grants["a"].progress(3)),
    ("settle a", lambda stage: stage.grants["a"].settle(MECHANISM.after(5))),
    ("reserve b", lambda stage: stage.admit("b")),
    ("abort b", lambda stage: stage.grants["b"].abort()),
    ("reserve c", lambda stage: stage.admit("c")),
    ("run 1 step of c", lambda stage: stage.grants["c"].progress(1)),
)
LOG: Final[tuple[Act, ...]] = (
    OPENING,
    ("append 1", lambda stage: stage.append(1)),
    ("append 100", lambda stage: stage.append(*range(2, 102))),
    ("append 1 more", lambda stage: stage.append(102)),
)
KEYS: Final[tuple[Act, ...]] = (
    OPENING,
    ("put a", lambda stage: stage.put("a", b"a" * 10)),
    ("put b", lambda stage: stage.put("b", b"b" * 300_000)),
    ("seal", lambda stage: stage.seal("spare")),
    ("delete a", lambda stage: stage.delete("a")),
    ("rotate", lambda stage: stage.rotate()),
    ("put c", lambda stage: stage.put("c", b"c")),
    ("rekey", lambda stage: stage.rekey()),
)
MAKING: Final[tuple[Act, ...]] = (("make the home", lambda stage: stage.make()),)
IMPORT: Final[tuple[Act, ...]] = (
    OPENING,
    ("import", lambda stage: stage.import_notes()),
)
TRAINING: Final[tuple[Act, ...]] = (OPENING, ("train", lambda stage: stage.train()))
SUBJECTS: Final = {
    "ledger": LEDGER,
    "log": LOG,
    "keys": KEYS,
    "making": MAKING,
    "import": IMPORT,
    "training": TRAINING,
}


def prepare(subject: str, folder: Path) -> None:
    """Fill a folder with what the acts of a subject begin with; its home is named `home`."""
    write_notes(folder / "notes.jsonl")
    stage = Stage(folder / "home")
    if subject != "making":
        stage.make()
    if subject in {"ledger", "training"}:
        stage.import_notes()
    if subject == "training":
        training.submit(stage.system)
    stage.close()
