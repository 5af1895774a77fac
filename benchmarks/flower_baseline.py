"""Plain Flower as a baseline: federated LoRA of SmolLM2-135M at three sites, in real processes.

    python benchmarks/flower_baseline.py --model FOLDER --data FOLDER --cache FOLDER --json PATH

One SuperLink and three SuperNodes talk over TLS with SuperNode authentication, all on loopback and
without network; the application is `flower_app`, written as Flower's and PEFT's documentation show.
Two things vary: an array for each LoRA tensor or all parameters packed into one array, and the
SuperLink's state in memory, as is its default, or in a file. What a site sends is counted in a TCP
forwarder before its SuperNode, TLS included. Each arm has a federation of its own; one that fails
(under load the state's file is found locked) is tried again, and the failure is written down.

Two more things are shown by doing them: whether somebody who has the CA certificate and nothing
else can run `flower_unapproved` at the sites, and whether a run outlives a `kill -9` of the
SuperLink. Flower gets an environment of its own, kept in the cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flower_federation import (
    PACKAGES,
    SITES,
    Federation,
    Ground,
    Link,
    RunFailed,
    federation,
    install,
    wait_until,
)
from llmos.models.devices import compute_dtype

APP = Path(__file__).with_name("flower_app")
UNAPPROVED = Path(__file__).with_name("flower_unapproved")
ARRAYS = {"one array a tensor": False, "one packed array": True}
STATES = {"in memory": False, "in a file": True}
ATTEMPTS = 2
Json = dict[str, Any]


def write_demo_data(folder: Path) -> None:
    """Write sentences in the style of a clinic's notes, the same ones every time, for each site."""
    who = ("A 54-year-old woman", "A 61-year-old man", "A 38-year-old nurse", "A retired teacher")
    has = ("chest pain on exertion", "a dry cough", "joint pain", "blurred vision", "night sweats")
    found = ("a raised troponin", "clear lungs", "a swollen knee", "an HbA1c of 8.1 %", "anaemia")
    given = ("aspirin", "rest and fluids", "naproxen", "metformin", "a referral to haematology")
    for site in range(SITES):
        lines = []
        for note in range(240):
            drawn = hashlib.sha256(f"{site} {note}".encode()).digest()
            words = [part[drawn[n] % len(part)] for n, part in enumerate((who, has, found, given))]
            text = "{} came with {} for {} days. The examination showed {}; the plan is {}."
            text = text.format(*words[:2], drawn[4] % 30 + 2, *words[2:])
            lines.append(json.dumps({"text": text}) + "\n")
        (folder / f"site{site}.jsonl").write_text("".join(lines))


class Report:
    """What a ServerApp wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def events(self, name: str) -> list[Json]:
        """Return the events of one kind."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, name: str, count: int, parts: Federation, run: str) -> None:
        """Wait for an event; fail when the run is over without it."""
        while len(self.events(name)) < count:
            try:  # asking starts a program, which would take time from what is measured
                wait_until(lambda: len(self.events(name)) >= count, name, timeout_s=90)
            except TimeoutError:
                status = parts.status(run)
                if status.startswith("finished") and len(self.events(name)) < count:
                    raise RunFailed(
                        f"{status} before '{name}'; in the SuperLink's log 'database is locked' "
                        f"stands {locked(parts)} times"
                    ) from None


def locked(parts: Federation) -> int:
    """Count how often the SuperLink could not write its state."""
    return (parts.folder / "superlink.log").read_text().count("database is locked")


def application_settings() -> Json:
    """Return the application's settings; it computes in the number format that LLMOS takes here."""
    settings: Json = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    # many CPUs only emulate bfloat16
    return settings | {"dtype": str(compute_dtype(torch.device("cpu"))).removeprefix("torch.")}


