"""A model folder in Hugging Face format becomes a model and a tokenizer in memory."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmos.config import Device
from llmos.errors import ConfigError, ModelError
from llmos.models.wheels import file_sha256

SAFE_SUFFIXES: Final = (".safetensors", ".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def resolve_device(device: Device) -> torch.device:
    """Return the device to compute on; `auto` takes a GPU when there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ConfigError(
            "device is set to cuda, but PyTorch sees no CUDA device",
            hint="set LLMOS_DEVICE=cpu, or install a CUDA build of PyTorch and its driver",
        )
    use_gpu = device is Device.CUDA or (device is Device.AUTO and available)
    return torch.device("cuda" if use_gpu else "cpu")


@cache
def emulates_bfloat16() -> bool:
    """Tell whether this CPU has no bfloat16 instructions, so that float32 is 3-4 times faster."""
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16")
    return features.get("architecture") == "x86_64" and not native


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 on CPUs that would only emulate it: twice the memory there."""
    return torch.float32 if device.type == "cpu" and emulates_bfloat16() else torch.bfloat16


def load_base(folder: Path, device: torch.device) -> LoadedModel:
    """Load a checked folder in `compute_dtype`, from local files only, with no code of its own.

    Raises:
        ModelError: the folder is not a causal language model in Hugging Face format.
    """
    check_folder(folder)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=compute_dtype(device),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder.name} cannot be loaded: {_first_line(error)}",
            hint="LLMOS loads causal language models that transformers knows without remote code",
        ) from error
    absent = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if absent or len(tokenizer) > model.get_input_embeddings().num_embeddings:
        # transformers would draw the absent weights at random and only warn about it
        raise ModelError(
            f"the weights of {folder.name} do not fit its config.json and tokenizer.json"
            + (f": {absent[0]}" if absent else "")
        )
    model.requires_grad_(False)
    return LoadedModel(model.to(device).eval(), tokenizer, device)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no safetensors model, or that wants to bring code along.

    Raises:
        ModelError: says what is missing or refused.
    """
    config = _read_json(folder / "config.json")
    if "auto_map" in config:
        raise ModelError(
            f"{folder.name} needs Python code of its own (auto_map in config.json)",
            hint="LLMOS never runs code that comes with a model; choose a built-in architecture",
        )
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder.name}/config.json names no model_type")
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder.name} has no tokenizer.json",
            hint="save the tokenizer in its fast form: tokenizer.save_pretrained(folder)",
        )
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    wanted = (
        sorted(set(_read_json(index).get("weight_map", {}).values()))
        if index.is_file()
        else ["model.safetensors"]
    )
    missing = [name for name in wanted if name not in weights]
    if missing or not wanted:
        raise ModelError(
            f"{folder.name} lacks {', '.join(missing) or 'weights'}",
            hint="pickled weights (.bin, .pt) are never read because they can run code; "
            "convert them: model.save_pretrained(folder, safe_serialization=True)",
        )


def model_files(folder: Path) -> list[Path]:
    """List the files of a model folder that LLMOS keeps: weights, settings and tokenizer."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix in SAFE_SUFFIXES
    )


def digest(folder: Path) -> str:
    """Return the SHA-256 (hex) over the sorted names and SHA-256 values of a model's files."""
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in model_files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars, advice and warnings off standard error."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.parent.name} has no readable {path.name}",
            hint="a model folder holds config.json, tokenizer.json and model.safetensors",
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.parent.name}/{path.name} is not a JSON object")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
