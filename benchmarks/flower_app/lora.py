"""The adapter, how it travels, and the rows that a site trains on."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.app.user_config import UserConfig
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def build(folder: str, config: UserConfig) -> PeftModel:
    """Load the base model and attach a new adapter to the attention of all its blocks."""
    torch.manual_seed(int(config["seed"]))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=str(config["dtype"]))
    lora = LoraConfig(
        r=int(config["rank"]),
        lora_alpha=int(config["alpha"]),
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def to_arrays(model: PeftModel, *, packed: bool) -> ArrayRecord:
    """Return the adapter's parameters: an array a tensor, or all of them in one."""
    state = get_peft_model_state_dict(model)
    if not packed:
        return ArrayRecord(state)
    return ArrayRecord([np.concatenate([state[name].numpy().ravel() for name in sorted(state)])])


def from_arrays(model: PeftModel, arrays: ArrayRecord, *, packed: bool) -> None:
    """Put the parameters back."""
    state = arrays.to_torch_state_dict() if not packed else _unpack(model, arrays)
    set_peft_model_state_dict(model, state)


def _unpack(model: PeftModel, arrays: ArrayRecord) -> dict[str, Tensor]:
    own = get_peft_model_state_dict(model)
    names = sorted(own)
    flat = torch.from_numpy(arrays.to_numpy_ndarrays()[0].copy())
    parts = flat.split([own[name].numel() for name in names])
    return {name: part.view_as(own[name]) for name, part in zip(names, parts, strict=True)}


def rows(data: str, folder: str, tokens: int) -> Tensor:
    """Join the texts of a JSONL file and cut them into rows of equal length."""  # (rows, tokens)
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ended = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    joined = torch.tensor(list(chain.from_iterable(ended)))
    return joined[: len(joined) // tokens * tokens].view(-1, tokens)
