"""The adapter: what it changes, and that PEFT reads and writes the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmos.errors import ModelError, UnsupportedModel
from llmos.models.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraAdapter,
    LoraConfig,
    LoRALinear,
    Parametrisation,
    attach,
    detach,
    from_peft,
    merge,
    to_peft,
)

PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = torch.tensor([[5, 8, 13, 21, 34]])


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    made: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    return made


def logits(of: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = of(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("kind", list(Parametrisation))
def test_the_factors_are_float32_while_another_thread_loads_a_model(kind: Parametrisation) -> None:
    base = model()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does, for the whole process
    try:
        adapter = attach(base, LoraConfig(rank=2, alpha=4, parametrisation=kind), seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in adapter.model.named_parameters():
        assert tensor.dtype is torch.float32, name


def trained(config: LoraConfig) -> LoraAdapter:
    adapter = attach(model(), config, seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter.load_vector(torch.randn(adapter.vector().shape, generator=generator) * 0.3)
    return adapter


@pytest.mark.parametrize("kind", Parametrisation)
def test_attaches_to_all_linear_layers_but_the_head_and_changes_nothing_yet(
    kind: Parametrisation,
) -> None:
    plain = logits(model())
    adapter = attach(model(), LoraConfig(rank=4, parametrisation=kind), seed=0)
    assert len(adapter.layers) == 3 * 7
    assert not any("lm_head" in name for name in adapter.layers)
    assert torch.equal(logits(adapter.model), plain)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        (Parametrisation.LORA, ("lora_a", "lora_b")),
        (Parametrisation.FFA, ("lora_b",)),
        (Parametrisation.SB, ("core",)),
    ],
)
def test_base_is_frozen_in_its_dtype_and_adapter_trains_in_float32(
    kind: Parametrisation, factors: tuple[str, ...]
) -> None:
    adapter = attach(model(torch.bfloat16), LoraConfig(rank=2, parametrisation=kind), seed=0)
    trainable = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {f"{n}.{factor}" for n in adapter.layers for factor in factors}
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in trainable.values()}
    assert adapter.vector().numel() == sum(p.numel() for p in trainable.values())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {layer.weight.dtype for layer in adapter.layers.values()} == {torch.bfloat16}
    assert logits(adapter.model).dtype == torch.bfloat16


def test_last_layers_and_targets_choose() -> None:
    adapter = attach(model(), LoraConfig(targets=("q_proj", "down_proj"), last_layers=2))
    assert sorted(adapter.layers) == [
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.2.self_attn.q_proj",
    ]


def test_last_layers_beyond_the_model_adapts_every_block() -> None:
    assert attach(model(), LoraConfig(last_layers=99)).adapted_blocks == range(3)


@pytest.mark.parametrize("targets", [("c_attn",), ("q_proj", "typo_proj")])
def test_unknown_target_is_refused_before_anything_changes(targets: tuple[str, ...]) -> None:
    untouched = model()
    with pytest.raises(UnsupportedModel, match=targets[-1]):
        attach(untouched, LoraConfig(targets=targets))
    assert not any(isinstance(module, LoRALinear) for module in untouched.modules())
    assert all(parameter.requires_grad for parameter in untouched.parameters())


def test_architecture_without_linear_layers_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel"):
        attach(gpt2, LoraConfig())


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no list of blocks"):
        attach(nn.Linear(2, 2), LoraConfig())


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"last_layers": 0}]
)
def test_impossible_sizes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ModelError):
        LoraConfig(**fields)  # type: ignore[arg-type]


def test_initial_weights_repeat_only_with_a_seed() -> None:
    same = [attach(model(), LoraConfig(), seed=7).vector() for _ in range(2)]
    fresh = [attach(model(), LoraConfig()).vector() for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(*fresh)


def test_vector_round_trip() -> None:
    adapter = trained(LoraConfig(rank=3))
    vector = adapter.vector()
    adapter.load_vector(torch.zeros_like(vector))
    assert not adapter.vector().any()
    adapter.load_vector(vector)
    assert torch.equal(adapter.vector(), vector)


@pytest.mark.parametrize("kind", [Parametrisation.FFA, Parametrisation.SB])
def test_averaging_vectors_averages_the_updates(kind: Parametrisation) -> None:
    """What federated averaging needs; the product of averaged A and B is another update."""
    adapter = trained(LoraConfig(rank=3, parametrisation=kind))
    plain = dict(model().named_parameters())

    def updates(vector: torch.Tensor) -> torch.Tensor:
        adapter.load_vector(vector)
        merged = model()
        merge(merged, to_peft(adapter, "base"))
        parts = [new - plain[name] for name, new in merged.named_parameters()]
        return torch.cat([part.detach().flatten() for part in parts])

    first = adapter.vector()
    second = torch.randn(first.shape, generator=torch.Generator().manual_seed(2))
    expected = (updates(first) + updates(second)) / 2
    torch.testing.assert_close(updates((first + second) / 2), expected, atol=1e-6, rtol=1e-4)


def test_frozen_factors_are_the_same_for_every_site() -> None:
    for kind, seeds in ((Parametrisation.FFA, (5, 5)), (Parametrisation.SB, (1, None))):
        config = LoraConfig(rank=3, parametrisation=kind)
        sites = [attach(model(), config, seed=seed) for seed in seeds]
        for first, second in zip(*(site.layers.values() for site in sites), strict=True):
            assert first.lora_a.any()
            assert torch.equal(first.lora_a, second.lora_a)
            assert torch.equal(first.lora_b, second.lora_b)


def test_ffa_without_a_seed_and_sb_above_a_side_are_refused_before_anything_changes() -> None:
    untouched = model()
    with pytest.raises(ModelError, match="seed"):
        attach(untouched, LoraConfig(parametrisation=Parametrisation.FFA))
    with pytest.raises(ModelError, match="at most 12"):  # k_proj has 12 outputs
        attach(untouched, LoraConfig(rank=13, parametrisation=Parametrisation.SB))
    assert all(parameter.requires_grad for parameter in untouched.parameters())
    attach(untouched, LoraConfig(rank=12, parametrisation=Parametrisation.SB))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, parametrisation=Parametrisation.FFA),
        LoraConfig(rank=3, last_layers=2, parametrisation=Parametrisation.SB),
        LoraConfig(rank=4, alpha=12),
        LoraConfig(rank=2, alpha=3, last_layers=1),
        LoraConfig(rank=2, last_layers=2, targets=("v_proj", "up_proj")),
    ],
)
@PEFT_WARNS
def test_peft_loads_the_files_and_gives_equal_logits(config: LoraConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = trained(config)
    for name, content in to_peft(adapter, "base").items():
        (tmp_path / name).write_bytes(content)
    theirs = PeftModel.from_pretrained(model(), tmp_path)
    assert not torch.allclose(logits(adapter.model), logits(model()), atol=1e-2)
    torch.testing.assert_close(logits(theirs), logits(adapter.model), atol=1e-5, rtol=1e-5)


@PEFT_WARNS
def test_reads_what_peft_saved(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(r=3, lora_alpha=5, target_modules=["k_proj"], init_lora_weights=False)
    theirs = get_peft_model(model(), config).eval()
    theirs.save_pretrained(tmp_path)
    files = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}
    ours = from_peft(model(), files)
    assert ours.config == LoraConfig(rank=3, alpha=5.0, targets=("k_proj",))
    torch.testing.assert_close(logits(ours.model), logits(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", Parametrisation)
@pytest.mark.parametrize("last_layers", [None, 2])
def test_files_round_trip_and_merge(kind: Parametrisation, last_layers: int | None) -> None:
    adapter = trained(LoraConfig(rank=4, last_layers=last_layers, parametrisation=kind))
    files = to_peft(adapter, "base")
    again = from_peft(model(), files)
    assert again.config.parametrisation is Parametrisation.LORA
    assert to_peft(again, "base") == files
    if kind is Parametrisation.LORA:
        assert torch.equal(again.vector(), adapter.vector())
    merged = model()
    merge(merged, files)
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged), logits(adapter.model), atol=1e-5, rtol=1e-5)


def test_detach_gives_the_base_model_back() -> None:
    adapter = trained(LoraConfig())
    detach(adapter)
    assert torch.equal(logits(adapter.model), logits(model()))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"peft_type": "LOHA"},
        {"layers_to_transform": [0]},
        {"target_modules": "all-linear"},
        {"r": 5},
        {"r": "many"},
    ],
)
def test_other_checkpoints_are_refused_and_leave_the_model_plain(
    change: dict[str, object],
) -> None:
    files = to_peft(trained(LoraConfig(rank=2)), "base")
    fields = json.loads(files[CONFIG_FILE]) | change
    untouched = model()
    with pytest.raises(ModelError):
        from_peft(untouched, {**files, CONFIG_FILE: json.dumps(fields).encode()})
    assert not any(isinstance(module, LoRALinear) for module in untouched.modules())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_or_damaged_file_is_refused(name: str) -> None:
    files = to_peft(trained(LoraConfig(rank=2)), "base")
    with pytest.raises(ModelError, match="no readable PEFT checkpoint"):
        from_peft(model(), {k: v for k, v in files.items() if k != name})
    with pytest.raises(ModelError, match="no readable PEFT checkpoint"):
        from_peft(model(), {**files, name: b"\x00damaged"})
