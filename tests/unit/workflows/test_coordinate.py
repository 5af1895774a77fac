"""The coordinator goes on: one site, one job, one moment without room stops no other job."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.coordinated import Hall, Peer, hall, task_of

from llmos.crypto import dsse
from llmos.errors import RequestError, StorageFull, UnknownJob, UpdateRefused
from llmos.federations import register
from llmos.federations.manifest import ANSWER_TYPE, Manifest
from llmos.federations.register import FederatedState
from llmos.kernel.vault import Vault
from llmos.workflows import (
    coordinated_round,
    masked_round,
    publish_federated,
    running_federation,
    setbacks,
)

PLAIN: dict[str, Any] = {"aggregation": {"kind": "plain"}, "minimum_sites": 2}
THREE = ("east", "north", "south")


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hall]:
    """Return a coordinator with four sites, of which three are enough; it never rests."""
    monkeypatch.setattr(setbacks, "REST_S", 0.0)
    with hall(tmp_path) as made:
        yield made


def goes_on(hall: Hall, manifest: Manifest) -> None:
    """Let a round of a job be done, or two where it is under way."""
    before = hall.job(manifest).rounds_done
    hall.round(manifest)
    hall.coordinator.tick()
    assert hall.job(manifest).rounds_done == before + 1


def test_four_sites_train_behind_masks(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest)
    for _ in range(2):
        goes_on(four, manifest)
    assert four.job(manifest).rounds_done == 2
    assert four.coordinator.weights(four.peers["east"].uri, manifest.id, weights(four, manifest))


def weights(hall: Hall, manifest: Manifest) -> str:
    return task_of(hall.instruction("east", manifest)).weights_sha256


@pytest.mark.parametrize(
    "said",
    [
        {"units": 0},
        {"units": 10**10 + 1},
        {"units": 2**53 - 1},
        {"units": True},
        {"units": 2.5},
        {"units": "24"},
        {"epsilon": -1.0},
        {"epsilon": True},
        {"epsilon": "much"},
        {"accepted": "yes"},
    ],
)
def test_an_answer_that_is_none_is_refused_by_name(four: Hall, said: dict[str, Any]) -> None:
    manifest = four.propose()
    four.agree(manifest, "east", "north", "south")
    with pytest.raises(RequestError, match="party/west"):
        four.answer("west", manifest, **said)
    four.agree(manifest, "west")
    goes_on(four, manifest)


def test_numbers_that_json_cannot_hold_are_refused(four: Hall) -> None:
    """2^53 units were kept, and no task could be written any more, also by the next process."""
    manifest = four.propose()
    four.coordinator.tick()
    peer = four.peers["west"]
    for text in ('"units":9007199254740992', '"units":1e400', '"units":Infinity'):
        right = peer.envelope(manifest)
        payload = base64.b64decode(right["payload"]).replace(b'"units":24', text.encode())
        signed = resigned(peer, payload)
        with pytest.raises(RequestError, match="party/west"):
            four.coordinator.answer(peer.uri, manifest.id, signed)


def resigned(peer: Peer, payload: bytes) -> dict[str, Any]:
    return dsse.sign(payload, ANSWER_TYPE, peer.key)


def test_an_answer_that_an_earlier_version_kept_counts_as_none(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest, *THREE)
    peer = four.peers["west"]
    payload = base64.b64decode(peer.envelope(manifest)["payload"])
    signed = resigned(peer, payload.replace(b'"units":24', b'"units":9007199254740992'))
    with four.system.kernel.store.transaction() as conn:
        register.keep_answer(conn, manifest.id, peer.uri, signed)
    four.begin()
    four.coordinator.tick()
    assert four.instruction("west", manifest)["kind"] == "manifest"  # it is asked again
    four.agree(manifest)
    goes_on(four, manifest)


def test_a_sites_reason_does_nothing_to_the_terminal(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest, *THREE)
    reason = "\x1b[2J\rno\nfed-1: done\u202e" + "x" * 5000
    four.answer("west", manifest, accepted=False, reason=reason, units=0)
    (line,) = [line for line in four.told if "does not take part" in line]
    assert line.isprintable()
    assert len(line) < 500
    shown = four.system.federation.facts(manifest.id)["sites"][3]["reason"]
    assert shown.isprintable()


MANY = sorted(f"spiffe://research.example/party/s{n}" for n in range(257))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"purpose": "\x1b[2J"}, "purpose"),
        (
            {
                "sites": MANY,
                "minimum_sites": 200,
                "aggregation": {"kind": "masked", "threshold": 200, "bits": 24},
            },
            "does not fit 32 bits",
        ),
    ],
)
def test_a_manifest_that_must_not_run_any_more_ends_its_own_job(
    four: Hall, fields: dict[str, Any], why: str
) -> None:
    """An earlier version took it; sums of too many sites stopped its clock for good."""
    manifest, wrong = four.propose(1), four.propose(2, **fields)
    four.coordinator.tick()
    assert four.job(wrong).state is FederatedState.FAILED
    assert why in str(four.job(wrong).error)
    four.agree(manifest)
    goes_on(four, manifest)


def test_what_nobody_expected_ends_one_job(four: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy, ill = four.propose(1), four.propose(2)
    begin = coordinated_round.begin

    def faulty(run: Any, *rest: Any) -> None:
        if run.job.id == ill.id:
            raise ValueError("a patient's name")
        begin(run, *rest)

    monkeypatch.setattr(coordinated_round, "begin", faulty)
    four.agree(healthy)
    four.agree(ill)
    job = four.job(ill)
    assert (job.state, job.error) == (FederatedState.FAILED, "ValueError")
    goes_on(four, healthy)
    with pytest.raises(UnknownJob):
        four.answer("east", ill)


def test_a_full_disk_loses_no_round(four: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is there, its checkpoint is not: it is kept as soon as there is room."""
    manifest = four.propose()
    four.agree(manifest)
    put = Vault.put

    def full(*_: Any) -> str:
        raise StorageFull("there is no room")

    with monkeypatch.context() as patch:
        patch.setattr(Vault, "put", full)
        four.round(manifest)  # no site is refused for it
        for _ in range(3):
            four.coordinator.tick()
    assert Vault.put is put
    assert four.job(manifest).rounds_done == 0
    assert [line for line in four.told if "there is no room" in line] == [
        f"{manifest.id}: cannot go on now and is tried again: there is no room"
    ]
    four.coordinator.tick()
    assert four.job(manifest).rounds_done == 1
    goes_on(four, manifest)


