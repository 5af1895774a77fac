"""Whether the frozen blocks below an adapter are run once for each record, or in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import nn

from llmos.engines.dp.plan import DPPlan, Performance
from llmos.engines.dp.sampling import TrainingRecord
from llmos.models import prefix
from llmos.models.blocks import find_blocks
from llmos.models.lora import LoraAdapter
from llmos.models.prefix import Prefix

_MIN_PASSES: Final = 2.0


def pays(size_bytes: int, passes: float, performance: Performance) -> bool:
    """Say whether outputs of that size, read `passes` times on average, are worth keeping."""
    return size_bytes <= performance.prefix_cache_bytes and passes >= _MIN_PASSES


def build(
    adapter: LoraAdapter,
    body: nn.Module,
    records: Sequence[TrainingRecord],
    plan: DPPlan,
    performance: Performance,
) -> Prefix | None:
    """Compute what enters the first adapted block, or return None: too large, rarely read, wrong.

    It is kept for all records if it fits the allowed memory and is read at least twice on average.
    """
    first = adapter.adapted_blocks.start
    passes = plan.steps * plan.sampling_probability
    if first == 0 or not pays(prefix.size_bytes(body, records), passes, performance):
        return None
    return prefix.compute(
        find_blocks(adapter.model),
        first,
        body,
        records,
        batch_tokens=performance.microbatch_tokens,
    )