def submit(parts: Federation, name: str, settings: Json) -> tuple[str, Report]:
    """Submit the LoRA application."""
    path = parts.folder / f"{name}.jsonl"
    config = {**settings, "model": str(parts.ground.model), "report": str(path)}
    return parts.run(APP, config), Report(path)


def attempt(ground: Ground, folder: Path, state: str, work: Callable[[Federation], Json]) -> Json:
    """Do something in a new federation, and again in another one when Flower gives up."""
    failures: list[str] = []
    while len(failures) < ATTEMPTS:
        own = folder / f"federation{len(list(folder.glob('federation*')))}"
        try:
            with federation(ground, own, durable=STATES[state]) as (parts, setup_s):
                figures = work(parts)
        except (RunFailed, TimeoutError) as error:
            failures.append(str(error))
        else:
            return {"setup_s": setup_s, "failures": failures, **figures}
    return {"failures": failures}


def run_rounds(parts: Federation, settings: Json) -> Json:
    """Run all rounds and return their figures."""
    load_before, submitted = os.getloadavg()[0], time.time()
    run, report = submit(parts, "report", settings)
    report.wait_for("done", 1, parts, run)
    began, ended = report.events("round began"), report.events("round ended")
    done = report.events("done")[0]["time_s"]
    built = report.events("built")[0]
    starts = [event["time_s"] for event in began]
    return {
        "arrays": built["arrays"],
        "parameters": built["parameters"],
        "submit_to_first_round_s": round(starts[0] - submitted, 1),
        "rounds": [
            round_figures(parts.links, start, until, event)
            for start, until, event in zip(starts, [*starts[1:], done], ended, strict=True)
        ],
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }


def round_figures(links: list[Link], start: float, until: float, ended: Json) -> Json:
    """Return the figures of one round; bytes count until the next one begins."""
    sites = sorted(ended["sites"], key=lambda site: int(site["site"]))
    if len(sites) != SITES:
        raise RunFailed(f"only {len(sites)} sites answered: {ended['errors']}")
    wall_s = ended["time_s"] - start
    train_s = max(site["train_s"] for site in sites)
    passed = [link.bytes_between(start, until) for link in links]
    return {
        "wall_s": round(wall_s, 2),
        "slowest_train_s": round(train_s, 2),
        "wall_to_train": round(wall_s / train_s, 2),
        "train_s": [round(site["train_s"], 2) for site in sites],
        "build_s": [round(site["build_s"], 2) for site in sites],
        "bytes_up": [up for up, _ in passed],
        "bytes_down": [down for _, down in passed],
        "loss_first": [round(site["loss_first"], 4) for site in sites],
        "loss_last": [round(site["loss_last"], 4) for site in sites],
    }


def run_unapproved(parts: Federation) -> Json:
    """Submit a stranger's code from a home that has the CA's certificate and nothing else."""
    home = parts.home("stranger", parts.folder / "ca.pem")
    files = sorted(path.name for path in home.iterdir())
    path = parts.folder / "seen.json"
    run = parts.run(UNAPPROVED, {"seen": str(path)}, home)
    with suppress(TimeoutError):
        wait_until(path.exists, "the stranger's code does not answer", 150)
    seen = json.loads(path.read_text()) if path.exists() else []
    told = {answer["site"]: answer["sha256"] for answer in seen}
    true = {site: sha256(data) for site, data in enumerate(parts.ground.data)}
    return {
        "executed_on_all_sites": told == true,
        "shown_by": "`flwr run` of benchmarks/flower_unapproved; each site's process sent back the "
        "SHA-256 of that site's records, equal to the one of the file",
        "what_the_stranger_had": files,
        "records_read": {f"site{answer['site']}": answer["records"] for answer in seen},
        "status": parts.status(run),
    }


