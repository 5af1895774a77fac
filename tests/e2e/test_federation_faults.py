"""What goes wrong between organisations: cut links, slow, lying and killed ones; real processes.

After each fault the rounds follow on each other, the ledgers are settled and the logs verify
(`Federation.check`). How long it took to recover is kept as a property of each test.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import RemoteDisconnected
from signal import SIGCONT, SIGSTOP
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from tests.federations import ORGANISATION, Caller, Federation, Member, federation
from tests.homes import opened, run_llmos, until
from tests.parties import Pki

from llmos.crypto.certificates import CRL_LIFE, PartyId
from llmos.crypto.notes import decode_base64
from llmos.engines.federated.codec import HEADER_BYTES, Encoding, Header
from llmos.errors import UpdateRefused
from llmos.federations import invitations, register
from llmos.federations.manifest import Manifest
from llmos.parties import authority, memberships
from llmos.parties.encoding import generate_key
from llmos.parties.tls import Credentials
from llmos.workflows import masked_round
from llmos.workflows.federated_round import Task, encode, header
from llmos.workflows.site_channel import SiteChannel
from llmos.workflows.site_rounds import SiteRounds
from llmos.workflows.site_training import SiteTraining

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # five homes and as many processes
CUT_S: Final = 60.0
LONG: Final = 12  # steps of a round that takes about a second
SHORT_S: Final = 45.0  # what a list or a certificate lives while a test looks on
WRONG_S: Final = 6.0  # three times the pause between a site's calls
ROUNDS: Final = 16
SOON_S: Final = 4.0  # a deadline: a site that is ten times slower misses it
THREE: Final = ("east", "north", "south")
PLAIN: Final[dict[str, Any]] = {
    "sites": THREE,
    "epsilon": 1,
    "delta": 1e-5,
    "secure_aggregation": False,
}
STALE: Final = timedelta(seconds=2)
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def federated(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path
) -> Iterator[Federation]:
    """Start a coordinator with four sites; the way to `west` can be cut."""
    names = ("east", "north", "south", "west")
    with federation(
        tmp_path_factory.mktemp("faults"), tiny_model_folder, names, linked=("west",)
    ) as federated:
        yield federated
        federated.verify_logs()


def now() -> datetime:
    return datetime.now(UTC)


def cancel(federated: Federation, job: str, *names: str) -> None:
    """End a job that has shown what it was for."""
    done = run_llmos(federated.coordinator.home, "federate", "cancel", job, "--reason", "enough")
    assert done.returncode == 0, done.stderr
    for name in names:
        federated.sites[name].saw(f"{job} is failed: the coordinator says: cancelled")


def attempts_lost(rounds: list[dict[str, Any]]) -> int:
    return sum(row["attempts"] - 1 for row in rounds)


def test_a_link_is_cut(federated: Federation, record_property: Record) -> None:
    link = federated.links["west"]
    few = ["east", "north", "west"]
    common: dict[str, Any] = {"epsilon": 2, "delta": 1e-5, "rounds": 400, "local_steps": LONG}
    job = federated.propose(**common)  # three of the four sites are enough
    needy = federated.propose(**common, sites=few)  # which cannot go on without west
    federated.approve(job)
    federated.approve(needy, *few)
    for one in (job, needy):
        federated.coordinator.saw(f"{one}: round 1 done")

    # for a moment, while west has to send its update: it sends the same again
    number = lose_an_upload(federated, job, "west")
    healed = now()
    link.heal()
    record_property("moment", federated.recovered(job, healed, "west"))
    assert federated.rounds(job)[number]["attempts"] == 1
    assert federated.uri("west") in federated.rounds(job)[number]["sites"]

    # for a minute: the others go on, the job that needs west goes on afterwards
    before = len(federated.rounds(job)), len(federated.rounds(needy))
    link.cut()
    threading.Event().wait(CUT_S)
    healed = now()
    alone = [row for row in federated.rounds(job)[before[0] :] if len(row["sites"]) == 3]
    assert len(alone) >= 3
    assert len(federated.rounds(needy)) <= before[1] + 1  # the one that was under way
    link.heal()
    record_property("minute, masked, 3 of 4 needed", federated.recovered(job, healed, "west"))
    record_property("minute, masked, 3 of 3 needed", federated.recovered(needy, healed, "west"))
    for one in (job, needy):
        assert attempts_lost(federated.rounds(one)) <= 1
        cancel(federated, one, *(few if one == needy else federated.sites))
    for one, names in ((job, tuple(federated.sites)), (needy, tuple(few))):
        rounds = federated.check(one, *names)
        # nobody trained, or paid for, a round twice
        assert federated.steps("west", one) <= LONG * (len(rounds) + 1)


def lose_an_upload(federated: Federation, job: str, name: str) -> int:
    """Close a site's link until it could not send its update of a round; return the round."""
    site, link = federated.sites[name], federated.links[name]
    lost = re.compile(rf"{job}: https://\S+ (could not be reached|closed the connection)")
    for _ in range(20):
        until(lambda: waits_for(federated, job, name, "upload"))
        number = int(federated.status(job)["round"])
        before = len(site.printed())
        link.reset()
        with suppress(AssertionError):  # it had not been asked for it yet
            until(partial(shown, lost, site, before), deadline_s=4)
            if waits_for(federated, job, name, "upload"):
                return number
        link.heal()
        # its question may have been lost instead, and it waits before the next one
        until(lambda: not waits_for(federated, job, name, "upload"))
    raise AssertionError(federated.story())


