"""Gradient inversion: which tokens of a record its update betrays to whoever sees it.

In the first block a token enters the layers q, k and v as x_v, whatever stands around it. With A
frozen and known, the gradient of B is sum_t g_t (A x_t)^T over the record's positions: its rows lie
in the span of the A x_v of the record's tokens. Whoever holds the base model can compute A x_v for
every token of the vocabulary and ask which lie in that span, as long as the record has fewer
distinct tokens than the adapter has ranks. Source: the span check of DAGER (Petrov et al. 2024,
arXiv:2405.15586, section 4), there for full gradients; it is their first step, without the search
for the tokens' order.

A lower bound on what can be learnt: an attack that fails shows no more than that this one fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal

import numpy as np
import rfc8785
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from llmos.attacks.membership import auc
from llmos.attacks.subject import MeasuredModel
from llmos.errors import MeasurementError

INVERSION_SCHEMA: Final = "llmos.inversion-report/v1"
# In float32 tokens of a record came as near as 1e-6, others not nearer than 7e-4 (SmolLM2-135M,
# rank 16, up to 15 distinct tokens).
SPAN_DISTANCE: Final = 1e-4
CONTROL_RECALL: Final = 0.5  # what the positive control has to recover
FALSE_ALARM: Final = 1e-6  # of the verdict that masks do not hide, for each of its two tests
# Of noise for each record: with 15, records that are all told apart from it give a p-value of
# 16^-records, so that it takes five of them to fail the masks by guesses.
DRAWS: Final = 15
_NEAREST: Final = 1e-12  # distances below are rounding
Values = NDArray[np.float64]


class Observation(StrEnum):
    """What the coordinator holds of one record in one arm."""

    GRADIENT = "gradient"  # its float32 gradient: the positive control
    SENT = "sent"  # one AdamW step in quantised blocks: a site's message in the clear
    UNMASKED = "unmasked"  # the gradient as integers mod 2^k, before the mask
    MASKED = "masked"  # the same behind the mask: a site's message under secure aggregation
    PRIVATE = "private"  # one AdamW step on the clipped and noisy gradient


class Verdict(StrEnum):
    """What the test says about the masks; that it fails to recover is no proof of safety."""

    PASS = "pass"  # noqa: S105 - nothing is seen behind the mask, and without it there is
    FAIL = "fail"  # tokens, or a pattern, are seen behind the mask
    NO_MASKS = "no-masks"  # the job has none: its coordinator sees each update
    PROVES_NOTHING = "proves-nothing"  # without the mask nothing is seen either


@dataclass(frozen=True, slots=True)
class Guess:
    """What the attack made of one record's update; never kept, for it tells of the record."""

    hits: int  # right ones among as many guesses as the record has distinct tokens
    distinct: int
    auc: float  # of the record's tokens against all others
    candidates: int  # tokens within SPAN_DISTANCE of the span


@dataclass(frozen=True, slots=True)
class InversionArm:
    """How much of the records was recovered from one kind of observation, over all of them."""

    observation: Observation
    records: int
    tokens: int  # distinct in each record, added up
    recall: float  # hits / tokens
    chance: float  # what noise recalls on average
    p_value: float  # that noise recalls as much; exact of what is masked, else for comparison
    auc: float  # mean over the records; 0.5 is chance
    candidates: float  # mean number of tokens that pass the span check


@dataclass(frozen=True, slots=True)
class Uniformity:
    """A chi-square test of the masked integers' highest and lowest bits."""

    integers: int
    p_value: float  # smaller one, times the two tests


@dataclass(frozen=True, slots=True)
class Sample:
    """Which records were attacked, and how much of each."""

    offered: int
    used: int  # the others have fewer than two tokens to find
    cut_to: int  # distinct tokens at most: a longer record would escape even in the clear

    @property
    def guesses_can_fail(self) -> bool:
        """Tell whether guesses at so few records could fail the masks, were all of them right."""
        return self.used > math.log(1 / FALSE_ALARM, 1 + DRAWS)


