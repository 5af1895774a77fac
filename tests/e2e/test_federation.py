"""Federated training by real processes: a coordinator and three sites, each with its own home."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.federations import Federation, federation
from tests.homes import opened, run_llmos

from llmos.kernel.budget import ReservationState
from llmos.models.runtimes import Runtimes
from llmos.workflows import chat
from llmos.workflows.chat import ChatRequest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # four homes, six processes


def settled(federated: Federation, name: str, job: str) -> tuple[ReservationState, int]:
    """Return what a site's ledger says about a job, after its books and log were checked."""
    with opened(federated.sites[name].home) as system:
        system.log.verify()
        reservation = system.kernel.budget.reservation(job)
        pool = system.kernel.budget.pool("notes")
        balance = system.kernel.budget.recompute("notes")
        assert (balance.spent, balance.held) == (pool.spent, pool.held)
        return reservation.state, reservation.steps_done


def actions(home: Path) -> list[tuple[str, str, str]]:
    """Return actor, action and outcome of the entries of a home's log about federated jobs."""
    listed = json.loads(run_llmos(home, "log", "show", "--limit", "200", "--json").stdout)
    return [
        (str(entry["actor"]), str(entry["action"]), str(entry["outcome"]))
        for entry in listed
        if entry["action"] in {"federate", "coordinate"}
    ]