def shown(line: re.Pattern[str], site: Member, start: int) -> bool:
    return line.search(site.printed(), start) is not None


def waits_for(federated: Federation, job: str, name: str, phase: str) -> bool:
    status = federated.status(job)
    return status.get("phase") == phase and federated.uri(name) in status["waiting_for"]


def test_a_site_is_ten_times_slower(federated: Federation, record_property: Record) -> None:
    south = federated.sites["south"]
    steps = steps_of_a_second(federated, "south")  # ten times that misses the deadline
    job = federated.propose(
        **PLAIN, rounds=200, local_steps=steps, deadline_s=SOON_S, minimum_sites=2
    )
    began = now()
    federated.approve(job, *THREE)
    federated.recovered(job, began, *THREE)
    with south.slowed():
        began = now()
        late = rf"{job}: round \d+: late: {federated.uri('south')}\n"
        seen = len(re.findall(late, federated.coordinator.printed()))
        federated.coordinator.saw(late, seen + 4)
        federated.recovered(job, now(), "east", "north", without="south")
        ended = now()
    record_property("slow", federated.recovered(job, ended, "south"))
    cancel(federated, job, *THREE)
    rounds = federated.check(job, *THREE)
    assert attempts_lost(rounds) == 0
    alone = [row for row in rounds if len(row["sites"]) == 2 and at(row) > began]
    assert len(alone) >= 4
    assert max(row["seconds"] for row in alone) < SOON_S + 3  # and what it takes to tell
    # it began no round that was over: that would cost its patients for nothing
    over = {row["round"]: at(row) for row in rounds}
    with opened(south.home) as system:
        entries = [entry for _, entry in system.log.read(limit=system.log.verify())]
    begun = [
        (entry["details"]["round"], at(entry))
        for entry in entries
        if entry["details"].get("step") == "round" and entry["details"]["job"] == job
    ]
    assert len(begun) > 2
    assert [one for one, when in begun if one in over and when > over[one] + STALE] == []


def steps_of_a_second(federated: Federation, name: str) -> int:
    """Return how many local steps take a site a second on this machine, by a short job."""
    job = federated.propose(**PLAIN, rounds=3, local_steps=LONG)
    federated.approve(job, *THREE)
    assert_done(federated, job, rounds=3)
    trained = re.findall(rf"{job}: trained in (\S+) s", federated.sites[name].printed())
    return round(LONG / min(map(float, trained)))


