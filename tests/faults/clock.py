"""What is done while the clock jumps; run in a process whose clock libfaketime reads from a file.

    LD_PRELOAD=libfaketime.so.1 FAKETIME_TIMESTAMP_FILE=FILE python -m tests.faults.clock HOME FILE

Each line of the input names a case, which gets a copy of HOME; the answer is a line of JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.faults.acts import MECHANISM, Stage
from tests.homes import checked_books, close
from tests.parties import Met, Pki, meet

import llmos
from llmos.crypto import merkle
from llmos.crypto.notes import Checkpoint, NoteKey, sign_note
from llmos.errors import (
    ApprovalConflict,
    AuthenticationError,
    BudgetExceeded,
    JobBusy,
    JobOvertaken,
)
from llmos.jobs.jobs import JobState
from llmos.kernel.store import now
from llmos.parties.tls import client_context, server_context
from llmos.system import System
from llmos.transparency.audit_paths import consistency_proof
from llmos.transparency.cosignatures import verify_cosignature
from llmos.workflows.witness import Witness

TODAY: Final = "2027-03-01 12:00:00"
YESTERDAY: Final = "2027-02-28 12:00:00"
TOMORROW: Final = "2027-03-02 12:00:00"
NEXT_WEEKS: Final = "2027-03-24 12:00:00"  # certificates live on, revocation lists do not
NEXT_QUARTER: Final = "2027-05-01 12:00:00"
LAST_YEAR: Final = "2026-03-01 12:00:00"
LAST_CENTURY: Final = "1980-01-01 00:00:00"
NEXT_CENTURY: Final = "2105-01-01 00:00:00"
_PARTNER: Final = NoteKey("llmos.local/partner", bytes(range(32)))

Clock = Callable[[str], None]  # sets the clock, in UTC; it stands still


def a_key_expires_when_the_clock_says_so(system: System, clock: Clock) -> None:
    """Expiry is a matter of the clock: forward it ends, and back it begins again."""
    token = system.access.create_key(days=1).token
    system.kernel.identity.authenticate(token)
    for moment in (TOMORROW, NEXT_CENTURY):
        clock(moment)
        assert _is_refused(system, token)
    clock(LAST_YEAR)
    assert not _is_refused(system, token)


def a_revoked_key_stays_revoked_at_any_time(system: System, clock: Clock) -> None:
    """Revocation is no matter of the clock."""
    issued = system.access.create_key(days=1)
    system.access.revoke_key(issued.id)
    for moment in (LAST_CENTURY, YESTERDAY, TODAY, TOMORROW):
        clock(moment)
        assert _is_refused(system, issued.token)


def a_key_that_was_made_in_the_future_can_be_revoked(system: System, clock: Clock) -> None:
    clock(NEXT_CENTURY)
    issued = system.access.create_key()
    clock(TODAY)
    assert not _is_refused(system, issued.token)
    system.access.revoke_key(issued.id)
    assert _is_refused(system, issued.token)


def the_log_is_in_the_order_of_its_indices(system: System, clock: Clock) -> None:
    """Times are what the clock said; order and proofs do not depend on them."""
    for moment in (TODAY, LAST_CENTURY, NEXT_CENTURY, YESTERDAY):
        clock(moment)
        system.access.add_user(f"u{moment[:4]}-{moment[8:10]}", ["auditor"])
    size = system.log.verify()
    shown = system.log.read(after=size - 5)
    assert [index for index, _ in shown] == list(range(size - 4, size))
    years = [entry["at"][:4] for _, entry in shown]
    assert years == ["2027", "1980", "2105", "2027"]
    close(system)
    again = llmos.open(system.kernel.config.home, device="cpu")
    assert again.log.verify() == size
    close(again)


def jobs_are_listed_and_none_is_lost(system: System, clock: Clock) -> None:
    """Their order is that of the clock; each of them is there, and can be run."""
    jobs, made = system.parts.jobs, []
    for moment in (TODAY, NEXT_CENTURY, LAST_CENTURY):
        clock(moment)
        with system.kernel.store.transaction() as conn:
            made.append(jobs.submit(conn, "train", "admin", {"steps": 1}))
    assert {job.id for job in jobs.jobs()} == set(made)
    for job_id in made:
        assert jobs.run(job_id, {"one": lambda _job, _results: {}}).id == job_id


def a_lease_is_held_as_long_as_its_holder_lives(system: System, clock: Clock) -> None:
    """No clock ends it, and none is needed to end it."""
    jobs = system.parts.jobs
    with system.kernel.store.transaction() as conn:
        job_id = jobs.submit(conn, "train", "admin", {"steps": 1})

    def step(_job: object, _results: object) -> dict[str, Any]:
        for moment in (NEXT_CENTURY, LAST_CENTURY):
            clock(moment)
            assert jobs.is_live(job_id)
            _assert_raises(JobBusy, lambda: jobs.run(job_id, {}))
        return {}

    jobs.run(job_id, {"one": step})
    assert not jobs.is_live(job_id)


def a_run_that_was_overtaken_is_fenced_off_whatever_its_clock_says(
    system: System, clock: Clock
) -> None:
    """The later run has the higher attempt, although it was begun at an earlier time."""
    jobs = system.parts.jobs
    with system.kernel.store.transaction() as conn:
        job_id = jobs.submit(conn, "train", "admin", {"steps": 1})
    clock(NEXT_CENTURY)
    with suppress(KeyboardInterrupt):
        jobs.run(job_id, {"one": _interrupted})
    earlier = jobs.job(job_id)
    clock(LAST_CENTURY)
    with suppress(KeyboardInterrupt):
        jobs.run(job_id, {"one": _interrupted})
    assert jobs.job(job_id).attempt == earlier.attempt + 1
    clock(NEXT_CENTURY)

    def finish() -> None:
        with system.kernel.store.transaction() as conn:
            jobs.finish(conn, earlier, JobState.DONE, {})

    _assert_raises(JobOvertaken, finish)


def a_witness_goes_by_sizes_and_writes_the_time_beside(system: System, clock: Clock) -> None:
    """A partner's log that grew is cosigned at any time; the cosignature carries that time."""
    system.log.add_partner("partner", _PARTNER.vkey)
    kernel = system.kernel
    witness = Witness(kernel.store, kernel.monitor, kernel.auditlog.key, kernel.home)
    leaves: list[bytes] = []
    for size, moment in enumerate((TODAY, LAST_CENTURY, NEXT_CENTURY), start=1):
        clock(moment)
        leaves.append(merkle.leaf_hash(b"%d" % size))
        nodes = _nodes(leaves)
        root = merkle.tree_root(size, lambda *at, nodes=nodes: nodes[at])
        text = Checkpoint(_PARTNER.name, size, root).text()
        note = sign_note(text, _PARTNER)
        proof = consistency_proof(size - 1, size, lambda *at, nodes=nodes: nodes[at])
        line = witness.add_checkpoint(system.who, size - 1, proof, note)
        seconds = verify_cosignature(line, text, kernel.auditlog.key.verifier)
        assert datetime.fromtimestamp(seconds, UTC).year == int(moment[:4])


