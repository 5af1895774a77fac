"""A model folder in Hugging Face format becomes a model and a tokenizer in memory."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from llmos.errors import ModelError
from llmos.models.devices import compute_dtype
from llmos.models.folders import check_folder

# transformers sets PyTorch's default dtype, the whole process's, and then what it was before: of
# two that load at a time, the second would put back what the first had set.
_ONE_AT_A_TIME: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def load_base(folder: Path, device: torch.device) -> LoadedModel:
    """Load a checked folder in `compute_dtype`, from local files only, with no code of its own.

    Raises:
        ModelError: the folder is not a causal language model in Hugging Face format.
    """
    check_folder(folder)
    try:
        with _ONE_AT_A_TIME, quiet_transformers():
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
