"""Model folders in Hugging Face format: what they must hold, and the digest of what is kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from llmos.errors import ModelError
from llmos.models.wheels import file_sha256

SAFE_SUFFIXES: Final = (".safetensors", ".json", ".jinja", ".txt", ".model")


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
