"""Sites and a coordinator in one process, with Ed25519 as the sites' long-lived keys."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from llmos.engines.federated.aggregator import Aggregator
from llmos.engines.federated.codec import Encoding, Header
from llmos.engines.federated.messages import Delivery, Roster
from llmos.engines.federated.secure_aggregation import Participant
from llmos.engines.federated.session import Session, default_threshold

LAYOUT = hashlib.sha256(b"the layout of these tests").digest()
NAMES = tuple(f"site-{letter}" for letter in "abcdefghijklmnop")


def make_session(
    sites: int | Sequence[str] = 4,
    *,
    threshold: int | None = None,
    entries: int = 50,
    bits: int = 20,
    job: str = "job-1",
    round: int = 1,
    attempt: int = 0,
) -> Session:
    """Return a session of the first sites of the alphabet."""
    names = NAMES[:sites] if isinstance(sites, int) else tuple(sites)
    header = Header(Encoding.INTEGERS, LAYOUT, entries, round, attempt, bits)
    return Session(job, names, threshold or default_threshold(len(names)), header)


@dataclass
class Federation:
    """All sites of a session and its coordinator, step by step, any of them failing anywhere."""

    session: Session
    keys: dict[str, Ed25519PrivateKey] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.session.sites:
            self.keys.setdefault(site, Ed25519PrivateKey.generate())
        self.sites = {site: self.participant(site) for site in self.session.sites}
        self.aggregator = Aggregator(self.session, self.verify)
        generator = np.random.default_rng(0)
        highest = 2 ** (self.session.update.bits - (len(self.sites) - 1).bit_length())
        self.inputs = {
            site: generator.integers(highest, size=self.session.update.entries, dtype=np.uint32)
            for site in self.sites
        }

    def participant(self, site: str) -> Participant:
        return Participant(self.session, site, sign=self.keys[site].sign, verify=self.verify)

    def verify(self, site: str, message: bytes, signature: bytes) -> bool:
        try:
            self.keys[site].public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def sum_of(self, sites: Iterable[str]) -> NDArray[np.uint32]:
        total = np.zeros(self.session.update.entries, dtype=np.uint64)
        for site in sites:
            total += self.inputs[site]
        low = np.uint64(2**self.session.update.bits - 1)
        return (total & low).astype(np.uint32)

    def run(self, **gone: Collection[str]) -> NDArray[np.uint32]:
        """Take all steps; `gone` names, by step, the sites that are silent from then on."""
        roster = self.advertise(gone.get("advertise", ()))
        self.mask(self.share_keys(roster, gone.get("share", ())), gone.get("mask", ()))
        return self.unmask(unsigned=gone.get("sign", ()), silent=gone.get("unmask", ()))

    def advertise(self, without: Collection[str] = ()) -> Roster:
        for site in self._alive(self.sites, without):
            self.aggregator.add_advertisement(self.sites[site].advertise())
        return self.aggregator.roster()

    def share_keys(self, roster: Roster, without: Collection[str] = ()) -> dict[str, Delivery]:
        for site in self._alive([a.site for a in roster.advertisements], without):
            self.aggregator.add_shares(self.sites[site].share_keys(roster))
        return self.aggregator.deliveries()

    def mask(self, deliveries: dict[str, Delivery], without: Collection[str] = ()) -> None:
        for site in self._alive(deliveries, without):
            masked = self.sites[site].mask(deliveries[site], self.inputs[site])
            self.aggregator.add_input(site, masked)

    def unmask(
        self, *, unsigned: Collection[str] = (), silent: Collection[str] = ()
    ) -> NDArray[np.uint32]:
        survivors = self.aggregator.survivors()
        for site in self._alive(survivors.sites, unsigned):
            self.aggregator.add_signature(self.sites[site].sign_survivors(survivors))
        signatures = self.aggregator.signatures()
        for site in self._alive(signatures.signatures, silent):
            self.aggregator.add_unmasking(self.sites[site].unmask(signatures))
        return self.aggregator.total()

    @staticmethod
    def _alive(sites: Iterable[str], without: Collection[str]) -> list[str]:
        return [site for site in sites if site not in without]
