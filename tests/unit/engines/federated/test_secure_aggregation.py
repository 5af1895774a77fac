"""The protocol from end to end, and the participants' refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.unit.engines.federated.conftest import NAMES, Federation, make_session

from llmos.engines.federated import shamir
from llmos.engines.federated.codec import decode_integers
from llmos.engines.federated.messages import Advertisement, Roster, Survivors, SurvivorSignatures
from llmos.errors import AggregationAborted, EngineError, UpdateRefused

A, B, C, D = NAMES[:4]


@pytest.mark.parametrize("sites", [3, 4, 5, 8, 16])
@pytest.mark.parametrize("bits", [7, 20, 32])
def test_the_sum_is_exact(sites: int, bits: int) -> None:
    federation = Federation(make_session(sites, bits=bits))
    assert np.array_equal(federation.run(), federation.sum_of(federation.sites))


@pytest.mark.parametrize("failing", ["advertise", "share", "mask", "sign", "unmask"])
def test_the_sum_is_exact_with_dropouts_in_any_step(failing: str) -> None:
    federation = Federation(make_session(7))
    gone = NAMES[2:4]  # five of seven are left, as many as the threshold
    total = federation.run(**{failing: gone})
    summands = set(NAMES[:7]) - (set() if failing in {"sign", "unmask"} else set(gone))
    assert np.array_equal(total, federation.sum_of(summands))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), sites=st.integers(3, 9))
def test_any_dropouts_leave_an_exact_sum_or_none(data: st.DataObject, sites: int) -> None:
    federation = Federation(make_session(sites, entries=5))
    steps = ("advertise", "share", "mask", "sign", "unmask")
    when = data.draw(st.dictionaries(st.sampled_from(NAMES[:sites]), st.sampled_from(steps)))
    gone = {step: [site for site in when if when[site] == step] for step in steps}
    enough = sites - len(when) >= federation.session.threshold
    try:
        total = federation.run(**gone)
    except AggregationAborted:
        assert not enough
    else:
        assert enough
        summands = [s for s in federation.sites if when.get(s) not in steps[:3]]
        assert np.array_equal(total, federation.sum_of(summands))


def test_messages_go_through_json() -> None:
    federation = Federation(make_session(4))
    sites, aggregator = federation.sites, federation.aggregator
    for site, participant in sites.items():
        message = participant.advertise().to_dict()
        aggregator.add_advertisement(Advertisement.from_dict(message, site))
    roster = Roster.from_dict(aggregator.roster().to_dict())
    for participant in sites.values():
        sealed = participant.share_keys(roster)
        aggregator.add_shares(type(sealed).from_dict(sealed.to_dict(), sealed.site))
    for site, delivery in aggregator.deliveries().items():
        told = type(delivery).from_dict(delivery.to_dict())
        aggregator.add_input(site, sites[site].mask(told, federation.inputs[site]))
    survivors = Survivors.from_dict(aggregator.survivors().to_dict())
    for participant in sites.values():
        signed = participant.sign_survivors(survivors)
        aggregator.add_signature(type(signed).from_dict(signed.to_dict(), signed.site))
    signatures = SurvivorSignatures.from_dict(aggregator.signatures().to_dict())
    for participant in sites.values():
        shares = participant.unmask(signatures)
        aggregator.add_unmasking(type(shares).from_dict(shares.to_dict(), shares.site))
    assert np.array_equal(aggregator.total(), federation.sum_of(sites))


def test_a_masked_vector_is_uniform_and_never_the_same() -> None:
    """Chi-square of each of the vectors over 256 cells; false alarm 1e-9 each."""
    vectors = []
    for attempt in range(2):
        federation = Federation(make_session(3, entries=1 << 16, bits=18, attempt=attempt))
        deliveries = federation.share_keys(federation.advertise())
        zeros = np.zeros(1 << 16, dtype=np.uint32)
        for site, participant in federation.sites.items():
            data = participant.mask(deliveries[site], zeros)
            vectors.append(decode_integers(data, federation.session.update, site))
    for vector in vectors:
        for cells in (vector >> np.uint32(10), vector & np.uint32(255)):
            assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-9
    for one, other in combinations(vectors, 2):
        assert (one != other).mean() > 0.99


def test_each_mask_is_needed() -> None:
    """Without its own mask a survivor's vector stays uniform: both kinds have to come off."""
    federation = Federation(make_session(3, entries=1 << 16, bits=18))
    deliveries = federation.share_keys(federation.advertise())
    zeros = np.zeros(1 << 16, dtype=np.uint32)
    total = np.zeros(1 << 16, dtype=np.uint32)
    for site, participant in federation.sites.items():
        data = participant.mask(deliveries[site], zeros)
        total += decode_integers(data, federation.session.update, site)
    total &= np.uint32(2**18 - 1)  # pairwise masks are gone, the self masks are not
    counts = np.bincount(total >> np.uint32(10), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-9


def test_two_sites_and_the_coordinator_do_not_unmask_the_third() -> None:
    """At t = 3 they hold two shares of each of its secrets, and no site gives both kinds."""
    federation = Federation(make_session(3))
    federation.mask(federation.share_keys(federation.advertise()))
    survivors = federation.aggregator.survivors()
    for participant in federation.sites.values():
        federation.aggregator.add_signature(participant.sign_survivors(survivors))
    signatures = federation.aggregator.signatures()
    released = [federation.sites[site].unmask(signatures) for site in (A, B)]
    held = {federation.session.position(m.site): m.self_masks[C] for m in released}
    with pytest.raises(AggregationAborted, match="2 of the 3 shares"):
        shamir.reconstruct(held, threshold=3, owner=C)
    for message in released:
        federation.aggregator.add_unmasking(message)
    with pytest.raises(AggregationAborted, match=f"nothing came from {C}"):
        federation.aggregator.total()


@pytest.mark.parametrize("dropouts", [0, 2])
def test_of_each_site_one_kind_of_share_is_released(dropouts: int) -> None:
    federation = Federation(make_session(7))
    gone = set(NAMES[:dropouts])
    deliveries = federation.share_keys(federation.advertise())
    federation.mask(deliveries, without=gone)
    survivors = federation.aggregator.survivors()
    for site in survivors.sites:
        federation.aggregator.add_signature(federation.sites[site].sign_survivors(survivors))
    signatures = federation.aggregator.signatures()
    for site in survivors.sites:
        message = federation.sites[site].unmask(signatures)
        assert set(message.masking_keys) == gone
        assert set(message.self_masks) == set(federation.sites) - gone


def up_to_masking(sites: int = 7) -> Federation:
    federation = Federation(make_session(sites))
    federation.mask(federation.share_keys(federation.advertise()))
    return federation


def test_a_coordinator_that_shows_different_lists_is_refused() -> None:
    federation = up_to_masking()
    session, sites = federation.session, federation.sites
    one, other = tuple(NAMES[:7]), tuple(NAMES[:6])
    shown = {site: other if site == B else one for site in one}
    signed = {
        site: sites[site].sign_survivors(Survivors(session.digest, shown[site])).signature
        for site in one
    }
    everyone = SurvivorSignatures(session.digest, signed)
    with pytest.raises(UpdateRefused, match="not over this list") as refused:
        sites[A].unmask(everyone)
    assert refused.value.site == B
    with pytest.raises(UpdateRefused, match="sites that did not survive"):
        sites[B].unmask(everyone)
    # the six that saw one list have a threshold; the one that saw another is left alone
    without_b = {site: signature for site, signature in signed.items() if site != B}
    sites[C].unmask(SurvivorSignatures(session.digest, without_b))


def test_a_site_that_signed_one_list_signs_no_other() -> None:
    federation = up_to_masking()
    participant = federation.sites[A]
    digest = federation.session.digest
    participant.sign_survivors(Survivors(digest, NAMES[:7]))
    with pytest.raises(UpdateRefused, match="CONSISTENCY_CHECK is out of turn: UNMASKING is due"):
        participant.sign_survivors(Survivors(digest, NAMES[:6]))
    with pytest.raises(UpdateRefused, match="out of turn: FAILED"):
        participant.unmask(SurvivorSignatures(digest, {}))


def signed_by(federation: Federation, sites: tuple[str, ...]) -> SurvivorSignatures:
    survivors = federation.aggregator.survivors()
    signed = {site: federation.sites[site].sign_survivors(survivors).signature for site in sites}
    return SurvivorSignatures(federation.session.digest, signed)


def test_nothing_is_released_for_fewer_signatures_than_the_threshold() -> None:
    federation = up_to_masking()
    with pytest.raises(AggregationAborted, match="4 of 7 sites signed"):
        federation.sites[A].unmask(signed_by(federation, NAMES[:4]))


def test_nothing_is_released_for_signatures_of_another_attempt() -> None:
    first = up_to_masking()
    second = Federation(make_session(7, attempt=1), keys=first.keys)
    second.mask(second.share_keys(second.advertise()))
    old, new = signed_by(first, NAMES[:7]), signed_by(second, NAMES[:7])
    with pytest.raises(UpdateRefused, match="another job, round, attempt"):
        second.sites[A].unmask(old)
    with pytest.raises(UpdateRefused, match="not over this list"):
        second.sites[B].unmask(replace(new, signatures=old.signatures))


def test_two_runs_of_one_attempt_lend_each_other_no_signature() -> None:
    first = up_to_masking()
    again = Federation(first.session, keys=first.keys)
    again.mask(again.share_keys(again.advertise()))
    signed_by(again, NAMES[:7])
    with pytest.raises(UpdateRefused, match="not over this list"):
        again.sites[A].unmask(signed_by(first, NAMES[:7]))


def test_sealed_shares_that_were_changed_name_the_sender() -> None:
    federation = Federation(make_session(4))
    deliveries = federation.share_keys(federation.advertise())
    shares = dict(deliveries[A].shares)
    shares[C] = bytes([shares[C][0] ^ 1, *shares[C][1:]])
    deliveries[A] = replace(deliveries[A], shares=shares)
    federation.mask(deliveries)
    signatures = signed_by(federation, NAMES[:4])
    with pytest.raises(UpdateRefused, match="do not open") as refused:
        federation.sites[A].unmask(signatures)
    assert refused.value.site == C
    assert federation.sites[B].unmask(signatures).self_masks.keys() == federation.sites.keys()


@pytest.mark.parametrize("how", ["senders", "receivers"])
def test_sealed_shares_open_between_their_two_sites_only(how: str) -> None:
    federation = Federation(make_session(4))
    deliveries = federation.share_keys(federation.advertise())
    shares = dict(deliveries[A].shares)
    if how == "senders":
        shares[B], shares[C] = shares[C], shares[B]
    else:
        shares[B] = deliveries[C].shares[B]
    deliveries[A] = replace(deliveries[A], shares=shares)
    federation.mask(deliveries)
    with pytest.raises(UpdateRefused, match="do not open") as refused:
        federation.sites[A].unmask(signed_by(federation, NAMES[:4]))
    assert refused.value.site == B


def test_sealed_shares_of_another_attempt_do_not_open() -> None:
    first = Federation(make_session(4))
    old = first.share_keys(first.advertise())
    second = Federation(make_session(4, attempt=1), keys=first.keys)
    new = second.share_keys(second.advertise())
    with pytest.raises(UpdateRefused, match="another job, round, attempt"):
        second.sites[B].mask(old[B], second.inputs[B])
    new[A] = replace(new[A], shares={**new[A].shares, C: old[A].shares[C]})
    second.mask(new, without={B})
    with pytest.raises(UpdateRefused, match="do not open") as refused:
        second.sites[A].unmask(signed_by(second, (A, C, D)))
    assert refused.value.site == C


def with_row(roster: Roster, row: Advertisement) -> Roster:
    rows = [row if a.site == row.site else a for a in roster.advertisements]
    return replace(roster, advertisements=tuple(rows))


def test_a_coordinator_in_the_middle_is_refused_by_the_signature() -> None:
    federation = Federation(make_session(4))
    roster = federation.advertise()
    own = Federation(make_session(4)).sites[B].advertise()  # the coordinator's keys in B's name
    for forged in (own, replace(own, signature=roster.advertisements[1].signature)):
        victim = federation.participant(A)
        genuine = with_row(roster, victim.advertise())
        with pytest.raises(UpdateRefused, match="not signed by it") as refused:
            victim.share_keys(with_row(genuine, forged))
        assert refused.value.site == B


def test_keys_of_another_attempt_or_swapped_are_refused() -> None:
    first = Federation(make_session(4))
    old = first.advertise().advertisements[1]
    second = Federation(make_session(4, attempt=1), keys=first.keys)
    roster = second.advertise()
    genuine = roster.advertisements[1]
    swapped = replace(genuine, sealing_key=genuine.masking_key, masking_key=genuine.sealing_key)
    for forged, reason in (
        (old, "another job, round, attempt"),
        (replace(old, session=second.session.digest), "not signed by it"),
        (swapped, "not signed by it"),
    ):
        victim = second.participant(A)
        rows = with_row(with_row(roster, victim.advertise()), forged)
        with pytest.raises(UpdateRefused, match=reason) as refused:
            victim.share_keys(rows)
        assert refused.value.site == B


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows[1:], "does not hold the keys of site-a"),
        (lambda rows: (*rows, rows[1]), "names a site twice"),
        (lambda rows: (*rows, replace(rows[1], site="stranger")), "or a stranger"),
        (lambda rows: (replace(rows[0], signature=b""), *rows[1:]), "hold the keys of site-a"),
    ],
)
def test_a_roster_that_is_none_is_refused(
    change: Callable[[tuple[Advertisement, ...]], tuple[Advertisement, ...]], reason: str
) -> None:
    federation = Federation(make_session(5, threshold=3))
    roster = federation.advertise()
    with pytest.raises(UpdateRefused, match=reason):
        federation.sites[A].share_keys(
            replace(roster, advertisements=change(roster.advertisements))
        )


