"""The coordinator's part in secure aggregation: Bonawitz et al. 2017, Figure 4, server.

It passes messages on, adds masked vectors as they come, and takes the masks off the sum. A message
that is refused changes nothing: its site may send another while the step lasts, or drops out.
Whoever keeps the messages that were accepted can replay them into a new `Aggregator`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from llmos.engines.federated import codec, shamir
from llmos.engines.federated.agreement import Purpose, agree
from llmos.engines.federated.masking import add_mask, pair_sign
from llmos.engines.federated.messages import (
    Advertisement,
    Delivery,
    Roster,
    SealedShares,
    Survivors,
    SurvivorSignature,
    SurvivorSignatures,
    UnmaskingShares,
)
from llmos.engines.federated.secure_aggregation import Step, check_advertisement, roster_digest
from llmos.engines.federated.session import Session, Verify
from llmos.errors import AggregationAborted, EngineError, UpdateRefused


class Aggregator:
    """One attempt at the coordinator: `add_*` takes what sites send, the others end a step.

    Every `add_*` raises UpdateRefused for a message that the protocol does not allow; every method
    that ends a step raises AggregationAborted if fewer sites than the threshold took part in it.
    """

    def __init__(self, session: Session, verify: Verify) -> None:
        """Begin with the step in which sites advertise their keys."""
        self.step = Step.ADVERTISE_KEYS
        self._session = session
        self._verify = verify
        # who took part in which step: U1, ..., U5 in the paper
        self._heard: dict[Step, set[str]] = {step: set() for step in Step}
        self._keys: dict[str, Advertisement] = {}
        self._sealed: dict[str, Mapping[str, bytes]] = {}  # by sender and receiver
        self._statement = b""  # about the survivors, which they sign
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, UnmaskingShares] = {}
        self._sum = np.zeros(session.update.entries, dtype=np.uint32)

    def add_advertisement(self, message: Advertisement) -> None:
        """Take a site's keys, if it signed them; sites would refuse a roster with a key twice."""
        self._admit(message.session, message.site, Step.ADVERTISE_KEYS)
        check_advertisement(self._session, message, self._verify)
        known = {key for m in self._keys.values() for key in (m.sealing_key, m.masking_key)}
        given = {message.sealing_key, message.masking_key}
        if message.sealing_key == message.masking_key or given & known:
            raise UpdateRefused(message.site, "one of its keys was advertised before")
        self._keys[message.site] = message
        self._heard[self.step].add(message.site)

    def roster(self) -> Roster:
        """End round 0; return what goes to every site that advertised keys."""
        self._close(Step.ADVERTISE_KEYS)
        messages = tuple(self._keys[site] for site in sorted(self._keys))
        return Roster(self._session.digest, messages)

    def add_shares(self, message: SealedShares) -> None:
        """Take a site's sealed shares, one for every other site."""
        self._admit(message.session, message.site, Step.SHARE_KEYS)
        if set(message.shares) != set(self._keys) - {message.site}:
            raise UpdateRefused(message.site, "it does not hold one sealed share for each site")
        self._sealed[message.site] = message.shares
        self._heard[self.step].add(message.site)

    def deliveries(self) -> dict[str, Delivery]:
        """End round 1; return what goes to whom, for every site that shared its keys."""
        self._close(Step.SHARE_KEYS)
        return {
            receiver: Delivery(
                self._session.digest,
                {
                    sender: shares[receiver]
                    for sender, shares in sorted(self._sealed.items())
                    if sender != receiver
                },
            )
            for receiver in self._sealed
        }

    def add_input(self, site: str, update: bytes) -> None:
        """Take a site's masked vector and add it to the sum; it is not kept."""
        self._admit(self._session.digest, site, Step.MASKED_INPUT)
        self._sum += codec.decode_integers(update, self._session.update, site)
        self._heard[self.step].add(site)

    def survivors(self) -> Survivors:
        """End round 2; return what goes to every site whose input came."""
        self._close(Step.MASKED_INPUT)
        self._statement = self._session.survivor_statement(
            roster_digest(self._session, self._keys), tuple(self._survivors)
        )
        return Survivors(self._session.digest, tuple(self._survivors))

    def add_signature(self, message: SurvivorSignature) -> None:
        """Take a site's signature over the list of survivors."""
        self._admit(message.session, message.site, Step.CONSISTENCY_CHECK)
        if not self._verify(message.site, self._statement, message.signature):
            raise UpdateRefused(message.site, "its signature is not over this list of survivors")
        self._signatures[message.site] = message.signature
        self._heard[self.step].add(message.site)

    def signatures(self) -> SurvivorSignatures:
        """End round 3; return what goes to every site that signed."""
        self._close(Step.CONSISTENCY_CHECK)
        return SurvivorSignatures(self._session.digest, dict(sorted(self._signatures.items())))

    def add_unmasking(self, message: UnmaskingShares) -> None:
        """Take a site's shares: of survivors their self masks, of dropouts their masking keys."""
        self._admit(message.session, message.site, Step.UNMASKING)
        asked = self._survivors, self._dropouts
        if (sorted(message.self_masks), sorted(message.masking_keys)) != asked:
            raise UpdateRefused(message.site, "its shares are not those that it was asked for")
        for share in (*message.self_masks.values(), *message.masking_keys.values()):
            shamir.parse_share(share, message.site)
        self._shares[message.site] = message
        self._heard[self.step].add(message.site)

    def total(self) -> NDArray[np.uint32]:
        """End round 4; return the sum (P,) of the survivors' inputs mod 2^k.

        Raises:
            AggregationAborted: fewer sites than the threshold released shares, or the shares of a
                site's secret do not fit together; who of them has lied is not known.
        """
        self._close(Step.UNMASKING)
        try:
            self._take_off_masks()
        except UpdateRefused as refused:
            self.step = Step.FAILED
            raise AggregationAborted(
                f"the sum cannot be unmasked: the shares that {', '.join(sorted(self._shares))} "
                f"gave of the secret of {refused.site} are not what {refused.site} has shared out",
                hint="start another attempt",
            ) from refused
        self._sum &= np.uint32(2**self._session.update.bits - 1)
        return self._sum

    def _take_off_masks(self) -> None:
        for survivor in self._survivors:
            shares = {site: m.self_masks[survivor] for site, m in self._shares.items()}
            add_mask(self._sum, self._join(shares, survivor), sign=-1)
        for dropout in self._dropouts:
            shares = {site: m.masking_keys[dropout] for site, m in self._shares.items()}
            self._take_off_pairwise_masks(dropout, self._join(shares, dropout))

    def _take_off_pairwise_masks(self, dropout: str, masking_key: bytes) -> None:
        private = X25519PrivateKey.from_private_bytes(masking_key)
        if private.public_key().public_bytes_raw() != self._keys[dropout].masking_key:
            raise UpdateRefused(dropout, "the shares of its masking key give another key")
        for survivor in self._survivors:
            seed = agree(
                private,
                self._keys[survivor].masking_key,
                peer=survivor,
                purpose=Purpose.MASKING,
                session=self._session.digest,
            )
            # the survivor added the mask with its own sign; the dropout's is the opposite
            add_mask(self._sum, seed, sign=pair_sign(dropout, survivor))

    def _join(self, shares: Mapping[str, bytes], owner: str) -> bytes:
        by_position = {self._session.position(site): share for site, share in shares.items()}
        return shamir.reconstruct(by_position, threshold=self._session.threshold, owner=owner)

    @property
    def _survivors(self) -> list[str]:
        return sorted(self._heard[Step.MASKED_INPUT])

    @property
    def _dropouts(self) -> list[str]:
        """Sites whose masks are in others' inputs, while theirs is missing."""
        return sorted(self._heard[Step.SHARE_KEYS] - self._heard[Step.MASKED_INPUT])

    def _admit(self, session: bytes, site: str, step: Step) -> None:
        """Refuse what is out of turn, of another attempt, of a stranger or a dropout, or double."""
        if self.step is not step:
            raise UpdateRefused(site, f"{step.name} is over, or has not begun")
        self._session.check(session, site)
        first = step is Step.ADVERTISE_KEYS
        if site not in (self._session.sites if first else self._heard[Step(step - 1)]):
            raise UpdateRefused(site, f"it takes no part in {step.name}")
        if site in self._heard[step]:
            raise UpdateRefused(site, f"it has taken part in {step.name} already")

    def _close(self, step: Step) -> None:
        """Go on to the next step, if enough sites took part in this one."""
        if self.step is not step:
            raise EngineError(f"{step.name} is over, or has not begun")
        if len(self._heard[step]) < self._session.threshold:
            self._abort(step)
        self.step = Step(step + 1)

    def _abort(self, step: Step) -> NoReturn:
        self.step = Step.FAILED
        sites = self._heard[step]
        missing = ", ".join(sorted(set(self._session.sites) - sites))
        raise AggregationAborted(
            f"{len(sites)} of {len(self._session.sites)} sites took part in {step.name}, "
            f"{self._session.threshold} are needed; nothing came from {missing}",
            hint="start another attempt when more sites can be reached",
        )
