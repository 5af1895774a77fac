"""What is prepared once, however many steps and rounds follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llmos.engines.dp import prefix
from llmos.engines.dp.kernels import Fusion, Scratch
from llmos.engines.dp.loss import LanguageModel
from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.sampling import Sampler, TrainingRecord
from llmos.models.lora import LoraAdapter
from llmos.models.prefix import Prefix


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """All that stays the same from step to step, and from round to round."""

    adapter: LoraAdapter
    model: LanguageModel
    records: Sequence[TrainingRecord]
    lengths: tuple[int, ...]
    plan: DPPlan
    performance: Performance
    sampler: Sampler
    fusion: Fusion
    scratch: Scratch
    cache: Prefix | None


def prepare(
    adapter: LoraAdapter,
    records: Sequence[TrainingRecord],
    plan: DPPlan,
    performance: Performance | None = None,
) -> Run:
    """Move the model to its device, fuse its layers and compute what never changes.

    Args:
        adapter: from `llmos.models.lora.attach`, on the model to train.
        records: encoded records; those of one unit are protected together.
        plan: what to run, over all rounds; decides the mechanism alone.
        performance: how to compute it.

    Raises:
        EngineError: plan and records do not fit.
        UnsupportedModel: the model is no causal language model with a linear head.
    """
    performance = performance or Performance()
    adapter.model.to(performance.device).eval()
    model = LanguageModel.of(adapter.model)
    fusion = Fusion.of(model.body)
    sampler = Sampler(records, plan)
    with threads(performance.threads), fusion.active():
        cache = prefix.build(adapter, model.body, records, plan, performance)
    return Run(
        adapter=adapter,
        model=model,
        records=records,
        lengths=tuple(len(record.ids) for record in records),
        plan=plan,
        performance=performance,
        sampler=sampler,
        fusion=fusion,
        scratch=Scratch(),
        cache=cache,
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads inside the block; 0 leaves the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