def test_a_roster_below_the_threshold_is_refused() -> None:
    federation = Federation(make_session(4))
    roster = federation.advertise()
    with pytest.raises(AggregationAborted, match="2 of 4 sites advertised keys; 3 are needed"):
        federation.sites[A].share_keys(replace(roster, advertisements=roster.advertisements[:2]))


def test_a_key_that_two_sites_advertise_is_refused() -> None:
    federation = Federation(make_session(4))
    roster = federation.advertise()
    copied = roster.advertisements[1].sealing_key
    masking = roster.advertisements[2].masking_key
    statement = federation.session.key_statement(C, copied, masking)
    row = Advertisement(
        federation.session.digest, C, copied, masking, federation.keys[C].sign(statement)
    )
    with pytest.raises(UpdateRefused, match="holds a key twice"):
        federation.sites[A].share_keys(with_row(roster, row))


@pytest.mark.parametrize(
    ("survivors", "reason"),
    [
        (NAMES[1:7], "leaves site-a out"),
        ((*NAMES[:6], "stranger"), "list of survivors is none"),
        ((*NAMES[:6], NAMES[0]), "list of survivors is none"),
        (tuple(reversed(NAMES[:6])), "list of survivors is none"),
    ],
)
def test_a_list_of_survivors_that_is_none_is_refused(
    survivors: tuple[str, ...], reason: str
) -> None:
    federation = up_to_masking()
    with pytest.raises(UpdateRefused, match=reason):
        federation.sites[A].sign_survivors(Survivors(federation.session.digest, survivors))


