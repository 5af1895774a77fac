"""What the coordinator refuses, and what a refusal leaves as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.unit.engines.federated.conftest import NAMES, Federation, make_session

from llmos.engines.federated.aggregator import Aggregator
from llmos.engines.federated.codec import encode_integers
from llmos.engines.federated.messages import Advertisement, SurvivorSignature, UnmaskingShares
from llmos.engines.federated.secure_aggregation import Step
from llmos.engines.federated.shamir import PRIME, SHARE_BYTES
from llmos.errors import AggregationAborted, EngineError, UpdateRefused

A, B, C, D = NAMES[:4]


def test_refused_messages_change_nothing() -> None:
    """Whatever is thrown at every step, the sum is right in the end."""
    federation = Federation(make_session(4))
    other = Federation(make_session(4, attempt=1), keys=federation.keys)
    aggregator, sites = federation.aggregator, federation.sites
    aggregator.add_advertisement(first := sites[A].advertise())
    for wrong, reason in (
        (first, "already"),
        (other.sites[B].advertise(), "another job, round, attempt"),
        (replace(first, site=B), "not signed"),
        (replace(first, site="stranger"), "takes no part"),
    ):
        with pytest.raises(UpdateRefused, match=reason):
            aggregator.add_advertisement(wrong)
    for site in (B, C, D):
        aggregator.add_advertisement(sites[site].advertise())
    roster = aggregator.roster()
    sealed = {site: sites[site].share_keys(roster) for site in sites}
    with pytest.raises(UpdateRefused, match="one sealed share for each"):
        aggregator.add_shares(replace(sealed[A], shares={B: b"x" * 94}))
    for message in sealed.values():
        aggregator.add_shares(message)
    with pytest.raises(UpdateRefused, match="already"):
        aggregator.add_shares(sealed[A])
    deliveries = aggregator.deliveries()
    masked = {s: sites[s].mask(deliveries[s], federation.inputs[s]) for s in sites}
    old = encode_integers(federation.inputs[A], other.session.update)
    for wrong_input, reason in (
        (old, "the attempt of its"),
        (masked[A][:-1], "bytes"),
        (b"", "cut"),
    ):
        with pytest.raises(UpdateRefused, match=reason):
            aggregator.add_input(A, wrong_input)
    for site, data in masked.items():
        aggregator.add_input(site, data)
    with pytest.raises(UpdateRefused, match="already"):
        aggregator.add_input(A, masked[A])
    survivors = aggregator.survivors()
    with pytest.raises(UpdateRefused, match="not over this list"):
        aggregator.add_signature(SurvivorSignature(federation.session.digest, A, b"x" * 64))
    for participant in sites.values():
        aggregator.add_signature(participant.sign_survivors(survivors))
    signatures = aggregator.signatures()
    shares = {site: sites[site].unmask(signatures) for site in sites}
    _refuses_bad_shares(aggregator, shares[A])
    for message_of_shares in shares.values():
        aggregator.add_unmasking(message_of_shares)
    assert np.array_equal(aggregator.total(), federation.sum_of(sites))


def _refuses_bad_shares(aggregator: Aggregator, message: UnmaskingShares) -> None:
    share = message.self_masks[A]
    for self_masks, masking_keys in (
        ({B: share}, {}),
        (message.self_masks, {A: share}),  # never both kinds of one site
        ({B: share, C: share, D: share}, {A: share}),
        ({**message.self_masks, A: PRIME.to_bytes(SHARE_BYTES, "big")}, {}),
    ):
        with pytest.raises(UpdateRefused, match=r"asked for|no element"):
            aggregator.add_unmasking(
                replace(message, self_masks=self_masks, masking_keys=masking_keys)
            )


@pytest.mark.parametrize("step", ["advertise", "share", "mask", "sign", "unmask"])
def test_too_few_sites_abort_in_any_step(step: str) -> None:
    federation = Federation(make_session(7))
    with pytest.raises(AggregationAborted, match=f"4 of 7 .* nothing came from {A}, {B}, {C}"):
        federation.run(**{step: NAMES[:3]})
    assert federation.aggregator.step is Step.FAILED
    with pytest.raises(UpdateRefused, match="is over, or has not begun"):
        federation.aggregator.add_input(D, b"")


def test_a_dropout_cannot_come_back() -> None:
    federation = Federation(make_session(4))
    roster = federation.advertise()
    late = federation.sites[A].share_keys(roster)
    deliveries = federation.share_keys(roster, without={A})
    with pytest.raises(UpdateRefused, match="SHARE_KEYS is over"):
        federation.aggregator.add_shares(late)
    with pytest.raises(UpdateRefused, match="takes no part in MASKED_INPUT"):
        federation.aggregator.add_input(A, b"")
    federation.mask(deliveries)
    assert np.array_equal(federation.unmask(), federation.sum_of((B, C, D)))


@pytest.mark.parametrize("kind", ["copied", "own twice", "low order"])
def test_keys_that_would_end_the_others_attempts_are_refused(kind: str) -> None:
    """A site signs what it likes; the coordinator goes on without it."""
    federation = Federation(make_session(4))
    federation.aggregator.add_advertisement(first := federation.sites[A].advertise())
    masking = federation.sites[B].advertise().masking_key
    sealing = {"copied": first.masking_key, "own twice": masking, "low order": bytes(32)}[kind]
    statement = federation.session.key_statement(B, sealing, masking)
    signature = federation.keys[B].sign(statement)
    message = Advertisement(federation.session.digest, B, sealing, masking, signature)
    with pytest.raises(UpdateRefused, match=r"advertised before|public key is none") as refused:
        federation.aggregator.add_advertisement(message)
    assert refused.value.site == B
    for site in (C, D):
        federation.aggregator.add_advertisement(federation.sites[site].advertise())
    federation.mask(federation.share_keys(federation.aggregator.roster()))
    assert np.array_equal(federation.unmask(), federation.sum_of((A, C, D)))


def test_ending_a_step_twice_or_early_is_a_fault_of_the_caller() -> None:
    federation = Federation(make_session(4))
    federation.advertise()
    with pytest.raises(EngineError, match="ADVERTISE_KEYS is over"):
        federation.aggregator.roster()
    with pytest.raises(EngineError, match="UNMASKING is over, or has not begun"):
        federation.aggregator.total()


@pytest.mark.parametrize("dropout", [False, True])
def test_shares_that_do_not_fit_together_are_refused(dropout: bool) -> None:
    """B lies about its shares of C's secret; there is one share to spare, so that it is seen."""
    federation = Federation(make_session(7))
    gone = {C} if dropout else set()
    federation.mask(federation.share_keys(federation.advertise()), without=gone)
    survivors = federation.aggregator.survivors()
    for site in survivors.sites:
        federation.aggregator.add_signature(federation.sites[site].sign_survivors(survivors))
    signatures = federation.aggregator.signatures()
    for site in survivors.sites:
        message = federation.sites[site].unmask(signatures)
        if site == B:
            lie = {C: bytes(SHARE_BYTES)}
            message = (
                replace(message, masking_keys=lie)
                if dropout
                else replace(message, self_masks={**message.self_masks, **lie})
            )
        federation.aggregator.add_unmasking(message)
    with pytest.raises(AggregationAborted, match=f"gave of the secret of {C}") as aborted:
        federation.aggregator.total()
    assert all(site in aborted.value.message for site in survivors.sites)
    assert federation.aggregator.step is Step.FAILED


