"""Clipped sums against a plain loop over units, and the properties that privacy rests on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.unit.engines.dp.conftest import MakeAdapter, make_records
from torch import Tensor, nn

from llmos.engines.dp.clipping import (
    ClippedUnits,
    RecordedProduct,
    Recorder,
    SummedGradients,
    UnitGradients,
)
from llmos.engines.dp.kernels import Fusion, Scratch
from llmos.engines.dp.loss import LanguageModel, collate, losses
from llmos.engines.dp.sampling import Microbatch
from llmos.engines.dp.selftest import reference
from llmos.errors import SelfTestFailed
from llmos.models.lora import LoraAdapter, Parametrisation

CLIP_NORM = 0.3
RECORDS = make_records([24, 12, 21, 5, 24, 9], [0, 1, 2, 3, 3, 0])
UNITS = (0, 1, 2, 3, 3, 0)


def record(
    adapter: LoraAdapter, recorder: Recorder, rows: Sequence[int], units: Sequence[int]
) -> Tensor:
    """Run one microbatch; return the records' losses."""
    parts = LanguageModel.of(adapter.model)
    microbatch = Microbatch(tuple(rows), tuple(units), len(set(units)))
    batch = collate(RECORDS, microbatch, "cpu")
    with Fusion.of(parts.body).active(), adapter.using(RecordedProduct(recorder, Scratch())):
        hidden = parts.body(input_ids=batch.ids, use_cache=False).last_hidden_state
        objective, per_record = losses(parts, batch, hidden)
        objective.backward()  # type: ignore[no-untyped-call]
    return per_record


def clipped_sum(
    adapter: LoraAdapter,
    rows: Sequence[int] = range(6),
    units: Sequence[int] = UNITS,
    clip_norm: float = CLIP_NORM,
) -> tuple[Tensor, ClippedUnits]:
    total = torch.zeros_like(adapter.vector())
    recorder = UnitGradients(adapter, torch.tensor(units), len(set(units)))
    record(adapter, recorder, rows, units)
    return total, recorder.add_clipped(total, clip_norm)