@dataclass(frozen=True, slots=True)
class InversionReport:
    """Aggregates over a few records of one site; no token of any of them is in it."""

    subject: MeasuredModel
    sample: Sample
    parametrisation: str
    rank: int
    layers: tuple[str, ...]  # whose inputs depend on nothing but the token
    vocabulary: int
    aggregation: Literal["masked", "plain"]  # of the job
    noise_multiplier: float | None  # of the job; None without privacy
    clip_norm: float | None
    arms: tuple[InversionArm, ...]
    uniformity: Uniformity

    @property
    def model(self) -> str:
        """Return the measured model's name."""
        return self.subject.model

    def arm(self, observation: Observation) -> InversionArm | None:
        """Return an arm; None where it was not run."""
        return next((arm for arm in self.arms if arm.observation is observation), None)

    @property
    def failed(self) -> bool:
        """Tell whether the masks do not hide what they should."""
        return self.verdict is Verdict.FAIL

    @property
    def coordinator_sees(self) -> Observation:
        """Return which of the observations is the one that this job's coordinator has."""
        if self.aggregation == "masked":
            return Observation.MASKED
        return Observation.SENT if self.noise_multiplier is None else Observation.PRIVATE

    @property
    def verdict(self) -> Verdict:
        """Judge the masks: what is seen behind one fails them, whatever else the attack can do.

        They pass only a test that the same integers without a mask fail.
        """
        masked = self.arm(Observation.MASKED)
        if self.uniformity.p_value < FALSE_ALARM or _beats_noise(masked):
            return Verdict.FAIL
        if self.aggregation == "plain":
            return Verdict.NO_MASKS
        control = self.arm(Observation.GRADIENT)
        works = control is not None and control.recall >= CONTROL_RECALL
        if masked is None or not (works and _beats_noise(self.arm(Observation.UNMASKED))):
            return Verdict.PROVES_NOTHING
        return Verdict.PASS


def _beats_noise(arm: InversionArm | None) -> bool:
    return arm is not None and arm.p_value < FALSE_ALARM


def span_complement(update: Values, distinct: int) -> Values:
    """Return (rank, rank - distinct) directions that a gradient's rows have least in."""
    _, _, right = np.linalg.svd(update, full_matrices=True)
    return np.asarray(right[distinct:].T)


def sign_complement(update: Values, candidates: Values, distinct: int) -> Values:
    """Return the same from the signs alone: Adam's first step leaves nothing else of a gradient.

    If rows were Gaussian with correlations C, those of their signs would be 2/pi arcsin(C); what
    the signs do not tell, the columns' sizes, is taken from the candidates. On SmolLM2-135M this
    found the span better than the signs' own singular vectors (AUC 0.81 against 0.71).
    """
    signs = np.sign(update)
    correlations = np.sin(np.pi / 2 * (signs.T @ signs) / len(signs))
    sizes = candidates.std(axis=0)
    _, vectors = np.linalg.eigh(correlations * sizes[:, None] * sizes)  # smallest first
    return np.asarray(vectors[:, : update.shape[1] - distinct])


def span_distances(
    observation: Observation,
    updates: Sequence[Values],
    candidates: Sequence[Values],
    distinct: int,
) -> Values:
    """Return (V,) how far each token's vector is from the update's row space, 0 to 1.

    It is the sine of the angle, as a geometric mean over the layers: a token may be missing in one
    of them (the first position attends to nothing else, so its q has no gradient).

    Args:
        observation: decides what is known of the rows: the rows, or their signs.
        updates: a (rows, rank) matrix of each layer.
        candidates: (V, rank) of each layer, the vector of every token.
        distinct: of the record's tokens; the attack is told.

    Raises:
        MeasurementError: tokens and rank leave no direction to tell by, or sizes do not fit.
    """
    total = np.zeros(len(candidates[0]))
    for update, vectors in zip(updates, candidates, strict=True):
        rank = vectors.shape[1]
        if update.shape[1] != rank or not 1 <= distinct < rank:
            raise MeasurementError(
                f"an update {update.shape} and {distinct} tokens do not suit vectors of rank {rank}"
            )
        if observation is Observation.SENT:
            missing = sign_complement(update, vectors, distinct)
        else:
            missing = span_complement(update, distinct)
        norms = np.linalg.norm(vectors, axis=1)
        outside = np.linalg.norm(vectors @ missing, axis=1)
        sine = np.divide(outside, norms, out=np.ones_like(norms), where=norms > 0)
        total += np.log(np.maximum(sine, _NEAREST))
    return np.asarray(np.exp(total / len(candidates)))