def test_a_round_that_is_not_recorded_leaves_no_checkpoint(
    four: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = four.propose()
    four.agree(manifest)

    def locked(*_: Any) -> None:
        raise StorageFull("locked")

    with monkeypatch.context() as patch:
        patch.setattr(register, "keep_round", locked)
        four.round(manifest)
        for _ in range(3):
            four.coordinator.tick()
    assert objects(four) == 0
    four.coordinator.tick()
    assert objects(four) == 1
    goes_on(four, manifest)
    assert objects(four) == 1


def objects(hall: Hall) -> int:
    """Return how many objects the vault has, by their keys."""
    with hall.system.kernel.vault._store.read() as conn:
        return int(conn.exec_driver_sql("SELECT count(*) FROM object_keys").scalar_one())


def test_a_home_that_cannot_write_keeps_its_jobs(
    four: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = four.propose()
    four.agree(manifest)
    goes_on(four, manifest)
    checkpoint = four.job(manifest).checkpoint

    def locked(*_: Any) -> None:
        raise StorageFull("locked")

    with monkeypatch.context() as patch:
        patch.setattr(register, "tell", locked)
        four.revoke("west")
        four.answer("east", manifest)  # the attempt begins again
        for _ in range(30):
            four.coordinator.tick()
    assert four.job(manifest).state is FederatedState.RUNNING
    assert four.job(manifest).checkpoint == checkpoint
    four.coordinator.tick()
    goes_on(four, manifest)
    assert four.told.count(f"{manifest.id}: round 2 of 5, attempt 2, 3 sites") == 1


def test_a_model_that_finds_no_room_is_published_later(
    four: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise StorageFull("there is no room")

    manifest = four.propose(**PLAIN, rounds=1)
    four.agree(manifest)
    with monkeypatch.context() as patch:
        patch.setattr(publish_federated, "at_coordinator", full)
        four.round(manifest)
        for _ in range(3):
            four.coordinator.tick()
            ended(manifest)
    job = four.job(manifest)
    assert (job.state, job.rounds_done) == (FederatedState.RUNNING, 1)
    assert job.checkpoint is not None
    assert len([line for line in four.told if "no room" in line]) == 1
    four.coordinator.tick()
    ended(manifest)
    assert "tiny" in str(four.job(manifest).error)  # this home has no model to put it on


def ended(manifest: Manifest) -> None:
    """Wait for what publishes a job's model."""
    for thread in threading.enumerate():
        if thread.name == manifest.id:
            thread.join()


def test_a_changed_checkpoint_ends_its_own_job(four: Hall) -> None:
    healthy, ill = four.propose(1), four.propose(2)
    for manifest in (healthy, ill):
        four.agree(manifest)
        goes_on(four, manifest)
    checkpoint = str(four.job(ill).checkpoint)
    path = four.system.kernel.config.home / "objects" / checkpoint[:2] / checkpoint
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    four.begin()
    four.coordinator.tick()
    assert four.job(ill).state is FederatedState.FAILED
    for name in four.peers:
        assert four.instruction(name, healthy)["kind"] == "wait"  # now they were heard of
    four.coordinator.tick()
    goes_on(four, healthy)
    assert four.job(healthy).rounds_done == 2


def test_a_revoked_site_is_left_out(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest)
    goes_on(four, manifest)
    four.round(manifest)  # the second; the third attempt has begun with all four
    four.revoke("west")
    four.answer("east", manifest)  # so that an attempt begins while west was just heard of
    assert four.job(manifest).state is FederatedState.RUNNING
    task = task_of(four.instruction("east", manifest))
    assert set(task.participants) == {four.peers[name].uri for name in THREE}
    four.round(manifest, *THREE)
    assert four.job(manifest).rounds_done == 3


def lie(phase: str, body: bytes) -> bytes:
    """Give one wrong share."""
    if phase != masked_round.UNMASK:
        return body
    message = json.loads(body)
    owner = min(message["self_masks"])
    message["self_masks"][owner] = base64.b64encode(bytes(33)).decode()
    return json.dumps(message).encode()


def test_a_false_share_costs_one_attempt(four: Hall) -> None:
    """Seen at the last message, whose site is honest and refused nothing."""
    manifest = four.propose()
    four.agree(manifest)
    for _ in range(4):
        four.phase(manifest)
    four.step("north", manifest, lie)
    four.phase(manifest, "east", "south", "west")
    begins_again(four, manifest)


def test_a_false_share_that_the_clock_finds_costs_one_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hall(tmp_path, ("center", "east", "north", "south", "west")) as five:
        manifest = five.propose()
        five.agree(manifest)
        for _ in range(4):
            five.phase(manifest)
        five.step("north", manifest, lie)
        five.phase(manifest, "east", "south", "west")
        with monkeypatch.context() as patch:
            patch.setattr(running_federation, "PHASE_S", 0.0)  # center is late
            five.coordinator.tick()
        begins_again(five, manifest)


def begins_again(hall: Hall, manifest: Manifest) -> None:
    (why,) = hall.records("aborted")
    assert "cannot be unmasked: the shares that" in why
    assert hall.records("refused") == []
    hall.coordinator.tick()
    goes_on(hall, manifest)
    assert hall.records("attempts") == [2]


def test_who_has_helped_to_unmask_one_sum_is_asked_for_the_same_one(four: Hall) -> None:
    """Three of four gave an input; the sum of these three is what they may unmask."""
    manifest = four.propose()
    four.agree(manifest)
    for _ in range(2):
        four.phase(manifest)
    four.phase(manifest, *THREE)
    run = four.coordinator._running[manifest.id]
    assert run.attempt is not None
    run.attempt.close_phase()  # west is late
    four.phase(manifest, *THREE)
    four.answer("east", manifest)  # its agent began anew
    four.coordinator.tick()
    task = task_of(four.instruction("east", manifest))
    assert set(task.participants) == {four.peers[name].uri for name in THREE}
    four.round(manifest, *THREE)
    assert four.job(manifest).rounds_done == 1
    task = task_of(four.instruction("east", manifest))
    assert len(task.participants) == 4  # a new round


def test_a_site_that_comes_back_again_and_again_is_left_out(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest)
    for _ in range(21):
        four.instruction("west", manifest)
        four.answer("west", manifest)
        four.coordinator.tick()
    assert four.job(manifest).state is FederatedState.RUNNING
    task = task_of(four.instruction("east", manifest))
    assert four.peers["west"].uri not in task.participants
    assert task.attempt == 5
    four.round(manifest, *THREE)
    assert four.job(manifest).rounds_done == 1
    four.coordinator.tick()
    assert len(task_of(four.instruction("west", manifest)).participants) == 4


def test_a_site_that_is_needed_is_waited_for(tmp_path: Path) -> None:
    with hall(tmp_path, THREE) as three:
        manifest = three.propose()
        three.agree(manifest)
        for _ in range(21):
            three.answer("south", manifest)
            three.coordinator.tick()
        assert three.job(manifest).state is FederatedState.RUNNING
        assert task_of(three.instruction("south", manifest)).attempt == 4
        three.round(manifest)
        assert three.job(manifest).rounds_done == 1


def test_a_no_is_heard_once(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest)
    for _ in range(21):
        four.answer("west", manifest, accepted=False, units=0)
        four.coordinator.tick()
    assert task_of(four.instruction("east", manifest)).attempt == 2
    four.round(manifest, *THREE)
    assert four.job(manifest).rounds_done == 1


def test_a_cancelled_job_leaves_no_checkpoint(four: Hall) -> None:
    manifest = four.propose()
    four.agree(manifest)
    goes_on(four, manifest)
    assert objects(four) == 1
    four.system.federation.cancel(manifest.id, reason="enough")
    assert objects(four) == 0
    four.coordinator.tick()
    assert four.instruction("east", manifest)["state"] == "cancelled"


def test_a_message_that_comes_too_late_is_not_called_too_large(four: Hall) -> None:
    manifest = four.propose(**PLAIN)
    four.agree(manifest)
    task = task_of(four.instruction("west", manifest))
    west = four.peers["west"].uri
    assert four.coordinator.largest_body(west, manifest.id, 0, 1, "upload") > 0
    four.round(manifest)
    with pytest.raises(UpdateRefused, match="came too late: round 0, attempt 1 is over"):
        four.coordinator.largest_body(west, task.job, task.round, task.attempt, "upload")
    (why,) = four.records("refused")
    assert why == west


def test_a_masked_update_that_was_sent_twice_is_as_long_as_before(four: Hall) -> None:
    """Its answer was lost, and the next phase has begun: it is read and taken for what it is."""
    manifest = four.propose(parameters=3_000_000)
    four.agree(manifest)
    west, uploads = four.peers["west"].uri, []

    def kept(phase: str, body: bytes) -> bytes:
        uploads.append((phase, body))
        return body

    for _ in range(3):
        four.phase(manifest, change=kept)
    phase, body = uploads[-1]
    assert phase == "upload"
    task = task_of(four.instruction("west", manifest))
    assert len(body) <= four.coordinator.largest_body(west, manifest.id, 0, 1, "upload")
    four.send("west", task, phase, body)