def test_three_hospitals_train_one_model_whose_updates_nobody_sees(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with federation(tmp_path, tiny_model_folder) as federated:
        job = federated.propose(epsilon=6, delta=1e-5, rounds=3)
        # nobody has approved it: a site has opened nothing and answered nothing
        for site in federated.sites.values():
            site.saw(f"{job} waits for a steward")
            assert not [one for one in actions(site.home) if one[1] == "federate"]
        federated.approve(job, "east", "north")
        federated.coordinator.saw(f"{job}: .*/north takes part")
        assert federated.facts(job)["rounds_done"] == 0  # two of three: a sum would show too much
        federated.approve(job, "south")
        federated.coordinator.saw(f"{job}: round 1 done")
        # killed in the middle: coordinator and a site come back and go on by themselves
        federated.coordinator.kill()
        federated.sites["east"].kill()
        federated.up()
        federated.sites["east"].start("site", "up")
        facts = federated.finished(job)
        assert (facts["state"], facts["rounds_done"]) == ("done", 3)
        assert all(len(row["sites"]) == 3 for row in facts["rounds"])
        hashes = [(row["weights_before"], row["weights_after"]) for row in facts["rounds"]]
        assert all(a[1] == b[0] for a, b in pairwise(hashes))
        digests, keys = set(), {}
        for name, site in federated.sites.items():
            site.saw(f"{job}: stated what was spent")
            site.interrupt()
            state, steps = settled(federated, name, job)
            assert state is ReservationState.COMMITTED
            assert 3 * 4 <= steps <= 5 * 4  # the spare rounds are there for the killed one
            with opened(site.home) as system:
                entry = system.registry.model("notes-federated")
                digests.add(entry.digest)
                assert 0 < entry.card["epsilon"] <= 6
                keys[name] = tmp_path / f"{name}.pub"
                keys[name].write_text(system.kernel.public_keys)
            assert ("spiffe://research.example/authority", "federate", "settled") in actions(
                site.home
            )
        with opened(federated.coordinator.home) as system:
            digests.add(system.registry.model("notes-federated").digest)
        assert len(digests) == 1  # all four homes have the very same adapter
        certified(federated, keys, digests.pop())
        attacked(federated.sites["east"].home)
        personal(federated.sites["east"].home)


def test_three_hospitals_share_the_noise_of_one_model(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with federation(tmp_path, tiny_model_folder) as federated:
        job = federated.propose(
            epsilon=6, delta=1e-5, rounds=4, shared_noise=True, smallest_site=20
        )
        federated.approve(job)
        federated.coordinator.saw(f"{job}: round 1 done")
        federated.sites["north"].kill()  # comes back with the noise that it has added already
        federated.sites["north"].start("site", "up")
        facts = federated.finished(job)
        assert (facts["state"], facts["rounds_done"]) == ("done", 4)
        keys = {}
        for name, site in federated.sites.items():
            site.saw(f"{job}: stated what was spent")
            site.interrupt()
            state, steps = settled(federated, name, job)
            assert state is ReservationState.COMMITTED
            assert 4 <= steps <= 6
            with opened(site.home) as system:
                assert 0 < system.registry.model("notes-federated").card["epsilon"] <= 6
                keys[name] = tmp_path / f"{name}.pub"
                keys[name].write_text(system.kernel.public_keys)
        with opened(federated.coordinator.home) as system:
            certified(federated, keys, system.registry.model("notes-federated").digest)
        refused = run_llmos(
            federated.sites["east"].home, "measure", "notes-federated", "--inversion"
        )
        assert refused.returncode != 0
        assert "shared noise" in refused.stderr


def certified(federated: Federation, keys: dict[str, Path], digest: str) -> None:
    """Certify the model, verify it offline by everybody's keys, and be refused for a wrong one."""
    home = federated.coordinator.home
    written = json.loads(run_llmos(home, "report", "notes-federated", "--json").stdout)
    sites = [f"--site={name}={path}" for name, path in keys.items()]
    verified = run_llmos(federated.folder, "verify", written["certificate"], *sites, "--json")
    said = json.loads(verified.stdout)
    assert said["sha256"] == digest
    assert 0 < said["epsilon"] <= 6
    assert [line.partition(":")[0] for line in said["site"]] == ["east", "north", "south"]
    assert all("4 entries of its log proven; its own keys were" in line for line in said["site"])
    assert "verified" in Path(written["page"]).read_text()
    swapped = run_llmos(
        federated.folder, "verify", written["certificate"], f"--site=east={keys['north']}"
    )
    assert swapped.returncode != 0
    assert "east has signed with other keys" in swapped.stderr


def attacked(home: Path) -> None:
    """Let a site attack its own messages: in the clear they tell tokens, behind the mask none."""
    said = json.loads(run_llmos(home, "measure", "notes-federated", "--inversion", "--json").stdout)
    (found,) = said["inversion"]
    recall = {arm["observation"]: arm["recall"] for arm in found["report"]["arms"]}
    assert found["report"]["verdict"] == "pass"
    assert recall["gradient"] > 0.9
    assert found["report"]["noise_multiplier"] > 0
    assert Path(found["file"]).exists()


def personal(home: Path) -> None:
    """Let a site train on top of the federated model, on its own notes, and talk to the result."""
    typed = ["--data", "notes", "--model", "notes-federated", "--epsilon", "1", "--delta", "1e-5"]
    settings = ["--steps", "4", "--batch", "8", "--rank", "4", "--max-tokens", "32"]
    trained = run_llmos(home, "train", *typed, *settings, "--json")
    assert trained.returncode == 0, trained.stderr
    said = json.loads(trained.stdout)
    assert said["model"] == "notes-federated-personal"
    assert said["plan"]["epsilon_in_all"] > said["plan"]["epsilon_pld"]
    shown = json.loads(run_llmos(home, "model", "show", said["model"], "--json").stdout)
    assert shown["base"] == "tiny"
    assert shown["card"]["epsilon"] == pytest.approx(said["plan"]["epsilon_in_all"])
    asked = ChatRequest(said["model"], ({"role": "user", "content": "Asthma?"},), max_tokens=4)
    with opened(home) as system:
        runtimes = Runtimes(system.registry, torch.device("cpu"))
        with chat.run(asked, system.who, system.parts, runtimes) as answer:
            assert list(answer)


def test_a_steward_withdraws_and_what_was_run_stays_charged(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    with federation(tmp_path, tiny_model_folder, classification="synthetic") as federated:
        job = federated.propose(
            epsilon=6, delta=1e-5, rounds=60, secure_aggregation=False, minimum_sites=2
        )
        federated.approve(job)
        federated.coordinator.saw(f"{job}: round 2 done")
        north = federated.sites["north"]
        done = run_llmos(north.home, "site", "withdraw", job, "--reason", "a patient objected")
        assert done.stdout == f"{job} is withdrawn\n"
        federated.coordinator.saw("north does not take part: a patient objected")
        rounds = federated.facts(job)["rounds_done"]
        federated.coordinator.saw(f"{job}: round {rounds + 2} done")  # the two others go on
        north.interrupt()
        state, steps = settled(federated, "north", job)
        assert state is ReservationState.COMMITTED
        assert 0 < steps <= 4 * (rounds + 2)
        cancelled = run_llmos(
            federated.coordinator.home, "federate", "cancel", job, "--reason", "enough"
        )
        assert cancelled.stdout == f"{job} is cancelled\n"
        for name in ("east", "south"):
            federated.sites[name].saw(f"{job} is failed: the coordinator says: cancelled")
            federated.sites[name].interrupt()
            assert settled(federated, name, job)[0] is ReservationState.COMMITTED
