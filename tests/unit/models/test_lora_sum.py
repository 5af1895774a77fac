"""The sum of two adapters: what it computes, and that it is one plain PEFT adapter."""

from __future__ import annotations

import json

import pytest
import torch
from tests.unit.models.test_lora import logits, model
from torch import nn

from llmos.errors import ModelError
from llmos.models.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraConfig,
    Parametrisation,
    attach,
    detach,
    from_peft,
    merge,
    to_peft,
)
from llmos.models.lora_sum import add

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")


def trained(of: nn.Module, config: LoraConfig, seed: int) -> LoraAdapter:
    """Return an adapter with factors as a training could leave them."""
    adapter = attach(of, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    adapter.load_vector(0.1 * torch.randn(adapter.vector().shape, generator=generator))
    return adapter


def earlier(config: LoraConfig) -> dict[str, bytes]:
    return to_peft(trained(model(), config, seed=1), "tiny")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LoraConfig(rank=4, alpha=8), LoraConfig(rank=2, alpha=6)),
        (LoraConfig(rank=3, targets=ATTENTION), LoraConfig(rank=2, last_layers=1)),
        (
            LoraConfig(rank=2, last_layers=1, targets=("q_proj",)),
            LoraConfig(rank=2, last_layers=2, targets=("up_proj",)),
        ),
        (
            LoraConfig(rank=2, parametrisation=Parametrisation.FFA),
            LoraConfig(rank=3, parametrisation=Parametrisation.SB),
        ),
    ],
)
def test_it_computes_what_the_second_does_on_top_of_the_first(
    first: LoraConfig, second: LoraConfig
) -> None:
    files, stacked = earlier(first), model()
    merge(stacked, files)
    own = trained(stacked, second, seed=2)
    expected, plain = logits(stacked), logits(model())
    total = add(own, files)
    saved = to_peft(total, "tiny")
    detach(total)
    alone = model()
    restored = from_peft(alone, saved)
    torch.testing.assert_close(logits(alone), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert restored.config.rank == first.rank + second.rank
    assert restored.config.scaling == 1


def test_it_adapts_the_layers_of_both_and_no_more() -> None:
    narrow = LoraConfig(rank=2, last_layers=1, targets=("q_proj",))
    total = add(trained(model(), narrow, seed=2), earlier(narrow))
    assert list(total.layers) == ["model.layers.2.self_attn.q_proj"]
    fields = json.loads(to_peft(total, "tiny")[CONFIG_FILE])
    assert (fields["layers_to_transform"], fields["target_modules"]) == ([2], ["q_proj"])


def test_what_is_no_adapter_leaves_the_model_plain() -> None:
    of = model()
    own = trained(of, LoraConfig(rank=2), seed=2)
    broken = earlier(LoraConfig(rank=2)) | {WEIGHTS_FILE: b"nothing"}
    with pytest.raises(ModelError, match="no readable PEFT checkpoint"):
        add(own, broken)
    assert torch.equal(logits(of), logits(model()))