def test_a_list_of_survivors_below_the_threshold_is_refused() -> None:
    federation = up_to_masking()
    with pytest.raises(AggregationAborted, match="4 of 7 sites gave an input"):
        federation.sites[A].sign_survivors(Survivors(federation.session.digest, NAMES[:4]))


def test_deliveries_of_strangers_or_too_few_are_refused() -> None:
    federation = Federation(make_session(5))
    deliveries = federation.share_keys(federation.advertise())
    sealed = deliveries[A].shares[B]
    for site, stranger in ((A, "stranger"), (C, C)):
        wrong = {**deliveries[site].shares, stranger: sealed}
        with pytest.raises(UpdateRefused, match="advertised no keys"):
            federation.sites[site].mask(
                replace(deliveries[site], shares=wrong), federation.inputs[site]
            )
    with pytest.raises(AggregationAborted, match="3 of 5 sites shared their keys; 4 are needed"):
        federation.sites[B].mask(
            replace(deliveries[B], shares={s: sealed for s in (A, C)}), federation.inputs[B]
        )


@pytest.mark.parametrize(
    "residues", [np.zeros(49, np.uint32), np.full(50, 1 << 20, np.uint32)], ids=["short", "large"]
)
def test_an_input_that_does_not_fit_is_refused(
    residues: np.ndarray[tuple[int], np.dtype[np.uint32]],
) -> None:
    federation = Federation(make_session(4))
    deliveries = federation.share_keys(federation.advertise())
    with pytest.raises(ValueError, match="the input is not 50 integers"):
        federation.sites[A].mask(deliveries[A], residues)


