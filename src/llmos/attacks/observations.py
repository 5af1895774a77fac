"""What a coordinator holds of a single record, made by the code that a site runs.

One record and one step is the best that can happen to the attack: in a real round other records
and further steps are mixed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from scipy.stats import chisquare

from llmos.attacks.inversion import Uniformity
from llmos.attacks.scoring import EncodedRecord
from llmos.engines.dp import selftest
from llmos.engines.dp.plan import AdamWSettings, DPPlan, GaussianClipping, Performance
from llmos.engines.dp.rounds import train_round
from llmos.engines.dp.run import prepare
from llmos.engines.dp.sampling import TrainingRecord
from llmos.engines.federated import fixed_point, quantisation
from llmos.engines.federated.aggregator import Aggregator
from llmos.engines.federated.codec import Encoding, Header, decode_integers
from llmos.engines.federated.fixed_point import FixedPoint
from llmos.engines.federated.secure_aggregation import Participant
from llmos.engines.federated.session import Session
from llmos.errors import MeasurementError
from llmos.models.lora import LoraAdapter

_SITES: Final = ("site-a", "site-b", "site-c")
_CELLS_BITS: Final = 8  # of an integer's highest and of its lowest bits
Vector = NDArray[np.float32]
Residues = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Sending:
    """How the job's sites make their messages."""

    learning_rate: float
    bits: int  # of an entry sent in the clear: 4, 8 or 32
    mask_bits: int  # of an entry before the mask
    privacy: GaussianClipping | None

    @property
    def modulus_bits(self) -> int:
        """Return how many bits a masked entry has, with room for the sum of three sites."""
        return FixedPoint(1.0, self.mask_bits, len(_SITES)).modulus_bits


def shorten(record: EncodedRecord, distinct: int) -> TrainingRecord | None:
    """Cut a record to its labels' beginning, with at most `distinct` different input tokens.

    The last token is never read, only predicted: it leaves no trace in the first block. None if
    what is left has fewer than two different tokens.
    """
    ids = record.ids[record.labels_from - 1 :]
    length = 1
    while length < len(ids) and len(set(ids[:length])) <= distinct:
        length += 1
    cut = ids[:length]
    return None if len(inputs(cut)) < 2 else TrainingRecord(0, cut, 1)  # noqa: PLR2004


def inputs(ids: Sequence[int]) -> set[int]:
    """Return the different tokens that a model reads of a record, its last one left out."""
    return set(ids[:-1])


def gradient(adapter: LoraAdapter, record: TrainingRecord, start: torch.Tensor) -> Vector:
    """Return a record's gradient (P,) at `start` by ordinary autograd."""
    adapter.load_vector(start)
    found = selftest.reference(adapter, record).gradient
    return np.asarray(found.float().cpu().numpy(), dtype=np.float32)


def stepped(
    adapter: LoraAdapter,
    record: TrainingRecord,
    start: torch.Tensor,
    sending: Sending,
    performance: Performance,
    *,
    private: bool,
) -> Vector:
    """Return the update (P,) of one step of the engine on this record alone.

    With privacy the record is drawn for sure and no other is: only clipping and noise hide it.
    """
    plan = DPPlan(
        units=1,
        expected_batch_units=1.0,
        steps=1,
        privacy=sending.privacy if private else None,
        optimizer=AdamWSettings(learning_rate=sending.learning_rate),
    )
    run = prepare(adapter, [record], plan, performance)
    trained = train_round(run, start, first_step=0, steps=1)
    return np.asarray((trained.weights - start.to(trained.weights.device)).cpu().numpy())


def sent(update: Vector, bits: int) -> Vector:
    """Return what arrives of an update that is sent in the clear."""
    if bits not in quantisation.BITS:
        return update
    blocks, _left = quantisation.quantise(update, bits=bits)
    return blocks.vector


def residues(update: Vector, limit: float, bits: int) -> tuple[Residues, FixedPoint]:
    """Return an update as integers mod 2^k; entries beyond the limit are cut off, as at a site."""
    if not limit > 0:
        raise MeasurementError("this record's gradient in the first block is zero")
    fixed = FixedPoint(limit, bits, len(_SITES))
    return fixed_point.to_residues(update, fixed, fixed_point.fresh_generator()), fixed


def masked(plain: Residues, fixed: FixedPoint) -> Residues:
    """Return what the coordinator sees of one site of three: protocol and masks are the engine's.

    The other two do what hides it, which is to agree on masks and to share their keys.
    """
    header = Header(Encoding.INTEGERS, bytes(32), plain.size, 0, 0, fixed.modulus_bits)
    session = Session("inversion", _SITES, len(_SITES), header)
    keys = {site: Ed25519PrivateKey.generate() for site in _SITES}

    def verify(site: str, message: bytes, signature: bytes) -> bool:
        try:
            keys[site].public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True

    sites = [Participant(session, site, sign=keys[site].sign, verify=verify) for site in _SITES]
    aggregator = Aggregator(session, verify)
    for participant in sites:
        aggregator.add_advertisement(participant.advertise())
    roster = aggregator.roster()
    for participant in sites:
        aggregator.add_shares(participant.share_keys(roster))
    body = sites[0].mask(aggregator.deliveries()[_SITES[0]], plain)
    return decode_integers(body, header, _SITES[0])


def uniformity(seen: Sequence[Residues], bits: int) -> Uniformity:
    """Test whether integers below 2^bits are uniform, by their highest and their lowest bits."""
    cells = 2 ** min(_CELLS_BITS, bits)
    shift = np.uint32(bits - min(_CELLS_BITS, bits))
    high, low = np.zeros(cells, dtype=np.int64), np.zeros(cells, dtype=np.int64)
    for integers in seen:
        high += np.bincount(integers >> shift, minlength=cells)
        low += np.bincount(integers & np.uint32(cells - 1), minlength=cells)
    smaller = min(float(chisquare(counts).pvalue) for counts in (high, low))
    return Uniformity(int(high.sum()), min(1.0, 2 * smaller))