def an_approval_is_decided_once_whatever_the_clock_says(system: System, clock: Clock) -> None:
    """A proposal from the future is decided today, once."""
    clock(NEXT_CENTURY)
    proposal = system.budgets.propose_raise("notes", epsilon=9, reason="clock")
    kernel = system.kernel
    system.access.add_user("bob", ["steward"])
    bob = system.access.create_key(user="bob").token
    file = kernel.config.home.parent / "bob.key"
    file.touch(mode=0o600)
    file.write_text(bob)
    clock(LAST_CENTURY)
    as_bob = llmos.open(kernel.config.home, device="cpu", api_key_file=file)
    as_bob.approvals.decide(proposal.id, approve=True)
    assert kernel.budget.pool("notes").epsilon == 9
    clock(NEXT_CENTURY)
    _assert_raises(ApprovalConflict, lambda: as_bob.approvals.decide(proposal.id, approve=True))
    close(as_bob)


def a_budget_is_never_filled_up_by_time(system: System, clock: Clock) -> None:
    """What is spent stays spent for a century; a hold does not run out either."""
    stage = Stage(system.kernel.config.home)
    stage.admit("held")
    too_much = MECHANISM.after(100_000)
    before = checked_books(system)
    for moment in (NEXT_CENTURY, LAST_CENTURY):
        clock(moment)
        assert checked_books(system) == before
        _assert_raises(BudgetExceeded, lambda: stage.admit("more", too_much))
    stage.grants["held"].progress(1)
    stage.close()


