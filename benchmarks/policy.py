"""Policy decisions a second with 50 policies, one thread, median of five rounds.

Where other programs share the cores, wall time measures them; the processor time of this process is
reported beside it.

Every decision is `Policy.decide` as the monitor calls it: caller and resource are described and
checked against the schema, then the request is checked against the schema and evaluated. Callers
and resources change with every question: `warm` draws them from as many as one office has, so that
their descriptions were parsed before; in `cold` every description is new.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import count, cycle, islice, product
from pathlib import Path

from llmos.kernel.identity import Principal, Role
from llmos.kernel.policy import DEFAULTS, Action, Policy, Resource
from llmos.workflows.policy_text import statements

POLICIES = 50
ROUNDS = 5
DECISIONS = 4000
PEOPLE, MODELS = 20, 20
Question = tuple[Principal, Action, Resource, dict[str, str]]


def site_policies() -> Policy:
    """Return the shipped policies and holds of single models, as a site writes them, up to 50."""
    shipped = (DEFAULTS / "default.cedar").read_text()
    more = POLICIES - len(statements(shipped))
    actions = [Action.CHAT, Action.EXPORT_MODEL, Action.MEASURE, Action.REPORT]
    holds = "\n".join(
        f'@id("hold-{n}") forbid (principal, action == Action::"{action}", resource is Model) '
        f'when {{ resource.name == "held-{n}" && !(principal in Role::"auditor") }};'
        for n, action in zip(range(more), cycle(actions), strict=False)
    )
    return Policy.parse({"default.cedar": shipped, "holds.cedar": holds})


def questions(*, warm: bool) -> Iterator[Question]:
    """Yield who asks for what; half of it is denied."""
    attributes: dict[str, str | tuple[str, ...] | bool] = {
        "kind": "adapter",
        "classification": "sensitive",
        "private": True,
    }
    actions = cycle((Action.CHAT, Action.EXPORT_MODEL))
    numbers = (
        cycle(product(range(PEOPLE), range(MODELS)))
        if warm
        else zip(count(), count(), strict=False)
    )
    for (person, model), action in zip(numbers, actions, strict=False):
        who = Principal(f"{person:016x}", f"user-{person}", frozenset({Role.DEVELOPER}))
        yield who, action, Resource("Model", f"model-{model}", attributes), {}


def measure(policy: Policy, *, warm: bool) -> dict[str, list[float]]:
    """Return decisions a second of each round, by the wall and by the processor's clock."""
    asked = questions(warm=warm)
    for question in islice(asked, PEOPLE * MODELS):
        policy.decide(*question)
    rates: dict[str, list[float]] = {"wall": [], "processor": []}
    for _ in range(ROUNDS):
        batch = list(islice(asked, DECISIONS))
        began = time.perf_counter(), time.process_time()
        allowed = sum(policy.decide(*question).allowed for question in batch)
        rates["wall"].append(DECISIONS / (time.perf_counter() - began[0]))
        rates["processor"].append(DECISIONS / (time.process_time() - began[1]))
        assert allowed == DECISIONS // 2
    return rates


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    policy = site_policies()
    result: dict[str, object] = {
        "policies": sum(len(statements(text)) for text in policy.files.values()),
        "threads": 1,
        "rounds": ROUNDS,
        "decisions_a_round": DECISIONS,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "cedarpy": version("cedarpy"),
            "load_average": os.getloadavg(),
        },
    }
    for name, warm in (("warm", True), ("cold", False)):
        for clock, rates in measure(policy, warm=warm).items():
            result[f"{name}_decisions_per_s_by_{clock}_time"] = {
                "median": round(statistics.median(rates)),
                "all": [round(rate) for rate in rates],
            }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