def kill_mid_round(parts: Federation, settings: Json) -> Json:
    """Kill the SuperLink while the sites are in round 2, start it again and see what is left."""
    run, report = submit(parts, "killed", settings)
    report.wait_for("round began", 2, parts, run)
    time.sleep(5)  # the sites have their orders
    parts.kill_superlink()
    time.sleep(2)
    before = len(report.events("round ended"))
    parts.start_superlink()
    with suppress(TimeoutError):
        wait_until(lambda: parts.status(run).startswith("finished"), "the run goes on", 300)
    status = parts.status(run)
    return {
        "run_lost": status != "finished:completed",
        "shown_by": "kill -9 of the SuperLink's process in round 2 of 3, started again after 2 s "
        "with the same database",
        "status_after": status,
        "rounds_done_before": before,
        "rounds_done_after": len(report.events("round ended")),
        "database_is_locked": locked(parts),  # in the log; another reason why runs fail
    }


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine() -> Json:
    """Describe what this ran on."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": PACKAGES,
        "load_average": os.getloadavg(),
    }


def table(arms: list[Json]) -> str:
    """Lay the figures out."""
    heads = ("round", "wall s", "train s", "ratio", "MB up/site", "MB down/site")
    lines = [f"{'arm':32}" + "".join(f"{head:>13}" for head in heads)]
    for arm in arms:
        name = f"{arm['arrays_sent']}, {arm['superlink_state']}"
        lines += [f"{name:32} failed: {failure}" for failure in arm["failures"]]
        for number, row in enumerate(arm.get("rounds", []), 1):
            up, down = (sum(row[way]) / SITES / 1e6 for way in ("bytes_up", "bytes_down"))
            lines.append(
                f"{name:32}{number:13}{row['wall_s']:13.1f}{row['slowest_train_s']:13.1f}"
                f"{row['wall_to_train']:13.2f}{up:13.2f}{down:13.2f}"
            )
    return "\n".join(lines)


def experiment(options: argparse.Namespace, folder: Path) -> Json:
    """Do everything once."""
    settings = application_settings()
    settings |= {"rounds": options.rounds, "steps": options.steps, "threads": options.threads}
    data = options.data
    if data is None:
        data = folder / "data"
        data.mkdir()
        write_demo_data(data)
    files = sorted(data.resolve().glob("*.jsonl"))
    if len(files) != SITES:
        raise SystemExit(f"{data} has {len(files)} JSONL files, {SITES} are needed")
    ground = Ground(install(options.cache.resolve()), options.model.resolve(), files)
    result: Json = {
        "machine": machine(),
        "settings": {name: value for name, value in settings.items() if value != ""},
        "model_sha256": sha256(options.model / "model.safetensors"),
        "data_sha256": {file.name: sha256(file) for file in files},
        "demo_data": options.demo_data,
        "arms": [],
    }
    for state, arrays in product(STATES, ARRAYS):
        arm = settings | {"packed": ARRAYS[arrays]}
        figures = attempt(ground, folder, state, partial(run_rounds, settings=arm))
        result["arms"].append({"superlink_state": state, "arrays_sent": arrays, **figures})
    if not options.speed_only:
        packed = settings | {"packed": True, "rounds": 3}
        result["unapproved_job"] = attempt(ground, folder, "in memory", run_unapproved)
        result["coordinator_kill"] = attempt(
            ground, folder, "in a file", partial(kill_mid_round, settings=packed)
        )
    return result


def main() -> None:
    """Measure, print the figures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face's format")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help='folder with a JSONL of {"text": ...} a site')
    source.add_argument("--demo-data", action="store_true", help="made-up notes of clinics")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/llmos/benchmarks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a site's training")
    parser.add_argument("--speed-only", action="store_true", help="no stranger, no kill")
    parser.add_argument("--keep", type=Path, help="keep keys, logs and reports in this new folder")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.keep is not None:
            options.keep.mkdir(parents=True)
            folder = options.keep.resolve()
        result = experiment(options, folder)
    result["seconds"] = round(time.monotonic() - began)
    text = json.dumps(result, indent=2)
    print(f"{text}\n{table(result['arms'])}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
