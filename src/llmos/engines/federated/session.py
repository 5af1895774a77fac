"""One run of the protocol: who takes part in which attempt of which round, and under which rules.

Every signature, key and ciphertext is bound to `Session.digest`, so that nothing made for one
attempt means anything in another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llmos.engines.federated.codec import Encoding, Header
from llmos.errors import InvalidPrivacyParameter, UpdateRefused

LABEL: Final = b"llmos/secure-aggregation/v1"
COORDINATOR: Final = "coordinator"  # named in refusals by the sites
MIN_SITES: Final = 3  # of two sites each knows the other's update from the sum

Sign = Callable[[bytes], bytes]  # by the site's own key
Verify = Callable[[str, bytes, bytes], bool]  # site, message, signature


def default_threshold(sites: int) -> int:
    """Return how many of the sites must take part to the end.

    Bonawitz et al. 2017, section 6.2: floor(2n/3) + 1 keeps the inputs private from a coordinator
    that cheats together with fewer than a third of the sites, and lets as many fail.

    >>> [default_threshold(n) for n in (3, 4, 5, 6, 16)]
    [3, 3, 4, 5, 11]
    """
    return max(MIN_SITES, 2 * sites // 3 + 1)


def colluders(threshold: int, sites: int) -> int:
    """Return how many sites may work with the coordinator without learning another's update.

    2t > n + colluders (Bonawitz et al. 2017, Theorem 6.5), and two more must be in every sum: who
    knows all summands but one knows that one.

    >>> [colluders(default_threshold(n), n) for n in (3, 4, 5, 6, 16)]
    [1, 1, 2, 3, 5]
    """
    return min(2 * threshold - sites - 1, threshold - 2)


def framed(*fields: bytes) -> bytes:
    """Join fields so that no other fields give the same bytes."""
    return b"".join(len(field).to_bytes(8, "big") + field for field in fields)


@dataclass(frozen=True, slots=True)
class Session:
    """One attempt of one round of a job; the same at the coordinator and at every site."""

    job: str
    sites: tuple[str, ...]  # every site that may take part, in alphabetical order
    threshold: int
    update: Header  # integers mod 2^bits; it says which round and attempt this is

    def __post_init__(self) -> None:
        """Refuse rules under which the theorem does not hold.

        Bonawitz et al. 2017, Theorem 6.5: against a coordinator that cheats, the threshold is above
        half of the sites (and of those that collude with it: see `colluders`). Otherwise it could
        ask two halves for two different unmaskings.
        """
        count = len(self.sites)
        if count < MIN_SITES or "" in self.sites or self.sites != tuple(sorted({*self.sites})):
            raise InvalidPrivacyParameter(
                "sites", self.sites, "3 or more different names in alphabetical order"
            )
        if not (MIN_SITES <= self.threshold <= count < 2 * self.threshold):
            raise InvalidPrivacyParameter(
                "threshold",
                self.threshold,
                f"3 or more, at most the {count} sites and more than half of them",
            )
        if self.update.encoding is not Encoding.INTEGERS:
            raise InvalidPrivacyParameter("update", self.update, "integers, as masks are")

    @property
    def colluders(self) -> int:
        """Return how many sites may work with the coordinator: see the function of this name."""
        return colluders(self.threshold, len(self.sites))

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of everything that the sites agree on beforehand."""
        names = framed(*(site.encode() for site in self.sites))
        threshold = self.threshold.to_bytes(8, "big")
        return hashlib.sha256(
            framed(LABEL, self.job.encode(), names, threshold, self.update.pack())
        ).digest()

    def position(self, site: str) -> int:
        """Return where a site's shares lie: its place in the list, from 1."""
        return self.sites.index(site) + 1

    def check(self, digest: bytes, sender: str) -> None:
        """Hold a message against this session.

        Raises:
            UpdateRefused: it was made for another job, round or attempt, or under other rules.
        """
        if digest != self.digest:
            raise UpdateRefused(
                sender, "it belongs to another job, round, attempt or list of sites"
            )

    def key_statement(self, site: str, sealing_key: bytes, masking_key: bytes) -> bytes:
        """Return what a site signs to say that these are its public keys."""
        return framed(
            LABEL + b"/advertise-keys", self.digest, site.encode(), sealing_key, masking_key
        )

    def survivor_statement(self, roster: bytes, survivors: tuple[str, ...]) -> bytes:
        """Return what a site signs to say that it will unmask the sum of these sites alone.

        The keys are bound in as well (`roster`), beyond the paper: two runs of one attempt under
        different keys can lend each other no signature.
        """
        names = (site.encode() for site in survivors)
        return framed(LABEL + b"/consistency-check", self.digest, roster, *names)
