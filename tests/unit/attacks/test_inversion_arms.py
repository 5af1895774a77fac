"""The attack on a real (small) model: it finds every token in the clear, and none behind a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmos.attacks import inversion_arms, observations
from llmos.attacks.inversion import InversionReport, Observation, Sample, Verdict
from llmos.attacks.observations import Sending
from llmos.attacks.scoring import EncodedRecord
from llmos.attacks.subject import MeasuredModel
from llmos.attacks.vocabulary import in_float32, token_layers
from llmos.engines.dp.plan import GaussianClipping
from llmos.engines.dp.sampling import TrainingRecord
from llmos.errors import MeasurementError
from llmos.models import lora
from llmos.models.encoding import encode
from llmos.models.loading import LoadedModel, load_base
from llmos.models.lora import LoraAdapter, LoraConfig, Parametrisation

SUBJECT = MeasuredModel("m", "00", "tiny", "notes", "11")
TEXTS = (
    "Anna Weber has asthma and takes 12 mg .",
    "Omar Haddad came with chest pain on May 3 .",
    "HIV since 2011 ; insulin stopped .",
    "Lena Fischer fell down the stairs in June .",
    "Migraine with aura , 50 mg at night .",
    "Her brother Tom has diabetes too .",
)
SHORT = "."  # too short to find two tokens in


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> LoadedModel:
    return load_base(tiny_model_folder, torch.device("cpu"))


def sending(noise_multiplier: float | None = None, mask_bits: int = 16) -> Sending:
    privacy = None if noise_multiplier is None else GaussianClipping(1.0, noise_multiplier)
    return Sending(learning_rate=1e-2, bits=4, mask_bits=mask_bits, privacy=privacy)


def records(loaded: LoadedModel) -> list[EncodedRecord]:
    return [encode("", text, loaded.tokenizer, 64) for text in (*TEXTS, SHORT)]


def attached(
    loaded: LoadedModel, kind: Parametrisation = Parametrisation.FFA, **changes: int
) -> LoraAdapter:
    settings = {"rank": 16, "alpha": 32, "parametrisation": kind} | changes
    return lora.attach(loaded.model, LoraConfig(**settings), seed=3)  # type: ignore[arg-type]


def attack(loaded: LoadedModel, adapter: LoraAdapter, how: Sending) -> InversionReport:
    try:
        return inversion_arms.measure(SUBJECT, adapter, records(loaded), how, aggregation="masked")
    finally:
        lora.detach(adapter)


@pytest.mark.parametrize("kind", [Parametrisation.FFA, Parametrisation.SB])
def test_a_record_is_read_off_its_gradient_and_not_off_the_masked_one(
    loaded: LoadedModel, kind: Parametrisation
) -> None:
    dtypes = {name: parameter.dtype for name, parameter in loaded.model.named_parameters()}
    adapter = attached(loaded, kind)
    start = adapter.vector().clone()
    report = attack(loaded, adapter, sending(noise_multiplier=1.0))
    arms = {one.observation: one for one in report.arms}
    assert set(arms) == set(Observation)
    assert (arms[Observation.GRADIENT].records, report.rank) == (6, 16)
    assert report.sample == Sample(offered=7, used=6, cut_to=15)
    assert arms[Observation.GRADIENT].recall == 1.0
    assert arms[Observation.GRADIENT].p_value == 16**-6  # of 16, each the best
    assert 0 < arms[Observation.MASKED].chance < 0.5
    assert arms[Observation.UNMASKED].recall > 0.7  # 16 bits keep the span, its mask hides it
    # By chance a masked or noisy arm falls below 1e-6 once in a million runs.
    assert arms[Observation.MASKED].p_value > 1e-6
    assert arms[Observation.PRIVATE].p_value > 1e-6
    assert report.uniformity.p_value > 1e-6
    assert report.verdict is Verdict.PASS
    assert (report.noise_multiplier, report.clip_norm) == (1.0, 1.0)
    assert all(".0." in name for name in report.layers)
    assert len(report.layers) >= 3  # q, k and v
    assert torch.equal(adapter.vector(), start)
    assert dtypes == {n: p.dtype for n, p in loaded.model.named_parameters()}


def test_masks_that_are_not_put_on_are_noticed(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observations, "masked", lambda plain, _fixed: plain)
    report = attack(loaded, attached(loaded), sending())
    assert report.verdict is Verdict.FAIL
    assert report.arm(Observation.PRIVATE) is None


def test_rounding_that_hides_the_span_by_itself_proves_nothing_of_masks(
    loaded: LoadedModel,
) -> None:
    """Two bits, on this small model: four leave a weak trace, about the false alarm's size."""
    report = attack(loaded, attached(loaded), sending(mask_bits=2))
    control, unmasked = report.arm(Observation.GRADIENT), report.arm(Observation.UNMASKED)
    assert control is not None
    assert unmasked is not None
    assert control.recall == 1.0
    assert unmasked.p_value > 1e-6
    assert report.verdict is Verdict.PROVES_NOTHING


def test_without_a_way_to_succeed_the_attack_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(MeasurementError, match="blocks 1 and up were trained"):
        attack(loaded, attached(loaded, last_layers=1), sending())
    with pytest.raises(MeasurementError, match="no record leaves two tokens to find at rank 2"):
        attack(loaded, attached(loaded, rank=2, alpha=4), sending())


def test_a_layer_is_chosen_for_what_enters_it(loaded: LoadedModel) -> None:
    adapter = attached(loaded)
    try:
        names = [layer.name.rpartition(".")[2] for layer in token_layers(adapter)]
        assert names == ["q_proj", "k_proj", "v_proj"]  # what enters o, up, down is a mixture
        with in_float32(loaded.model):
            widened = {parameter.dtype for parameter in loaded.model.parameters()}
        assert widened == {torch.float32}
    finally:
        lora.detach(adapter)


@pytest.mark.parametrize(
    ("distinct", "ids"), [(2, (5, 6, 5, 7)), (3, (5, 6, 5, 7, 9)), (9, (5, 6, 5, 7, 9, 4))]
)
def test_a_record_is_cut_to_the_tokens_that_an_attack_can_tell(
    distinct: int, ids: tuple[int, ...]
) -> None:
    whole = TrainingRecord(0, (1, 5, 6, 5, 7, 9, 4), 2)
    cut = observations.shorten(whole, distinct)
    assert cut is not None
    assert (cut.ids, cut.labels_from) == (ids, 1)
    assert len(observations.inputs(cut.ids)) <= distinct
    assert observations.shorten(whole, 1) is None


def test_a_message_in_the_clear_is_rounded_as_the_job_says() -> None:
    update = np.linspace(-1, 1, 300, dtype=np.float32)
    assert observations.sent(update, 32) is update
    four = observations.sent(update, 4)
    assert 0 < np.abs(four - update).max() < 0.1
    with pytest.raises(MeasurementError, match="is zero"):
        observations.residues(update * 0, 0.0, 16)
