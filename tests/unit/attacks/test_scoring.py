from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmos.attacks.scores import Scores
from llmos.attacks.scoring import score
from llmos.errors import MeasurementError
from llmos.models import prefix
from llmos.models.blocks import find_blocks

VOCABULARY = 48


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]
    labels_from: int


def llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.4,  # peaked predictions, so that argmax is not a coin flip
        )
    )
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).eval()


class WithoutSlicing(LlamaForCausalLM):  # type: ignore[misc]
    """A model whose forward always makes all logits."""

    def forward(self, input_ids, attention_mask=None, use_cache=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
        return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)


def records(count: int = 17) -> list[Tokens]:
    rng = np.random.default_rng(9)
    made = []
    for _ in range(count):
        length = int(rng.integers(3, 24))
        made.append(
            Tokens(
                tuple(int(token) for token in rng.integers(0, VOCABULARY, length)),
                int(rng.integers(1, length)),
            )
        )
    return made


def one_by_one(model: torch.nn.Module, items: Sequence[Tokens]) -> Scores:
    """Score unpadded records with all logits: slow and plain."""
    losses, prefixes = [], []
    for item in items:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([item.ids])).logits[0].double()
        log_p = logits.log_softmax(-1)
        steps = range(item.labels_from, len(item.ids))
        losses.append(-sum(float(log_p[t - 1, item.ids[t]]) for t in steps))
        prefix = 0
        while (
            prefix < len(steps)
            and int(logits[steps[prefix] - 1].argmax()) == item.ids[steps[prefix]]
        ):
            prefix += 1
        prefixes.append(prefix)
    tokens = np.array([len(item.ids) - item.labels_from for item in items], dtype=np.int64)
    return Scores(np.array(losses), tokens, np.array(prefixes, dtype=np.int64))


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_padding_batches_and_label_positions_change_nothing(make, batch_tokens: int) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
    model, items = make(), records()
    expected = one_by_one(model, items)
    found = score(model, items, batch_tokens=batch_tokens)
    assert found.loss_nats == pytest.approx(expected.loss_nats, rel=1e-5)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.exact_prefix.tolist() == expected.exact_prefix.tolist()


def test_a_model_that_cannot_slice_its_logits_scores_alike() -> None:
    model = llama()
    plain = WithoutSlicing(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert score(plain, records()).loss_nats == pytest.approx(score(model, records()).loss_nats)


def greedy(model: torch.nn.Module, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids)


def test_exact_is_what_greedy_decoding_would_give() -> None:
    model = llama()
    given = tuple(range(3, 9))
    decoded = greedy(model, given, 7)
    other = (decoded[-3] + 1) % VOCABULARY
    left = (*decoded[:-3], other, *decoded[-2:])  # leaves the greedy path at its fifth token
    found = score(model, [Tokens(decoded, len(given)), Tokens(left, len(given))])
    assert found.exact_prefix.tolist() == [7, 4]
    assert found.exact.tolist() == [True, False]
    assert found.prefix_match_rate([4, 4]) == 1.0
    assert found.prefix_match_rate([4, 5]) == 0.5


def test_the_head_sees_label_positions_only() -> None:
    model = llama()
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _arguments, output: seen.append(output.shape[1])
    )
    score(model, [Tokens(tuple(range(20)), 17), Tokens(tuple(range(1, 21)), 18)])
    assert seen == [3]


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model = llama()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    score(model, records(3))
    with pytest.raises(IndexError):
        score(model, [Tokens((1, VOCABULARY + 5), 1)])
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_dropout_does_not_enter_the_scores() -> None:
    model = gpt2()
    quiet = score(model, records()).loss_nats
    model.train()
    assert score(model, records()).loss_nats == pytest.approx(quiet)


def test_sums_select_and_refusals() -> None:
    model = llama()
    found = score(model, records())
    assert found.loss_per_token == pytest.approx(found.loss_nats.sum() / found.tokens.sum())
    assert len(found.select(found.tokens > 3)) == int((found.tokens > 3).sum())
    assert len(score(model, [])) == 0
    with pytest.raises(MeasurementError, match="no records"):
        _ = score(model, []).loss_per_token
    for bad in (Tokens((1, 2), 0), Tokens((1, 2), 2)):
        with pytest.raises(MeasurementError, match="nothing can be predicted"):
            score(model, [bad])
    with pytest.raises(MeasurementError, match="prefix lengths"):
        found.prefix_match_rate([1])
    with pytest.raises(MeasurementError, match="outside"):
        found.prefix_match_rate([0] * len(found))
    assert math.isfinite(found.loss_per_token)


@pytest.mark.parametrize("batch_tokens", [40, 2048])
def test_blocks_that_were_run_before_are_not_run_again(batch_tokens: int) -> None:
    model, items = llama(), records()
    blocks = find_blocks(model)
    begun = prefix.compute(blocks, 1, model.model, items, batch_tokens=64)
    expected = score(model, items)
    runs: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, position=position: runs.append(position))
        for position, block in enumerate(model.model.layers)
    ]
    found = score(model, items, prefix=begun, batch_tokens=batch_tokens)
    for handle in handles:
        handle.remove()
    assert set(runs) == {1}
    assert np.allclose(found.loss_nats, expected.loss_nats, atol=1e-4)
    assert (found.exact_prefix == expected.exact_prefix).all()
    assert model.get_submodule(blocks.name) is blocks.modules