def times_are_text_in_utc_that_sorts(system: System, clock: Clock) -> None:
    """Also those that no clock should show."""
    moments = (LAST_CENTURY, LAST_YEAR, YESTERDAY, TODAY, TOMORROW, NEXT_CENTURY)
    written = []
    for moment in moments:
        clock(moment)
        written.append(now())
    assert written == sorted(written)
    assert written[0] == "1980-01-01T00:00:00.000Z"


def a_party_is_refused_before_and_after_its_certificates_time(system: System, clock: Clock) -> None:
    """Both ends refuse it, and everybody while the revocation list has run out."""
    del system
    made = datetime.now(UTC)
    pki = Pki(at=made)
    ward, lab = pki.credentials("ward", at=made), pki.credentials("lab", at=made)

    def handshake(listed: datetime) -> Met:
        anchor = pki.anchor(at=listed)
        server = server_context(lambda: pki.terms(ward, "lab", anchor=anchor))
        return meet(server, client_context(pki.terms(lab, "ward", anchor=anchor)))

    for moment, listed_at in (
        (TODAY, TODAY),
        (YESTERDAY, YESTERDAY),
        (NEXT_QUARTER, NEXT_QUARTER),
        (NEXT_WEEKS, TODAY),
        (NEXT_WEEKS, NEXT_WEEKS),
        (TODAY, TODAY),
    ):
        clock(moment)
        met = handshake(datetime.fromisoformat(listed_at).replace(tzinfo=UTC))
        accepted = met.answer == b"welcome"
        assert accepted is ((moment, listed_at) in {(TODAY, TODAY), (NEXT_WEEKS, NEXT_WEEKS)})
        assert accepted is (met.client is None)


CASES: Final = {
    case.__name__: case
    for case in (
        a_key_expires_when_the_clock_says_so,
        a_revoked_key_stays_revoked_at_any_time,
        a_key_that_was_made_in_the_future_can_be_revoked,
        the_log_is_in_the_order_of_its_indices,
        jobs_are_listed_and_none_is_lost,
        a_lease_is_held_as_long_as_its_holder_lives,
        a_run_that_was_overtaken_is_fenced_off_whatever_its_clock_says,
        a_witness_goes_by_sizes_and_writes_the_time_beside,
        an_approval_is_decided_once_whatever_the_clock_says,
        a_budget_is_never_filled_up_by_time,
        times_are_text_in_utc_that_sorts,
        a_party_is_refused_before_and_after_its_certificates_time,
    )
}


def _is_refused(system: System, token: str) -> bool:
    try:
        system.kernel.identity.authenticate(token)
    except AuthenticationError:
        return True
    return False


def _assert_raises(kind: type[Exception], act: Callable[[], object]) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"there was no {kind.__name__}")


def _interrupted(_job: object, _results: object) -> dict[str, Any]:
    raise KeyboardInterrupt


def _nodes(leaves: list[bytes]) -> dict[tuple[int, int], bytes]:
    nodes: dict[tuple[int, int], bytes] = {}
    for index, leaf in enumerate(leaves):
        for level, place, node in merkle.completed_nodes(index, leaf, lambda *at: nodes[at]):
            nodes[level, place] = node
    return nodes


def main(home: Path, clock_file: Path) -> None:
    """Serve the lines of the standard input."""

    def clock(moment: str) -> None:
        clock_file.write_text(moment)

    for line in sys.stdin:
        clock(TODAY)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "home"
            shutil.copytree(home, copy)
            system = llmos.open(copy, device="cpu", threads=1)
            try:
                CASES[line.strip()](system, clock)
                clock(TODAY)
                checked_books(system)
                print(json.dumps({"held": True}), flush=True)  # noqa: T201
            except Exception:  # noqa: BLE001 - whatever it is, the test has to see it
                print(json.dumps({"held": False, "error": traceback.format_exc()}), flush=True)  # noqa: T201
            finally:
                close(system)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