def test_masking_leaves_the_input_as_it_was() -> None:
    federation = Federation(make_session(4))
    deliveries = federation.share_keys(federation.advertise())
    before = federation.inputs[A].copy()
    federation.sites[A].mask(deliveries[A], federation.inputs[A])
    assert np.array_equal(federation.inputs[A], before)


def test_steps_are_taken_in_their_order_and_once() -> None:
    federation = Federation(make_session(4))
    roster = federation.advertise()
    participant = federation.sites[A]
    with pytest.raises(UpdateRefused, match="ADVERTISE_KEYS is out of turn: SHARE_KEYS is due"):
        participant.advertise()
    with pytest.raises(UpdateRefused, match="SHARE_KEYS is out of turn: FAILED is due"):
        participant.share_keys(roster)
    fresh = federation.participant(B)
    with pytest.raises(UpdateRefused, match="SHARE_KEYS is out of turn: ADVERTISE_KEYS is due"):
        fresh.share_keys(roster)


def test_a_stranger_takes_no_part() -> None:
    federation = Federation(make_session(4), keys={})
    federation.keys["stranger"] = federation.keys[A]
    with pytest.raises(EngineError, match="stranger is no site"):
        federation.participant("stranger")


def test_secrets_are_not_printed() -> None:
    participant = Federation(make_session(4)).sites[A]
    text = repr(participant) + repr(participant.advertise())
    assert participant._self_mask_seed.hex() not in text
    assert repr(participant._self_mask_seed) not in text