def guess(distances: Values, tokens: Sequence[int]) -> Guess:
    """Guess as many tokens as the record has, the nearest ones, and count the right ones."""
    truth = np.unique(np.asarray(tokens))
    inside = np.zeros(len(distances), dtype=np.bool_)
    inside[truth] = True
    nearest = np.argsort(distances, kind="stable")[: len(truth)]
    area, _ = auc(-distances[inside], -distances[~inside])
    return Guess(
        hits=int(inside[nearest].sum()),
        distinct=len(truth),
        auc=area,
        candidates=int((distances < SPAN_DISTANCE).sum()),
    )


def summarise(
    observation: Observation, guesses: Sequence[Guess], noise: Sequence[Sequence[int]]
) -> InversionArm:
    """Add up the guesses at all records, beside those from noise that knows nothing of them.

    Chance is measured, not computed: the tokens of a text lie close together, so that noise hits
    several of them where guesses all over the vocabulary would hit one (six times as often, on
    SmolLM2-135M). If what was seen of a record is such noise too, then its hits and the noise's may
    be exchanged; the p-value is exact under that (a permutation within each record). So it is a
    test of masks; of what is seen in the clear it only says how noise would have done.

    Args:
        observation: what was seen.
        guesses: from it, one a record.
        noise: of each record, the hits from each draw of noise.

    Raises:
        MeasurementError: there is no record, or no noise.
    """
    if not guesses or not all(noise):
        raise MeasurementError("no record to measure on")
    hits, tokens = sum(g.hits for g in guesses), sum(g.distinct for g in guesses)
    exchanged = np.ones(1)  # distribution of the hits of all records
    for one, draws in zip(guesses, noise, strict=True):
        counts = np.bincount([one.hits, *draws])
        exchanged = np.convolve(exchanged, counts / counts.sum())
    return InversionArm(
        observation=observation,
        records=len(guesses),
        tokens=tokens,
        recall=hits / tokens,
        chance=sum(float(np.mean(draws)) for draws in noise) / tokens,
        p_value=min(1.0, float(exchanged[hits:].sum())),
        auc=float(np.mean([g.auc for g in guesses])),
        candidates=float(np.mean([g.candidates for g in guesses])),
    )


_ADAPTER: Final = TypeAdapter(InversionReport)


def to_document(report: InversionReport) -> dict[str, Any]:
    """Describe the report as plain JSON values, with its schema and what follows from them."""
    fields: dict[str, Any] = _ADAPTER.dump_python(report, mode="json")
    return {
        "schema": INVERSION_SCHEMA,
        "verdict": str(report.verdict),
        "guesses_can_fail": report.sample.guesses_can_fail,
        "coordinator_sees": str(report.coordinator_sees),
        **fields,
    }


def to_json(report: InversionReport) -> bytes:
    """Encode the report as canonical JSON (RFC 8785)."""
    return rfc8785.dumps(to_document(report))


def from_json(data: bytes) -> InversionReport:
    """Read a report that `to_json` wrote.

    Raises:
        MeasurementError: it is anything else; also a verdict that the numbers do not bear out.
    """
    try:
        report = _ADAPTER.validate_json(data)
        same = to_json(report) == data
    except (ValidationError, rfc8785.CanonicalizationError) as error:
        raise MeasurementError("this is not an inversion report") from error
    if not same:
        raise MeasurementError(
            "this inversion report is not what LLMOS wrote: schema, verdict or a field was changed",
            hint="measure with --inversion again",
        )
    return report
