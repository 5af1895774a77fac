"""GGUF to Hugging Face format: a quantised Llama file becomes dense bfloat16 safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from llmos.errors import ModelError

CONVERTER_VERSION: Final = 1  # part of the cache's key: raise it whenever the output changes
CONTROL_TOKEN: Final = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL

# GGUF tensor name -> Hugging Face name, outside of and inside a block.
_TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write the model, tokenizer and chat template of a GGUF file to `folder`.

    Dequantising by ourselves keeps the digits of numbers apart in the tokenizer (the general
    converter of transformers drops that rule) and never leaves packed weights behind.

    Raises:
        ModelError: the file is not a Llama model with SmolLM's byte-level BPE tokenizer.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    kinds = tuple(
        fields.get(name)
        for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    )
    if kinds != ("llama", "gpt2", "smollm"):
        raise ModelError(
            f"{source.name} is a GGUF file of kind {kinds}, which LLMOS does not convert",
            hint="import the model as a directory in Hugging Face format instead",
        )
    config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)
    tensors = {_hugging_face_name(tensor.name): _dense(tensor, config) for tensor in reader.tensors}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=int(fields["llama.embedding_length"]),
        intermediate_size=int(fields["llama.feed_forward_length"]),
        num_hidden_layers=int(fields["llama.block_count"]),
        num_attention_heads=int(fields["llama.attention.head_count"]),
        num_key_value_heads=int(fields["llama.attention.head_count_kv"]),
        max_position_embeddings=int(fields["llama.context_length"]),
        rms_norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(fields["llama.rope.freq_base"]),
        },
        tie_word_embeddings=tied,
        bos_token_id=int(fields["tokenizer.ggml.bos_token_id"]),
        eos_token_id=int(fields["tokenizer.ggml.eos_token_id"]),
        pad_token_id=int(fields["tokenizer.ggml.padding_token_id"]),
        dtype="bfloat16",
    )


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
    )


def _hugging_face_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")  # blk.7.attn_q.weight
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _BLOCK:  # noqa: PLR2004
        raise ModelError(f"the GGUF file holds a tensor {name!r} that a Llama model does not have")
    return f"model.layers.{int(parts[1])}.{_BLOCK[parts[2]]}.{parts[3]}"


def _dense(tensor: Any, config: LlamaConfig) -> torch.Tensor:  # noqa: ANN401 - gguf is untyped
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }.get(tensor.name.split(".")[-2], 0)
    if heads:
        # GGUF pairs neighbouring rows for the rotary embedding, Hugging Face pairs halves.
        rows, columns = weight.shape
        weight = weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2)
        weight = weight.reshape(rows, columns)
    return weight.to(torch.bfloat16).contiguous()
