"""The first blocks run once: equal to the model's own, with and without a shared beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.unit.engines.dp.conftest import tiny_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from llmos.models import prefix
from llmos.models.blocks import Blocks, find_blocks


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]


def beginning_with(shared: tuple[int, ...]) -> list[Tokens]:
    generator = torch.Generator().manual_seed(4)
    return [
        Tokens(shared + tuple(torch.randint(1, 97, (length,), generator=generator).tolist()))
        for length in (9, 4, 12, 6)
    ]


def llama(layers: int) -> tuple[Blocks, nn.Module]:
    model = tiny_llama(layers=layers)
    body = model.get_submodule("model")
    return find_blocks(model), body


def own_hidden(body: nn.Module, record: Tokens) -> torch.Tensor:
    with torch.no_grad():
        output = body(input_ids=torch.tensor([record.ids]), use_cache=False)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("shared", [(), (5,), (7, 3, 11, 2, 8)])
@pytest.mark.parametrize("batch_tokens", [8, 1000])
@pytest.mark.parametrize("first", [1, 3])
def test_the_rest_of_the_model_goes_on_as_the_whole_model_does(
    shared: tuple[int, ...], batch_tokens: int, first: int
) -> None:
    blocks, body = llama(4)
    records = beginning_with(shared)
    found = prefix.compute(blocks, first, body, records, batch_tokens=batch_tokens)
    assert found is not None
    for number, record in enumerate(records):
        assert torch.allclose(found.body(body, [number])[0], own_hidden(body, record), atol=1e-4)
    assert blocks.model.get_submodule(blocks.name) is blocks.modules  # all are back


def test_it_is_as_large_as_it_says() -> None:
    blocks, body = llama(2)
    records = beginning_with(())
    found = prefix.compute(blocks, 1, body, records, batch_tokens=100)
    assert found is not None
    held = sum(one.numel() * one.element_size() for one in found.hidden)
    assert held == prefix.size_bytes(body, records)


def test_a_model_that_adds_to_embeddings_gets_none() -> None:
    # GPT-2 adds positions to whatever comes in: what enters a block cannot be put in again
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)
    blocks = find_blocks(model)
    assert prefix.compute(blocks, 1, model.transformer, beginning_with(()), batch_tokens=99) is None
    assert len(model.transformer.h) == 3


@pytest.mark.parametrize(
    ("ids", "shared"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 9, 9)], 3),
        ([(1, 2, 3), (1, 2, 3, 4)], 2),  # the shorter one keeps a token of its own
        ([(1, 2, 3), (1, 2, 3)], 2),
        ([(4, 2), (1, 2)], 0),
        ([(1, 2), (1, 2, 3), (1, 9, 3)], 1),
    ],
)
def test_what_all_records_begin_with(ids: Sequence[tuple[int, ...]], shared: int) -> None:
    assert prefix._shared_tokens([Tokens(tokens) for tokens in ids]) == shared


def test_the_shared_beginning_is_run_once() -> None:
    blocks, body = llama(3)
    tokens: list[int] = []
    handle = body.register_forward_pre_hook(
        lambda _module, _inputs, named: tokens.append(
            named["input_ids"].numel() if "input_ids" in named else 0
        ),
        with_kwargs=True,
    )
    records = beginning_with(tuple(range(1, 31)))
    prefix.compute(blocks, 2, body, records, batch_tokens=12)
    handle.remove()
    own = sum(len(record.ids) - 30 for record in records)
    longest = max(len(record.ids) for record in records)  # checked against the model at the end
    assert sum(tokens) <= 30 + 2 * own + longest  # padding at most doubles what is their own