def test_a_masking_key_that_is_not_the_advertised_one_is_refused() -> None:
    """No share to spare: the public key tells."""
    federation = Federation(make_session(4))
    federation.mask(federation.share_keys(federation.advertise()), without={C})
    survivors = federation.aggregator.survivors()
    for site in survivors.sites:
        federation.aggregator.add_signature(federation.sites[site].sign_survivors(survivors))
    signatures = federation.aggregator.signatures()
    for site in survivors.sites:
        message = federation.sites[site].unmask(signatures)
        # shares of the constant polynomial 5: another key than the advertised one
        key_share = (5).to_bytes(SHARE_BYTES, "big")
        federation.aggregator.add_unmasking(replace(message, masking_keys={C: key_share}))
    with pytest.raises(AggregationAborted, match=f"gave of the secret of {C}"):
        federation.aggregator.total()


def test_accepted_messages_rebuild_a_coordinator() -> None:
    federation = Federation(make_session(4))
    aggregators = [federation.aggregator, Aggregator(federation.session, federation.verify)]
    sites = federation.sites
    for message in [participant.advertise() for participant in sites.values()]:
        for aggregator in aggregators:
            aggregator.add_advertisement(message)
    first, second = (aggregator.roster() for aggregator in aggregators)
    assert first == second
    for sealed in [participant.share_keys(first) for participant in sites.values()]:
        for aggregator in aggregators:
            aggregator.add_shares(sealed)
    deliveries, again = (aggregator.deliveries() for aggregator in aggregators)
    assert deliveries == again
