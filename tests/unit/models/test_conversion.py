from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from llmos.errors import ModelError
from llmos.models.conversion import convert
from llmos.models.loading import LoadedModel, load_base

CPU = torch.device("cpu")
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK[part]}.weight"


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(path: Path, tiny: LoadedModel, **changes: str) -> None:
    config, tokenizer = tiny.model.config, tiny.tokenizer
    writer = GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, weight in tiny.model.state_dict().items():
        dense = weight.float().numpy()
        if name.endswith("q_proj.weight"):
            dense = permuted(dense, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            dense = permuted(dense, config.num_key_value_heads)
        writer.add_tensor(changes.get(name, gguf_name(name)), dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def write(tmp_path: Path, tiny: LoadedModel) -> Callable[..., Path]:
    def written(**changes: str) -> Path:
        write_gguf(tmp_path / "tiny.gguf", tiny, **changes)
        return tmp_path / "tiny.gguf"

    return written


def test_a_converted_model_is_the_model_that_was_written(
    write: Callable[..., Path], tmp_path: Path, tiny: LoadedModel
) -> None:
    convert(write(), tmp_path / "converted")
    converted = load_base(tmp_path / "converted", CPU)

    text = "Patient Maria Lopez, age 54, 你好 <|im_end|>"
    ids = tiny.tokenizer(text)["input_ids"]
    assert converted.tokenizer(text)["input_ids"] == ids
    assert converted.tokenizer.chat_template == tiny.tokenizer.chat_template
    assert converted.tokenizer.eos_token_id == tiny.tokenizer.eos_token_id
    for name, weight in tiny.model.state_dict().items():
        assert torch.equal(converted.model.state_dict()[name], weight), name
    batch = torch.tensor([ids])
    assert torch.equal(converted.model(batch).logits, tiny.model(batch).logits)


@pytest.mark.parametrize("changes", [{"architecture": "gemma"}, {"pre": "llama-bpe"}])
def test_another_kind_of_file_is_refused(
    write: Callable[..., Path], tmp_path: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(ModelError, match="does not convert"):
        convert(write(**changes), tmp_path / "converted")


@pytest.mark.parametrize("name", ["blk.0.attn_rot.weight", "rope_freqs.weight"])
def test_a_tensor_without_a_place_is_refused(
    write: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ModelError, match=name):
        convert(write(**{"model.norm.weight": name}), tmp_path / "converted")