def loop(adapter: LoraAdapter) -> tuple[Tensor, Tensor]:
    """Return each unit's norm and the clipped sum, one record at a time, without padding."""
    gradients = []
    for unit in range(4):
        own = [r for r, u in zip(RECORDS, UNITS, strict=True) if u == unit]
        rows = [reference(adapter, r).gradient.double() for r in own]
        gradients.append(torch.stack(rows).mean(0))
    norms = torch.stack([gradient.norm() for gradient in gradients])
    factors = (CLIP_NORM / norms).clamp(max=1.0)
    return norms, sum(f * g for f, g in zip(factors, gradients, strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 2e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize("kind", Parametrisation)
def test_clipped_sum_equals_the_loop(
    make_adapter: MakeAdapter,
    kind: Parametrisation,
    dtype: torch.dtype,
    tolerance: float,
    last_layers: int | None,
) -> None:
    adapter = make_adapter(dtype, last_layers=last_layers, parametrisation=kind)
    norms, expected = loop(adapter)
    total, clipped = clipped_sum(adapter)
    assert bool((clipped.coefficients < 1).any())
    torch.testing.assert_close(clipped.norms, norms, rtol=tolerance, atol=0)
    assert (total.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kind", Parametrisation)
def test_plain_sum_equals_the_loop(make_adapter: MakeAdapter, kind: Parametrisation) -> None:
    adapter = make_adapter(parametrisation=kind)
    total = torch.zeros_like(adapter.vector())
    recorder = SummedGradients(adapter, total)
    record(adapter, recorder, range(6), range(6))
    recorder.check()
    expected = sum(reference(adapter, r).gradient for r in RECORDS)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


def test_losses_are_those_of_the_model(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    recorder = SummedGradients(adapter, torch.zeros_like(adapter.vector()))
    found = record(adapter, recorder, range(6), UNITS)
    for row, one in enumerate(RECORDS):
        labels = torch.tensor([(-100,) * one.labels_from + one.ids[one.labels_from :]])
        expected = adapter.model(input_ids=torch.tensor([one.ids]), labels=labels).loss
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", Parametrisation)
def test_no_unit_moves_the_sum_by_more_than_the_clip_norm(
    make_adapter: MakeAdapter, kind: Parametrisation
) -> None:
    adapter = make_adapter(parametrisation=kind)
    for clip_norm in (1e-6, 1e-3, 0.3):
        whole, _ = clipped_sum(adapter, clip_norm=clip_norm)
        for unit in range(4):
            rows = [row for row in range(6) if UNITS[row] == unit]
            alone, clipped = clipped_sum(adapter, rows, [0] * len(rows), clip_norm)
            assert alone.double().norm() <= clip_norm
            assert clipped.coefficients.item() > 0
            others = [row for row in range(6) if UNITS[row] != unit]
            names = sorted({UNITS[row] for row in others})
            rest, _ = clipped_sum(
                adapter, others, [names.index(UNITS[r]) for r in others], clip_norm
            )
            assert (whole - rest).double().norm() <= clip_norm * (1 + 1e-4)


def test_small_gradients_are_left_alone(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    total, clipped = clipped_sum(adapter, clip_norm=1e9)
    expected, _ = clipped_sum(adapter, clip_norm=2e9)
    assert clipped.coefficients.tolist() == pytest.approx([1.0] * 4, rel=1e-5)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)


def test_microbatches_do_not_change_the_sum(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    whole, _ = clipped_sum(adapter)
    parts = [clipped_sum(adapter, [0, 5], [0, 0])[0], clipped_sum(adapter, [1, 2], [0, 1])[0]]
    parts.append(clipped_sum(adapter, [4, 3], [0, 0])[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_unit_without_a_finite_gradient_adds_nothing(
    make_adapter: MakeAdapter, value: float
) -> None:
    """Rows are independent, so a poisoned embedding poisons only the unit that uses its token."""
    adapter = make_adapter()
    poisoned = RECORDS[1].ids[0]
    assert all(poisoned not in RECORDS[row].ids for row in (0, 2, 3, 4, 5))
    expected, _ = clipped_sum(adapter, [0, 2, 3, 4, 5], [0, 1, 2, 2, 0])
    embedding = adapter.model.get_input_embeddings()  # type: ignore[operator]
    untied = nn.Embedding(embedding.num_embeddings, embedding.embedding_dim)
    untied.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    untied.weight.data[poisoned] = value
    adapter.model.set_input_embeddings(untied)  # type: ignore[operator]
    total, clipped = clipped_sum(adapter)
    if value != 1e38:  # float32 squares of 1e38 overflow; whatever comes out has to be finite
        assert clipped.coefficients[1].item() == 0
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)
    assert bool(total.isfinite().all())


def test_all_units_poisoned_leaves_the_total_untouched(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    adapter.parameters()[0].data.fill_(float("nan"))
    total, clipped = clipped_sum(adapter)
    assert not total.any()
    assert not clipped.coefficients.any()


def test_nothing_but_the_recorder_holds_a_gradient(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    clipped_sum(adapter)
    assert all(parameter.grad is None for parameter in adapter.model.parameters())


def test_no_graph_below_the_lowest_adapted_block(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(layers=3, last_layers=1)
    requires: list[bool] = []
    for block in adapter.model.get_submodule(adapter.blocks):  # type: ignore[attr-defined]
        block.register_forward_hook(lambda _m, _i, output: requires.append(output.requires_grad))
    clipped_sum(adapter)
    assert requires == [False, False, True]


def test_a_layer_that_is_skipped_or_repeated_is_refused(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    blocks = adapter.model.get_submodule(adapter.blocks)
    assert isinstance(blocks, nn.ModuleList)
    first = blocks[0]
    blocks[0] = blocks[1]  # the second block runs twice, the first never
    with pytest.raises(SelfTestFailed, match="not used exactly once"):
        clipped_sum(adapter)
    recorder = SummedGradients(adapter, torch.zeros_like(adapter.vector()))
    record(adapter, recorder, [0], [0])
    with pytest.raises(SelfTestFailed, match="not used exactly once"):
        recorder.check()
    blocks[0] = first
    clipped_sum(adapter)


def test_the_adapter_multiplies_plainly_again_after_an_error(make_adapter: MakeAdapter) -> None:
    adapter = make_adapter()
    before = {id(layer.product) for layer in adapter.layers.values()}
    recorder = UnitGradients(adapter, torch.tensor([0]), 1)
    with pytest.raises(IndexError), adapter.using(RecordedProduct(recorder, Scratch())):
        RECORDS[99]
    assert {id(layer.product) for layer in adapter.layers.values()} == before
