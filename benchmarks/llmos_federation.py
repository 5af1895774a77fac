"""A federation of LLMOS on loopback: a coordinator and three sites, real homes and processes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llmos
from flower_federation import Link, free_port, start_links
from llmos.cli.place import Place
from llmos.data.hospitals import Hospital

ORGANISATION: Final = "research.example"
MODEL: Final = "smollm2-135m"
_LOOK_S: Final = 0.2
Json = dict[str, Any]


@dataclass
class Federation:
    """The homes, their processes, and a forwarder before each site that counts its bytes."""

    coordinator: Place
    sites: Mapping[str, Place]
    links: Sequence[Link]

    def run(self, job: Json, timeout_s: float = 3600.0) -> Json:
        """Run one job to its end and return its figures by round."""
        began = time.time()
        coordinator = llmos.open(self.coordinator.home)
        facts = coordinator.federation.propose(job | {"sites": sorted(self.sites)})
        job_id = str(facts["id"])
        for site in self.sites.values():
            site.wait_for(f"{job_id} waits for a steward")
            llmos.open(site.home).federation.approve(job_id)
        self.coordinator.wait_for(rf"{job_id}: (done|failed)", timeout_s=timeout_s)
        for site in self.sites.values():
            site.wait_for(f"{job_id} is (done|failed)")
        facts = coordinator.federation.facts(job_id)
        if facts["state"] != "done":
            raise SystemExit(f"{job_id} is {facts['state']}: {facts['error']}")
        return self._figures(facts, began)

    def _figures(self, facts: Json, began: float) -> Json:
        pattern = re.compile(rf"{facts['id']}: trained in ([0-9.]+) s")
        trained = [
            [float(seconds) for seconds in pattern.findall(site.printed())]
            for site in self.sites.values()
        ]
        passed = [link.bytes_between(began, time.time()) for link in self.links]
        rounds = []
        for row in facts["rounds"]:
            seconds = [site[row["round"]] for site in trained]
            rounds.append(
                {
                    "wall_s": row["seconds"],
                    "slowest_train_s": max(seconds),
                    "wall_to_train": round(row["seconds"] / max(seconds), 3),
                    "train_s": seconds,
                    "attempts": row["attempts"],
                    "message_bytes_up": sorted(row["bytes_up"].values()),
                }
            )
        count = len(rounds)
        return {
            "parameters": facts["manifest"]["parameters"],
            "rounds": rounds,
            # TLS, questions and answers of the whole job are in it
            "bytes_up": [up // count for up, _ in passed],
            "bytes_down": [down // count for _, down in passed],
        }

    def adapter(self, name: str) -> dict[str, bytes]:
        """Return a trained adapter's files as the coordinator exports them."""
        folder = self.coordinator.home.with_name(f"export-{name}")
        llmos.open(self.coordinator.home).export(name, folder)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def federation(folder: Path, hospitals: Sequence[Hospital]) -> Iterator[Federation]:
    """Make the homes, import each site's notes, start everything, and stop it at the end."""
    coordinator = Place("coordinator", folder / "coordinator")
    sites = {one.name: Place(one.name, folder / one.name) for one in hospitals}
    for place in (coordinator, *sites.values()):
        llmos.create(place.home).pull(MODEL)
        (place.home / "llmos.toml").write_text("threads = 1\n")  # three sites share two cores
    for one in hospitals:
        llmos.open(sites[one.name].home).import_data(
            one.write(folder),
            name="notes",
            unit="patient_id",
            text="text",
            classification="synthetic",
            epsilon=30,
            delta=1e-4,
        )
    port = free_port()
    links, ports = start_links(port)
    try:
        coordinator.start("coordinator", "up", "--organisation", ORGANISATION, "--port", str(port))
        coordinator.wait_for(r"coordinator of \S+ at https")
        for (name, place), link_port in zip(sites.items(), ports, strict=True):
            token = llmos.open(coordinator.home).parties.invite(name).text
            token_file = folder / f"{name}.token"
            token_file.write_text(token)
            url = f"https://127.0.0.1:{link_port}"
            place.start("site", "join", url, "--token-file", str(token_file))
        yield Federation(coordinator, sites, links)
    finally:
        for place in (*sites.values(), coordinator):
            place.stop()
