"""The rounds of a federated certificate: the coordinator's chain, and what each site saw of it.

The chain is the coordinator's word. Each site has signed which rounds it trained in, from which
weights, and whom the coordinator's signed tasks named to it. So a chain of other rounds does not
fit to any site that trained, and a site cannot be left out that another one was told of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import rfc8785

from llmos.errors import VerificationFailed
from llmos.federations.manifest import Manifest
from llmos.federations.statement import bits, numbers, starts_sha256
from llmos.reports.site_part import SitePart

FIELDS: Final = ("round", "sites", "task_sha256", "weights_before", "weights_after")
MOST_PARAMETERS: Final = 1 << 32  # no message of a round has more entries
_FLOAT_BYTES: Final = 4
_BLOCK: Final = bytes(1 << 20)

Round = Mapping[str, Any]  # as the register has it: `sites` are SPIFFE IDs


def chain(rounds: Sequence[Round], manifest: Manifest) -> list[dict[str, Any]]:
    """Return what a certificate says of the rounds; a round's sites are `Bits`."""
    places = {uri: place for place, uri in enumerate(manifest.sites)}
    return [
        {name: row[name] for name in FIELDS} | {"sites": bits(places[uri] for uri in row["sites"])}
        for row in rounds
    ]


def opened(said: Sequence[Mapping[str, Any]], manifest: Manifest) -> list[dict[str, Any]]:
    """Return the rounds that `chain` has written.

    Raises:
        VerificationFailed: they are in another form, or name sites that the job has not.
    """
    rounds = [{**row, "sites": named(row["sites"], manifest)} for row in said]
    if chain(rounds, manifest) != said:
        raise VerificationFailed("its rounds are not in their canonical form")
    return rounds


def named(places: str, manifest: Manifest) -> list[str]:
    """Return the sites of `Bits`.

    Raises:
        VerificationFailed: the job has fewer sites.
    """
    found = numbers(places)
    if found and found[-1] >= len(manifest.sites):
        raise VerificationFailed("it names sites that the job has not")
    return [manifest.sites[place] for place in found]


def rounds_sha256(rounds: Sequence[Round]) -> str:
    """Return the SHA-256 of the rounds, which the log's entry of publishing holds."""
    found = hashlib.sha256(b"[")
    for place, row in enumerate(rounds):
        found.update(b"," if place else b"")
        found.update(rfc8785.dumps({name: row[name] for name in FIELDS}))
    found.update(b"]")
    return found.hexdigest()


def zeros_sha256(parameters: int) -> str:
    """Return the SHA-256 of the weights that every job starts from: B, or R, is zero.

    Raises:
        VerificationFailed: no round can have so many.
    """
    if parameters >= MOST_PARAMETERS:
        raise VerificationFailed(f"no adapter has {parameters} weights")
    found, left = hashlib.sha256(), _FLOAT_BYTES * parameters
    while left:
        taken = min(left, len(_BLOCK))
        found.update(_BLOCK[:taken])
        left -= taken
    return found.hexdigest()


def check_chain(rounds: Sequence[Round], manifest: Manifest) -> None:
    """Check that the rounds are those of the job, from zero, each from where the last one ended.

    Raises:
        VerificationFailed: they are not.
    """
    if [row["round"] for row in rounds] != list(range(manifest.rounds)):
        raise VerificationFailed(f"it has not the {manifest.rounds} rounds of the job")
    if rounds[0]["weights_before"] != zeros_sha256(manifest.parameters):
        raise VerificationFailed(
            "its first round does not start from zero: what it starts from was learnt elsewhere"
        )
    for before, after in pairwise(rounds):
        if before["weights_after"] != after["weights_before"]:
            raise VerificationFailed(f"round {after['round']} does not start where one ended")
    if any(len(row["sites"]) < manifest.minimum_sites for row in rounds):
        raise VerificationFailed("a round had fewer sites than the job demands")


def check_sites(rounds: Sequence[Round], parts: Mapping[str, SitePart], manifest: Manifest) -> None:
    """Hold the chain against what every site has signed.

    Raises:
        VerificationFailed: a site trained in other rounds, from other weights, for fewer steps, or
            beside a site of which there is no part.
    """
    took_part: dict[str, set[int]] = {}
    for row in rounds:
        for uri in row["sites"]:
            took_part.setdefault(uri, set()).add(row["round"])
    if not set(took_part) <= set(parts):
        raise VerificationFailed("it has not the part of each site that took part")
    for uri, part in parts.items():
        _check_site(part, took_part.get(uri, set()), rounds, manifest)
        unheard = set(named(part.statement.rounds.participants, manifest)) - set(parts)
        if unheard:
            names = ", ".join(sorted(site.rpartition("/")[2] for site in unheard))
            raise VerificationFailed(
                f"{part.site} trained beside {names}, whose part is not there",
                hint="the coordinator may have left a site out that the model learnt from",
            )


def _check_site(
    part: SitePart, took_part: set[int], rounds: Sequence[Round], manifest: Manifest
) -> None:
    said, trained = part.statement, numbers(part.statement.rounds.trained)
    if trained and trained[-1] >= len(rounds):
        raise VerificationFailed(f"{part.site} trained in more rounds than there are")
    if not took_part <= set(trained):
        raise VerificationFailed(f"{part.site} did not train in each round that names it")
    starts = ((number, str(rounds[number]["weights_before"])) for number in trained)
    if starts_sha256(starts) != said.rounds.starts_sha256:
        raise VerificationFailed(
            f"{part.site} trained from other weights than those of the rounds",
            hint="the coordinator certifies other rounds than those that this site took part in",
        )
    steps = 0 if said.spent is None else said.spent.steps
    if steps < len(took_part) * manifest.local.steps:
        raise VerificationFailed(
            f"{part.site} states fewer steps than its {len(took_part)} rounds had"
        )
