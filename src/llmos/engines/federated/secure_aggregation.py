"""The site's part in secure aggregation: Bonawitz et al. 2017 (CCS), Figure 4, active adversaries.

"Practical Secure Aggregation for Privacy-Preserving Machine Learning". The coordinator learns the
sum of the survivors' vectors mod 2^k. Each site adds a mask of its own and one for every other
site, which the other subtracts. The sites hold shares of each other's seeds; to unmask, of each
site they give either those of its own mask (it survived) or those of its pairwise masks (it did
not), never both, and only after a threshold of sites has signed one and the same list.

A `Participant` takes part in one attempt. It steps forward only, and any refusal ends it. What it
cannot know is its caller's part: to enter one attempt once, also after a crash, and to enter no
further attempt of a round in which it has released shares. Two sums of one round over different
sites would give away their difference.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from enum import IntEnum, auto

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from llmos.engines.federated import codec, shamir
from llmos.engines.federated.agreement import Purpose, agree, check_public_key, seal, unseal
from llmos.engines.federated.masking import SEED_BYTES, add_mask, pair_sign
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
from llmos.engines.federated.session import COORDINATOR, LABEL, Session, Sign, Verify, framed
from llmos.errors import AggregationAborted, EngineError, UpdateRefused


class Step(IntEnum):
    """What a participant, or the coordinator, does next."""

    ADVERTISE_KEYS = auto()
    SHARE_KEYS = auto()
    MASKED_INPUT = auto()
    CONSISTENCY_CHECK = auto()
    UNMASKING = auto()
    DONE = auto()
    FAILED = auto()


class Participant:
    """One site in one attempt; its methods are called once each, in this order.

    All of them raise UpdateRefused for a message that is not what the protocol allows, and
    AggregationAborted where fewer sites than the threshold are left.
    """

    def __init__(self, session: Session, site: str, *, sign: Sign, verify: Verify) -> None:
        """Draw the site's secrets; `sign` and `verify` speak for the sites' long-lived keys."""
        if site not in session.sites:
            raise EngineError(f"{site} is no site of this session")
        self.step = Step.ADVERTISE_KEYS
        self._session, self._site = session, site
        self._sign, self._verify = sign, verify
        self._sealing = X25519PrivateKey.generate()
        self._masking = X25519PrivateKey.generate()
        self._self_mask_seed = os.urandom(SEED_BYTES)
        self._roster: dict[str, Advertisement] = {}
        self._roster_digest = b""
        self._own_shares = b""
        self._sealed: Mapping[str, bytes] = {}
        self._survivors: tuple[str, ...] = ()

    def advertise(self) -> Advertisement:
        """Round 0, AdvertiseKeys: give the public keys, signed."""
        self._enter(Step.ADVERTISE_KEYS)
        sealing, masking = (
            key.public_key().public_bytes_raw() for key in (self._sealing, self._masking)
        )
        statement = self._session.key_statement(self._site, sealing, masking)
        message = Advertisement(
            self._session.digest, self._site, sealing, masking, self._sign(statement)
        )
        self._roster[self._site] = message
        self.step = Step.SHARE_KEYS
        return message

    def share_keys(self, roster: Roster) -> SealedShares:
        """Round 1, ShareKeys: check everyone's keys and share the secrets, sealed."""
        self._enter(Step.SHARE_KEYS, roster.session)
        self._roster = self._checked_roster(roster)
        self._roster_digest = roster_digest(self._session, self._roster)
        threshold, count = self._session.threshold, len(self._session.sites)
        key_shares, seed_shares = (
            shamir.share(secret, threshold=threshold, shares=count)
            for secret in (self._masking.private_bytes_raw(), self._self_mask_seed)
        )
        sealed = {}
        for peer in self._roster:
            place = self._session.position(peer) - 1
            shares = key_shares[place] + seed_shares[place]
            if peer == self._site:
                self._own_shares = shares
            else:
                context = self._context(sender=self._site, receiver=peer)
                sealed[peer] = seal(self._agree(peer, Purpose.SEALING), shares, context)
        self.step = Step.MASKED_INPUT
        return SealedShares(self._session.digest, self._site, sealed)

    def mask(self, delivery: Delivery, residues: NDArray[np.uint32]) -> bytes:
        """Round 2, MaskedInputCollection: return the masked vector as the codec's bytes.

        Args:
            delivery: the others' sealed shares; who sent none is out from here on.
            residues: (P,), the site's input as integers below 2^k.

        Raises:
            ValueError: the input is not what the session says.
        """
        self._enter(Step.MASKED_INPUT, delivery.session)
        if not set(delivery.shares) < set(self._roster) or self._site in delivery.shares:
            raise UpdateRefused(COORDINATOR, "it delivers shares of sites that advertised no keys")
        _at_least(self._session, len(delivery.shares) + 1, "shared their keys")
        bits = self._session.update.bits
        if residues.shape != (self._session.update.entries,) or int(residues.max()) >> bits:
            raise ValueError(f"the input is not {self._session.update.entries} integers mod 2^k")
        self._sealed = dict(delivery.shares)
        masked = residues.astype(np.uint32)  # a copy
        add_mask(masked, self._self_mask_seed, sign=1)
        for peer in self._sealed:
            seed = self._agree(peer, Purpose.MASKING)
            add_mask(masked, seed, sign=pair_sign(self._site, peer))
        masked &= np.uint32(2**bits - 1)
        self.step = Step.CONSISTENCY_CHECK
        return codec.encode_integers(masked, self._session.update)

    def sign_survivors(self, survivors: Survivors) -> SurvivorSignature:
        """Round 3, ConsistencyCheck: sign the list of the sites whose inputs are in the sum.

        A participant signs one list, and would unmask no other.
        """
        self._enter(Step.CONSISTENCY_CHECK, survivors.session)
        sites = survivors.sites
        if sites != tuple(sorted({*sites})) or not {*sites} <= {self._site, *self._sealed}:
            raise UpdateRefused(COORDINATOR, "its list of survivors is none")
        if self._site not in sites:
            raise UpdateRefused(COORDINATOR, f"its list of survivors leaves {self._site} out")
        _at_least(self._session, len(sites), "gave an input")
        self._survivors = sites
        signature = self._sign(self._survivor_statement())
        self.step = Step.UNMASKING
        return SurvivorSignature(self._session.digest, self._site, signature)

    def unmask(self, signatures: SurvivorSignatures) -> UnmaskingShares:
        """Round 4, Unmasking: release shares, after t sites have signed this very list."""
        self._enter(Step.UNMASKING, signatures.session)
        if not set(signatures.signatures) <= set(self._survivors):
            raise UpdateRefused(COORDINATOR, "it shows signatures of sites that did not survive")
        _at_least(self._session, len(signatures.signatures), "signed the list of survivors")
        statement = self._survivor_statement()
        for site, signature in signatures.signatures.items():
            if not self._verify(site, statement, signature):
                raise UpdateRefused(site, "its signature is not over this list of survivors")
        shares = {self._site: self._own_shares}
        for sender, sealed in self._sealed.items():
            context = self._context(sender=sender, receiver=self._site)
            key = self._agree(sender, Purpose.SEALING)
            shares[sender] = unseal(key, sealed, context, sender=sender)
        self.step = Step.DONE
        return UnmaskingShares(
            self._session.digest,
            self._site,
            self_masks={
                site: pair[shamir.SHARE_BYTES :]
                for site, pair in shares.items()
                if site in self._survivors
            },
            masking_keys={
                site: pair[: shamir.SHARE_BYTES]
                for site, pair in shares.items()
                if site not in self._survivors
            },
        )

    def _enter(self, step: Step, session: bytes | None = None) -> None:
        """Begin a step; it has failed until it says otherwise."""
        wanted, self.step = self.step, Step.FAILED
        if wanted is not step:
            raise UpdateRefused(COORDINATOR, f"{step.name} is out of turn: {wanted.name} is due")
        if session is not None:
            self._session.check(session, COORDINATOR)

    def _checked_roster(self, roster: Roster) -> dict[str, Advertisement]:
        """Return who takes part, by name in order; every key is signed and there but once."""
        found = {message.site: message for message in roster.advertisements}
        if len(found) < len(roster.advertisements) or not set(found) <= set(self._session.sites):
            raise UpdateRefused(COORDINATOR, "its roster names a site twice, or a stranger")
        _at_least(self._session, len(found), "advertised keys")
        if found.get(self._site) != self._roster[self._site]:
            raise UpdateRefused(COORDINATOR, f"its roster does not hold the keys of {self._site}")
        for message in found.values():
            check_advertisement(self._session, message, self._verify)
        keys = {key for m in found.values() for key in (m.sealing_key, m.masking_key)}
        if len(keys) < 2 * len(found):
            raise UpdateRefused(COORDINATOR, "its roster holds a key twice")
        return {site: found[site] for site in sorted(found)}

    def _agree(self, peer: str, purpose: Purpose) -> bytes:
        keys = self._roster[peer]
        private, public = (
            (self._sealing, keys.sealing_key)
            if purpose is Purpose.SEALING
            else (self._masking, keys.masking_key)
        )
        return agree(private, public, peer=peer, purpose=purpose, session=self._session.digest)

    def _context(self, *, sender: str, receiver: str) -> bytes:
        """Return what a sealed share is bound to: session, keys, sender and receiver."""
        names = sender.encode(), receiver.encode()
        return framed(LABEL + b"/share", self._session.digest, self._roster_digest, *names)

    def _survivor_statement(self) -> bytes:
        return self._session.survivor_statement(self._roster_digest, self._survivors)


def check_advertisement(session: Session, message: Advertisement, verify: Verify) -> None:
    """Hold a site's keys against its signature.

    Raises:
        UpdateRefused: the site did not sign them for this session, or they are none.
    """
    session.check(message.session, message.site)
    statement = session.key_statement(message.site, message.sealing_key, message.masking_key)
    if not verify(message.site, statement, message.signature):
        raise UpdateRefused(message.site, "its keys are not signed by it for this attempt")
    for key in (message.sealing_key, message.masking_key):
        check_public_key(key, message.site)


def roster_digest(session: Session, roster: Mapping[str, Advertisement]) -> bytes:
    """Return the SHA-256 of all keys, in the order of the sites."""
    statements = (
        session.key_statement(site, roster[site].sealing_key, roster[site].masking_key)
        for site in sorted(roster)
    )
    return hashlib.sha256(framed(LABEL + b"/roster", *statements)).digest()


def _at_least(session: Session, count: int, did: str) -> None:
    if count < session.threshold:
        raise AggregationAborted(
            f"{count} of {len(session.sites)} sites {did}; {session.threshold} are needed",
            hint="start another attempt when more sites can be reached",
        )
