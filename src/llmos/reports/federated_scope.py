"""Who is protected from whom by a federated training, as it follows from its manifest."""

from __future__ import annotations

from typing import Final

from llmos.engines.federated.session import colluders
from llmos.federations.manifest import Manifest, Masked

SEVERAL: Final = (
    "a person whom several sites know: at most the sum of their epsilons at the sum of their deltas"
)
SEVERAL_SHARED: Final = (
    "a person whom several sites know: no bound is stated, it may be more than the sum of their "
    "epsilons; the sites share one noise, and such a person moves one sum several times"
)

NOT_PROTECTED: Final = (
    "The number of a site's units, the class of its data, and how long its rounds take: the "
    "coordinator sees them.",
    "Sites from a coordinator that invents sites: it holds the certificate authority that this "
    "certificate names. Compare the sites' keys with those that they publish.",
    "What the coordinator makes of each round's sum, and the model of the last weights: that is "
    "its word, and what else it put in, of other jobs say, no site's signature shows.",
    "Which others gave an update: a site knows it from the task that it trained for, and the "
    "coordinator may show each site another task, or ask others when it begins a round again.",
    "Facts about the whole group: the model may learn them, and so does anyone who asks it.",
    "What the base model's own pre-training data betray.",
    "What users type to the model, and what it answers, while it is in use.",
    "Running times, memory and other side channels of the sites' machines.",
    "Whether a site imported true records, took the steps that it states and lists its rounds as "
    "they were: its signature stands for them, no proof does.",
)


SHARED: Final = (
    "Units whose noise the sites share, if more sites than stated work together or the coordinator "
    "invents sites: then a sum has less noise than was charged, at least the site's own share."
)


def not_protected(manifest: Manifest) -> tuple[str, ...]:
    """Return what a job leaves open."""
    if manifest.shared_noise is None:
        return (f"{SEVERAL[0].upper()}{SEVERAL[1:]}.", *NOT_PROTECTED)
    return (SHARED, f"{SEVERAL_SHARED[0].upper()}{SEVERAL_SHARED[1:]}.", *NOT_PROTECTED)


def protected(manifest: Manifest) -> list[dict[str, str]]:
    """Return what is protected, from whom, by what; every word follows from the manifest."""
    said: list[dict[str, str]] = [
        {
            "what": "the records of each site",
            "from": "the coordinator and the other sites",
            "by": "they stay at the site, which runs what it has installed, by signed numbers",
        }
    ]
    if manifest.privacy is not None:
        said.append(
            {
                "what": "each unit of each site",
                "from": _from_whom(manifest),
                "by": f"(epsilon, delta)-differential privacy of at most "
                f"{manifest.privacy.epsilon:g} at {manifest.privacy.delta:g} over all rounds, "
                f"charged to the site's own ledger{_by_shares(manifest)}",
            }
        )
    if isinstance(manifest.aggregation, Masked):
        said.append(
            {
                "what": "the update of each site",
                "from": "the other sites and the coordinator, also if it works together with "
                f"{colluders(manifest.aggregation.threshold, len(manifest.sites))} of them",
                "by": "secure aggregation (Bonawitz et al. 2017, Figure 4, active adversary), "
                f"threshold {manifest.aggregation.threshold} of {len(manifest.sites)}: only a "
                "sum is unmasked",
            }
        )
    return said


def _from_whom(manifest: Manifest) -> str:
    shared, aggregation = manifest.shared_noise, manifest.aggregation
    if shared is None or not isinstance(aggregation, Masked):
        return "everybody who sees the model or an update of its site"
    silent = aggregation.threshold - shared.honest  # that add no noise, or tell what they added
    tolerated = min(silent, colluders(aggregation.threshold, len(manifest.sites)))
    return (
        f"everybody who sees the model or a round's sum, also together with {tolerated} of the "
        "other sites"
    )


def _by_shares(manifest: Manifest) -> str:
    shared = manifest.shared_noise
    if shared is None:
        return ""
    return (
        "; distributed discrete Gaussian noise (Kairouz, Liu, Steinke 2021), of which each site "
        f"adds as much as {shared.honest} of them need together"
    )
