from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmos.config import Device
from llmos.errors import ConfigError, ModelError
from llmos.models.loading import (
    check_folder,
    compute_dtype,
    digest,
    emulates_bfloat16,
    load_base,
    model_files,
    resolve_device,
)

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "tiny"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_model_is_loaded_frozen_and_quietly(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_base(folder, CPU)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {compute_dtype(CPU)}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training
    assert loaded.tokenizer.decode(loaded.tokenizer("Paris")["input_ids"]) == "Paris"
    assert capfd.readouterr() == ("", "")


def test_bfloat16_is_used_where_it_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, expected in (
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"architecture": "aarch64"}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda answer=features: answer)
        emulates_bfloat16.cache_clear()
        assert compute_dtype(CPU) is expected
        assert compute_dtype(torch.device("cuda")) is torch.bfloat16
    emulates_bfloat16.cache_clear()


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


def test_the_device_is_the_one_asked_for() -> None:
    gpu = torch.cuda.is_available()
    assert resolve_device(Device.CPU) == CPU
    assert resolve_device(Device.AUTO).type == ("cuda" if gpu else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        resolve_device(Device.CUDA)