def at(row: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(row["at"])


def manifest_of(federated: Federation, job: str) -> Manifest:
    return register.job(federated.office.kernel.store, job).manifest


def asked(caller: Caller, job: str, number: int) -> Task:
    """Poll until the coordinator wants the update of a round; return its task."""
    found: list[Task] = []

    def look() -> bool:
        for one in caller.poll():
            if one["job"] == job and one["kind"] == "round":
                task = Task(**json.loads(decode_base64(one["task"]["payload"])))
                if task.round == number:
                    found.append(task)
        return bool(found)

    until(look)
    return found[0]


def assert_refused(
    federated: Federation, caller: Caller, task: Task, body: bytes, why: str, *, name: str = "south"
) -> None:
    """The reply, the coordinator's line and its log name the site and say why."""
    uri = federated.uri(name)
    printed = federated.coordinator.printed()
    records = len(federated.records(task.job))
    status, message = caller.send(task, body)
    assert status == 422, message
    assert uri in message
    assert why in message
    said = federated.coordinator.printed().removeprefix(printed)
    assert re.search(rf"{task.job}: .*{uri} .*{re.escape(why)}", said), said
    (record,) = federated.records(task.job)[records:]
    assert record["refused"] == uri
    assert why in record["why"]


def wrong_floats(right: bytes, expected: Header) -> list[tuple[str, bytes]]:
    """Return bodies that are no update of float32, with what is said of each."""
    head, floats, size = right[:HEADER_BYTES], right[HEADER_BYTES:], len(right)
    headers = {
        "layout": replace(expected, layout=bytes(32)),
        "number of entries": replace(expected, entries=1),
        "round": replace(expected, round=7),
        "encoding": replace(expected, encoding=Encoding.INTEGERS),
    }
    return [
        ("its update is cut off", head[:-1]),
        (f"{size - 1} bytes, not the expected {size}", right[:-1]),
        (f"larger than the expected {size} bytes", right + b"\0"),
        ("the magic number of its update", b"LMUX" + right[4:]),
        *((f"the {name} of its update", one.pack() + floats) for name, one in headers.items()),
        *(
            ("an entry of its update is not finite", right[:-4] + np.float32(number).tobytes())
            for number in ("nan", "inf", "-inf")
        ),
    ]


def wrong_blocks(right: bytes) -> list[tuple[str, bytes]]:
    """Return bodies that are no quantised update: scales are no scales, a code is out of range."""
    head, rest = right[:HEADER_BYTES], right[HEADER_BYTES + 4 :]
    return [
        *(
            ("a scale of its update is negative or not finite", head + scale.tobytes() + rest)
            for scale in np.array([-1, np.nan, np.inf, 3e38], dtype=np.float32)
        ),
        ("a code of its update is out of range", right[:-8] + bytes(8)),
    ]


@contextmanager
def agent_of(federated: Federation, name: str, *jobs: str) -> Iterator[Caller]:
    """Take the place of a site's agent that has said yes, with its certificate and key."""
    site = federated.sites[name]
    for job in jobs:
        federated.approve(job, name)
        federated.coordinator.saw(f"{job}: {federated.uri(name)} takes part")
    site.kill()
    try:
        yield federated.caller(name)
    finally:
        site.start("site", "up")


def update_of(manifest: Manifest, task: Task) -> bytes:
    """Return an update in the clear that nobody has trained."""
    update = np.random.default_rng().normal(0, 1e-4, manifest.parameters).astype(np.float32)
    return encode(update, None, manifest, task)[0]


def test_a_site_never_sends_an_update(federated: Federation, record_property: Record) -> None:
    job = federated.propose(**PLAIN, minimum_sites=2, rounds=9, deadline_s=8)  # 4 bits a weight
    with agent_of(federated, "south", job) as lying:
        federated.approve(job, "east", "north")
        task = asked(lying, job, 0)
        for why, body in wrong_blocks(update_of(manifest_of(federated, job), task)):
            assert_refused(federated, lying, task, body, why)
        ended = now()
        record_property(
            "corrupt, without the site", federated.recovered(job, ended, "east", "north")
        )
        assert federated.uri("south") not in federated.rounds(job)[0]["sites"]
        cancel(federated, job, "east", "north")
    federated.sites["south"].saw(f"{job} is failed: the coordinator says: cancelled")
    federated.check(job, "east", "north")


def test_a_site_lies_and_replays(federated: Federation, record_property: Record) -> None:
    job = federated.propose(**PLAIN, minimum_sites=3, rounds=4, bits=32, local_steps=LONG)
    manifest = manifest_of(federated, job)
    with agent_of(federated, "south", job) as lying:
        federated.approve(job, "east", "north")
        old = asked(lying, job, 0)
        first = update_of(manifest, old)
        with federated.sites["north"].held():  # the round waits for it
            for why, body in wrong_floats(first, header(manifest, old)):
                assert_refused(federated, lying, old, body, why)
            assert lying.send(old, first) == (200, "")
            assert lying.send(old, first) == (200, "")  # its answer may have been lost
            other = update_of(manifest, old)
            assert_refused(federated, lying, old, other, "it has sent something else before")
            ended = now()
        record_property("corrupt, then the right one", federated.recovered(job, ended, *THREE))

        # in the next round, in the one before, and in the next attempt
        task = asked(lying, job, 1)
        assert_refused(federated, lying, task, first, "the round of")
        assert_refused(federated, lying, old, first, "round 0, attempt 1 is over")
        second = update_of(manifest, task)
        federated.coordinator.kill()
        federated.up()
        again = asked(lying, job, 1)
        assert (task.attempt, again.attempt) == (1, 2)
        assert_refused(federated, lying, again, second, "the attempt of")
        assert_refused(federated, lying, task, second, "round 1, attempt 1 is over")
        ended = now()
        assert lying.send(again, update_of(manifest, again)) == (200, "")
        record_property("replay", federated.recovered(job, ended, *THREE))
    # the agent is back and ends the job with the others
    assert_done(federated, job, rounds=4)
    assert federated.steps("south", job) == LONG * 2  # in the two other rounds it was the test
    assert attempts_lost(federated.rounds(job)) == 1


def assert_done(federated: Federation, job: str, *, rounds: int) -> None:
    """All three sites were in all rounds, and four homes have the very same adapter."""
    assert federated.finished(job)["state"] == "done"
    for name in THREE:
        federated.sites[name].saw(f"{job} is done")
    done = federated.check(job, *THREE)
    assert [len(row["sites"]) for row in done] == [3] * rounds
    digests = set()
    for member in (federated.coordinator, *(federated.sites[name] for name in THREE)):
        with opened(member.home) as system:
            (model,) = (one for one in system.registry.models() if one.card.get("job") == job)
            digests.add(model.digest)
    assert len(digests) == 1


def test_callers_without_a_good_certificate(federated: Federation, record_property: Record) -> None:
    job, south = endless(federated, deadline_s=25), federated.sites["south"]
    good, bad = federated.caller("south"), bad_credentials(federated, "south")
    with south.held():  # the round waits for its update
        until(lambda: federated.status(job)["waiting_for"] == [federated.uri("south")])
        before = federated.status(job), federated.rounds(job)
        entries = federated.records(job)
        task = asked(good, job, before[0]["round"])
        body = update_of(manifest_of(federated, job), task)
        asks = (
            ("/federation/poll", b"{}"),
            (f"/federation/jobs/{job}/weights/{task.weights_sha256}", None),
            (f"/federation/jobs/{job}/rounds/{task.round}/{task.attempt}/upload", body),
            ("/federation/keys", None),
        )
        for credentials in bad:
            stranger = replace(good, terms=replace(good.terms, credentials=credentials))
            for path, what in asks:
                with pytest.raises((ssl.SSLError, RemoteDisconnected, ConnectionError)):
                    stranger.ask(path, what)
        nobody = replace(good, terms=replace(good.terms, credentials=None))
        for path, what in asks:
            status, answer = nobody.ask(path, what)
            assert status == 401
            assert set(json.loads(answer)) == {"error"}
        # a site with a good certificate that has no part in the job
        outside = federated.caller("west")
        assert job not in {one["job"] for one in outside.poll()}
        assert [outside.ask(path, what)[0] for path, what in asks[1:3]] == [404, 404]
        assert (federated.status(job), federated.rounds(job)) == before
        assert federated.records(job) == entries
        ended = now()
    record_property("strangers", federated.recovered(job, ended, *THREE))
    cancel(federated, job, *THREE)
    federated.check(job, *THREE)


def bad_credentials(federated: Federation, name: str) -> list[Credentials]:
    """Return certificates in a site's name: expired, of tomorrow, of two other CAs."""
    with opened(federated.coordinator.home) as system:
        ca = authority.load(system.kernel).authority
    key, names = generate_key(), PartyId(ORGANISATION, name).names(())
    month, day = timedelta(days=30), timedelta(days=1)
    return [
        Credentials(ca.issue(key.public_key(), names, now() - month, month - day), key),
        Credentials(ca.issue(key.public_key(), names, now() + day), key),
        Pki(ORGANISATION).credentials(name),
        Pki("bank.example").credentials(name),
    ]


def endless(federated: Federation, deadline_s: float = 10) -> str:
    """Begin a job of three sites, of which two are enough, with more rounds than a test sees."""
    job = federated.propose(**PLAIN, rounds=400, deadline_s=deadline_s, minimum_sites=2)
    began = now()
    federated.approve(job, *THREE)
    federated.recovered(job, began, *THREE)
    return job


def test_a_revocation_list_runs_out(federated: Federation, record_property: Record) -> None:
    job, south = endless(federated), federated.sites["south"]
    south.interrupt()
    ends = hold_short_list(federated, "south")
    started = now()
    south.start("site", "up")
    federated.recovered(job, started, *THREE)
    # a timer fetches another one; the agent that is there uses it
    renewed = run_llmos(south.home, "party", "renew")
    assert renewed.returncode == 0, renewed.stderr
    assert now() < ends
    record_property("revocation list", federated.recovered(job, ends + STALE, *THREE))
    cancel(federated, job, *THREE)
    federated.check(job, *THREE)


def test_a_certificate_runs_out(federated: Federation, record_property: Record) -> None:
    job, south = endless(federated), federated.sites["south"]
    south.interrupt()
    ends = hold_short_certificate(federated, "south")
    started = now()
    south.start("site", "up")
    federated.recovered(job, started, *THREE)
    # the agent ends and says why, the others go on
    assert south.process is not None
    assert south.process.wait(60) != 0
    assert now() > ends
    assert re.search(r"this home's certificate (was revoked or )?expired", south.printed())
    record_property("expired, the others", federated.recovered(job, ends, "east", without="south"))
    # it cannot renew any more; by a new token it is let in, and goes on with the job
    assert run_llmos(south.home, "party", "renew").returncode != 0
    for home, *typed in (
        (federated.coordinator.home, "revoke", "south"),
        (south.home, "leave", ORGANISATION),
    ):
        done = run_llmos(home, "party", *typed)
        assert done.returncode == 0, done.stderr
    ended = now()
    federated.join("south")
    record_property("expired, joined again", federated.recovered(job, ended, *THREE))
    cancel(federated, job, *THREE)
    federated.check(job, *THREE)


def hold_short_list(federated: Federation, name: str) -> datetime:
    """Give a site a genuine revocation list that runs out soon; return when it does."""
    at = now() - CRL_LIFE + timedelta(seconds=SHORT_S)
    with opened(federated.coordinator.home) as system:
        number = memberships.crl_number(system.parties.bundle().crls[0])
        listed = authority.load(system.kernel).authority.list_revoked((), number + 1, at)
        for _ in range(2):  # the CA's own list is newer then
            system.parties.invite("nobody")
            system.parties.revoke("nobody")
    with opened(federated.sites[name].home) as system:
        member = memberships.membership(ORGANISATION, system.kernel)
        memberships.keep_crl(member, listed, system.who, system.kernel, now())
    return at + CRL_LIFE


def hold_short_certificate(federated: Federation, name: str) -> datetime:
    """Give a site a genuine certificate that runs out soon; return when it does."""
    with opened(federated.coordinator.home) as system:
        ca = authority.load(system.kernel).authority
    with opened(federated.sites[name].home) as system:
        member = memberships.membership(ORGANISATION, system.kernel)
        assert member.certificate is not None
        at, life = now() - timedelta(days=29), timedelta(days=29, seconds=SHORT_S)
        key = member.certificate.public_key()
        assert isinstance(key, EllipticCurvePublicKey)
        issued = ca.issue(key, member.id.names(()), at, life)
        memberships.finish(member, issued, system.who, system.kernel, now())
    return issued.not_valid_after_utc


def test_coordinator_and_site_are_killed(federated: Federation, record_property: Record) -> None:
    south = federated.sites["south"]
    job = federated.propose(
        sites=THREE, epsilon=1, delta=1e-5, rounds=ROUNDS, local_steps=LONG, output="killed"
    )
    federated.approve(job, *THREE)
    federated.coordinator.saw(f"{job}: round 1 done")
    record_property("corrupt, masked", lie_in_a_masked_round(federated, job))

    # the coordinator, while sites train, and in a step of the protocol that takes a moment
    for phases in (("upload",), ("advertise", "share", "confirm", "unmask")):
        phase = kill_coordinator(federated, job, phases)
        done = len(federated.rounds(job))
        if phase != "upload":  # somebody starts another server at that address by mistake
            federated.coordinator.start("party", "serve", "--port", str(federated.port))
            threading.Event().wait(WRONG_S)
            federated.coordinator.kill()
        ended = now()
        federated.up()
        record_property(f"coordinator killed in {phase}", federated.recovered(job, ended, *THREE))
        assert federated.rounds(job)[done]["attempts"] <= 2

    # a site, while it trains
    until(lambda: waits_for(federated, job, "south", "upload"))
    south.kill()
    assert_unmasks_one_sum(federated, "south", job)
    ended = now()
    south.start("site", "up")
    record_property("site killed", federated.recovered(job, ended, *THREE))

    assert_done(federated, job, rounds=ROUNDS)
    attempts = [row["attempts"] for row in federated.rounds(job)]
    assert max(attempts) <= 2
    assert sum(attempts) <= ROUNDS + 3
    # the coordinator's deaths cost no training; the site's own costs the round that it was in
    assert {federated.steps(name, job) for name in ("east", "north")} == {LONG * ROUNDS}
    assert LONG * ROUNDS <= federated.steps("south", job) <= LONG * (ROUNDS + 1)


def lie_in_a_masked_round(federated: Federation, job: str) -> float:
    """Send what is no masked update with a site's certificate, before its agent sends one."""
    until(lambda: waits_for(federated, job, "east", "upload"))
    with federated.sites["east"].held():
        lying = federated.caller("east")
        task = asked(lying, job, federated.status(job)["round"])
        expected = masked_round.session_of(task, manifest_of(federated, job))[0].update
        zeros = bytes(expected.total_bytes - HEADER_BYTES)
        right = expected.pack() + zeros
        for why, body in {
            "not the expected": right[:-1],
            "larger than the expected": right + right,
            "the layout of": replace(expected, layout=bytes(32)).pack() + zeros,
            "the attempt of": replace(expected, attempt=9).pack() + zeros,
        }.items():
            assert_refused(federated, lying, task, body, why, name="east")
        ended = now()
    seconds = federated.recovered(job, ended, *THREE)
    assert federated.rounds(job)[task.round]["attempts"] == 1
    return seconds


def kill_coordinator(federated: Federation, job: str, phases: tuple[str, ...]) -> str:
    """Kill the coordinator while it is in one of these phases, and return in which."""
    coordinator, found = federated.coordinator, list[str]()

    def caught() -> bool:
        if federated.status(job).get("phase") not in phases:
            return False
        coordinator.signal(SIGSTOP)
        phase = federated.status(job).get("phase")
        if phase in phases:
            coordinator.kill()
            found.append(str(phase))
        else:
            coordinator.signal(SIGCONT)
        return bool(found)

    until(caught)
    return found[0]


def assert_unmasks_one_sum(federated: Federation, name: str, job: str) -> None:
    """What a site has signed before it was killed, it signs again, and nothing else."""
    everybody = tuple(federated.uri(one) for one in THREE)
    with opened(federated.sites[name].home) as system:
        invitation = invitations.invitation(system.kernel.store, job)
        assert invitation.plan is not None
        training = SiteTraining(invitation, invitation.plan, system.parts, lambda _: None)
        channel = SiteChannel(ORGANISATION, system.parts)
        rounds = SiteRounds(training, channel, system.parts, lambda _: None)
        assert invitation.update_round is not None
        task = Task(job, invitation.manifest.digest, invitation.update_round, 9, "", {})
        rounds.note_release(task, everybody)
        with pytest.raises(UpdateRefused, match=f"round {task.round} was unmasked for"):
            rounds.note_release(task, everybody[:2])
        rounds.note_release(task, everybody)
