"""What a round of secure aggregation costs with 10 to 100 sites: three rounds of each, one process.

Sites are simulated one after another and the coordinator adds their masked vectors as they come, so
that a handful of vectors are held, however many sites there are. Every round's sum is compared with
the plain one. Times are this process's processor time: other programs share the cores.

With masks between all pairs, the work of one site and that of the coordinator grow linearly with
the number of sites n. Sites work side by side, so that the slowest site plus the coordinator is
what a round costs: `round_s`, and the line that is fitted. The work of all sites together, `all_s`,
grows with n^2. The network is not in it: bytes are counted instead. `with_dropouts` is one round in
which a tenth of the sites fail after sharing keys: the coordinator takes off n masks for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from llmos.engines.federated.aggregator import Aggregator
from llmos.engines.federated.codec import Encoding, Header
from llmos.engines.federated.fixed_point import (
    FixedPoint,
    fresh_generator,
    from_residues,
    to_residues,
)
from llmos.engines.federated.messages import Message
from llmos.engines.federated.secure_aggregation import Participant
from llmos.engines.federated.session import Session, default_threshold

SITES = (10, 25, 50, 100)
ENTRIES = 1_843_200  # of SmolLM2-135M's LoRA adapter, rank 16 on q, k, v and o
ROUNDS = 3
BITS = 16
LAYOUT = hashlib.sha256(b"benchmark").digest()
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Costs:
    """Processor seconds and bytes of one round."""

    sites: dict[str, float]
    coordinator: float = 0.0
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    def site(self, name: str, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Charge a site for an act."""
        began = time.process_time()
        result = act(*args, **kwargs)
        self.sites[name] = self.sites.get(name, 0.0) + time.process_time() - began
        return result

    def server(self, act: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Charge the coordinator for an act."""
        began = time.process_time()
        result = act(*args, **kwargs)
        self.coordinator += time.process_time() - began
        return result

    def sent(self, name: str, message: Message | bytes) -> None:
        """Count what a site sends."""
        self.up[name] = self.up.get(name, 0) + _size(message)

    def received(self, name: str, message: Message) -> None:
        """Count what a site is sent."""
        self.down[name] = self.down.get(name, 0) + _size(message)


def _size(message: Message | bytes) -> int:
    if isinstance(message, bytes):
        return len(message)
    return len(json.dumps(message.to_dict()))


def one_round(keys: dict[str, Ed25519PrivateKey], number: int, dropouts: int) -> Costs:
    """Run the whole protocol once and check its sum; the last `dropouts` sites give no input."""
    fixed = FixedPoint(limit=0.1, bits=BITS, sites=len(keys))
    header = Header(Encoding.INTEGERS, LAYOUT, ENTRIES, number, 0, fixed.modulus_bits)
    session = Session("benchmark", tuple(keys), default_threshold(len(keys)), header)
    public = {site: key.public_key() for site, key in keys.items()}

    def verify(site: str, message: bytes, signature: bytes) -> bool:
        try:
            public[site].verify(signature, message)
        except InvalidSignature:
            return False
        return True

    costs = Costs({})
    coordinator = Aggregator(session, verify)
    sites = {
        site: costs.site(site, Participant, session, site, sign=key.sign, verify=verify)
        for site, key in keys.items()
    }
    for site, participant in sites.items():
        advertisement = costs.site(site, participant.advertise)
        costs.sent(site, advertisement)
        costs.server(coordinator.add_advertisement, advertisement)
    roster = costs.server(coordinator.roster)
    for site, participant in sites.items():
        costs.received(site, roster)
        shares = costs.site(site, participant.share_keys, roster)
        costs.sent(site, shares)
        costs.server(coordinator.add_shares, shares)
    for site in list(sites)[len(sites) - dropouts :]:
        del sites[site]
    expected = _send_inputs(costs, coordinator, sites, fixed)
    survivors = costs.server(coordinator.survivors)
    for site, participant in sites.items():
        costs.received(site, survivors)
        signature = costs.site(site, participant.sign_survivors, survivors)
        costs.sent(site, signature)
        costs.server(coordinator.add_signature, signature)
    signatures = costs.server(coordinator.signatures)
    for site, participant in sites.items():
        costs.received(site, signatures)
        unmasking = costs.site(site, participant.unmask, signatures)
        costs.sent(site, unmasking)
        costs.server(coordinator.add_unmasking, unmasking)
    total = costs.server(coordinator.total)
    costs.server(from_residues, total, fixed)
    assert np.array_equal(total, expected & np.uint32(2**fixed.modulus_bits - 1))
    return costs


def _send_inputs(
    costs: Costs, coordinator: Aggregator, sites: dict[str, Participant], fixed: FixedPoint
) -> NDArray[np.uint32]:
    """Mask and send one site's vector after the other; return their plain sum mod 2^32."""
    expected = np.zeros(ENTRIES, dtype=np.uint32)
    deliveries = costs.server(coordinator.deliveries)
    for site, participant in sites.items():
        update = np.random.default_rng().normal(scale=0.02, size=ENTRIES).astype(np.float32)
        residues = costs.site(site, to_residues, update, fixed, fresh_generator())
        expected += residues
        costs.received(site, deliveries[site])
        masked = costs.site(site, participant.mask, deliveries[site], residues)
        costs.sent(site, masked)
        costs.server(coordinator.add_input, site, masked)
    return expected


def measure(count: int, *, rounds: int = ROUNDS, dropouts: int = 0) -> dict[str, Any]:
    """Return the costs of rounds with this many sites; medians are over the rounds."""
    keys = {f"site-{n:03}": Ed25519PrivateKey.generate() for n in range(count)}
    runs = [one_round(keys, number, dropouts) for number in range(rounds)]
    slowest = [max(costs.sites.values()) for costs in runs]
    everything = [sum(costs.sites.values()) + costs.coordinator for costs in runs]
    per_round = [site + costs.coordinator for site, costs in zip(slowest, runs, strict=True)]
    return {
        "sites": count,
        "dropouts": dropouts,
        "threshold": default_threshold(count),
        "slowest_site_s": round(statistics.median(slowest), 3),
        "median_site_s": round(
            statistics.median(s for costs in runs for s in costs.sites.values()), 3
        ),
        "coordinator_s": round(statistics.median(c.coordinator for c in runs), 3),
        "round_s": round(statistics.median(per_round), 3),
        "round_s_of_each": [round(seconds, 3) for seconds in per_round],
        "all_s": round(statistics.median(everything), 3),
        "up_bytes_a_site": max(runs[0].up.values()),
        "down_bytes_a_site": max(runs[0].down.values()),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def line(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Fit a line to a cost by the number of sites (least squares)."""
    counts = np.array([row["sites"] for row in rows], dtype=np.float64)
    costs = np.array([row[name] for row in rows], dtype=np.float64)
    slope, intercept = np.polyfit(counts, costs, 1)
    rest = np.square(costs - (slope * counts + intercept)).sum()
    spread = np.square(costs - costs.mean()).sum()
    return {
        "seconds_a_site": round(float(slope), 5),
        "seconds_at_none": round(float(intercept), 4),
        "r_squared": round(1 - float(rest / spread), 5),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the costs and the fitted line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    counts = [row["sites"] for row in rows]
    fit = result["round_fit"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(counts, [row["round_s"] for row in rows], "o", label="slowest site + coordinator")
    left.plot(counts, [row["coordinator_s"] for row in rows], "s", label="coordinator")
    ends = np.array([0, max(counts)])
    left.plot(
        ends,
        fit["seconds_a_site"] * ends + fit["seconds_at_none"],
        "-",
        label=f"line, R² = {fit['r_squared']:.4f}",
    )
    left.set(title="A round, sites side by side", xlabel="sites", ylabel="processor seconds")
    right.plot(counts, [row["all_s"] for row in rows], "o-")
    right.set(title="The work of all together", xlabel="sites", ylabel="processor seconds")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print JSON, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the JSON there, and a PNG beside it")
    parser.add_argument("--sites", type=int, nargs="+", default=list(SITES))
    arguments = parser.parse_args()
    rows = []
    for count in sorted(arguments.sites):
        rows.append(measure(count))
        print(json.dumps(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "entries": ENTRIES,
        "bits": BITS,
        "rounds": ROUNDS,
        "threads": 1,
        "masks": "between all pairs of sites",
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "cryptography": version("cryptography"),
            "load_average": os.getloadavg(),
        },
        "rows": rows,
    }
    if len(rows) > 2:
        result["round_fit"] = line(rows, "round_s")
        result["coordinator_fit"] = line(rows, "coordinator_s")
    count = max(arguments.sites)
    result["with_dropouts"] = measure(count, rounds=1, dropouts=count // 10)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
        if "round_fit" in result:
            plot(result, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
