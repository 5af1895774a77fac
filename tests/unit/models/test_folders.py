from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.unit.models.conftest import edit_config

from llmos.errors import ModelError
from llmos.models.folders import check_folder, digest, model_files
from llmos.models.loading import load_base

CPU = torch.device("cpu")


def test_the_digest_follows_names_and_contents_only(folder: Path, tmp_path: Path) -> None:
    before = digest(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    assert digest(copy) == before
    (copy / "pytorch_model.bin").write_bytes(b"not looked at")
    assert digest(copy) == before
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert digest(copy) != before
    (folder / "config.json").rename(folder / "config2.json")
    assert digest(folder) != before


def test_model_files_are_an_allow_list(folder: Path) -> None:
    for name in ("pytorch_model.bin", "modeling.py", "model.gguf", ".git"):
        (folder / name).write_bytes(b"")
    names = {path.name for path in model_files(folder)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling.py", "model.gguf", ".git"}


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lacks model\.safetensors") as caught:
        load_base(folder, CPU)
    assert "safe_serialization" in caught.value.hint


def test_a_model_that_brings_code_is_refused(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError, match="code of its own"):
        load_base(folder, CPU)


def test_every_shard_of_the_index_must_be_there(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    with pytest.raises(ModelError, match=r"lacks model-00002\.safetensors"):
        check_folder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="lacks weights"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"no readable config\.json"),
        ("config.json", b"[]", "not a JSON object"),
        ("config.json", b"{}", "names no model_type"),
        ("config.json", None, r"no readable config\.json"),
        ("tokenizer.json", None, r"no tokenizer\.json"),
    ],
)
def test_a_broken_folder_is_named(
    folder: Path, name: str, content: bytes | None, message: str
) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_folder(folder)
