from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.models.conftest import edit_config

from llmos.errors import ModelError
from llmos.models.devices import compute_dtype
from llmos.models.loading import load_base

CPU = torch.device("cpu")


def test_a_model_is_loaded_frozen_and_quietly(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_base(folder, CPU)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {compute_dtype(CPU)}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("Paris")["input_ids"]) == "Paris"
    assert capfd.readouterr() == ("", "")


def test_models_that_are_loaded_at_a_time_leave_the_process_as_it_was(folder: Path) -> None:
    # transformers changes PyTorch's default dtype while it loads
    with ThreadPoolExecutor(4) as threads:
        for loaded in threads.map(lambda _: load_base(folder, CPU), range(16)):
            assert {p.dtype for p in loaded.model.parameters()} == {compute_dtype(CPU)}
    try:
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model_type", ["no-such-architecture", "vit"])
def test_an_architecture_that_is_not_built_in_is_refused(folder: Path, model_type: str) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(folder, CPU)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(folder, CPU)


def test_weights_that_are_absent_are_never_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit.*lm_head\.weight"):
        load_base(folder, CPU)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder: Path) -> None:
    loaded = load_base(folder, CPU)
    loaded.tokenizer.add_tokens(["one-more"])
    loaded.tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="do not fit"):
        load_base(folder, CPU)
