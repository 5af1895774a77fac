"""A tiny random model for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmos.engines.dp.sampling import TrainingRecord
from llmos.models.lora import LoraAdapter, LoraConfig, attach

MakeAdapter = Callable[..., LoraAdapter]


def tiny_llama(dtype: torch.dtype = torch.float32, *, layers: int = 2) -> nn.Module:
    """Build a Llama with grouped queries and tied embeddings, with weights that matter."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        attention_bias=True,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(5)
    return model.to(dtype)


@pytest.fixture
def make_adapter() -> MakeAdapter:
    """Return a function that attaches an adapter with non-zero A and B to a tiny Llama."""

    def make(
        dtype: torch.dtype = torch.float32, *, layers: int = 2, **config: object
    ) -> LoraAdapter:
        lora = LoraConfig(**{"rank": 4, "alpha": 8.0, **config})  # type: ignore[arg-type]
        adapter = attach(tiny_llama(dtype, layers=layers), lora, seed=0)
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise, alpha=0.05)
        return adapter

    return make


def make_records(lengths: Sequence[int], units: Sequence[int]) -> list[TrainingRecord]:
    """Make random records; about a third of each is prompt."""
    generator = torch.Generator().manual_seed(2)
    return [
        TrainingRecord(
            unit=unit,
            ids=tuple(torch.randint(1, 97, (length,), generator=generator).tolist()),
            labels_from=max(1, length // 3),
        )
        for length, unit in zip(lengths, units, strict=True)
    ]
