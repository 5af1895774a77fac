from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from tests.homes import checked_books, last_records, log_size
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.errors import ModelError, PermissionDenied, StorageError, UnknownModel
from llmos.models import lora
from llmos.models.loading import load_base
from llmos.system import System
from llmos.workflows import export


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's
def test_peft_loads_what_was_exported_with_equal_logits(measured: System, tmp_path: Path) -> None:
    written = measured.export("plain", tmp_path / "plain")
    assert {path.name for path in written} == {"adapter_config.json", "adapter_model.safetensors"}
    base = measured.registry.folder(measured.registry.model("tiny"))
    ids = AutoTokenizer.from_pretrained(base)("Patient 3: asthma, 9.", return_tensors="pt")
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "plain"
    )
    loaded = load_base(base, torch.device("cpu")).model.float()
    plain = loaded(**ids).logits
    lora.merge(loaded, {path.name: path.read_bytes() for path in written})
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, theirs(**ids).logits, rtol=1e-3, atol=1e-3)
    assert (loaded(**ids).logits - plain).abs().max() > 1  # the adapter does something


def test_an_export_is_recorded_and_changes_nothing(measured: System, tmp_path: Path) -> None:
    before = checked_books(measured)
    measured.export("private", tmp_path / "private")
    assert checked_books(measured) == before
    record = last_records(measured, 1)[0]
    assert (record["action"], record["resource"]) == ("export-model", "Model::private")
    assert record["details"]["digest"] == measured.registry.model("private").digest
    config = json.loads((tmp_path / "private/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


def test_a_folder_with_something_in_it_is_left_alone(measured: System, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(StorageError, match="is there already"):
        measured.export("plain", tmp_path / "mine")
    with pytest.raises(StorageError):
        measured.export("plain", tmp_path / "mine" / "file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_base_model_lies_in_the_clear_already(measured: System, tmp_path: Path) -> None:
    entries = log_size(measured)
    with pytest.raises(ModelError, match="tiny is a base model") as caught:
        measured.export("tiny", tmp_path / "tiny")
    assert "models/tiny" in caught.value.hint
    with pytest.raises(UnknownModel):
        measured.export("nothing", tmp_path / "nothing")
    assert log_size(measured) == entries


def test_who_may_not_export_gets_no_file(measured: System, tmp_path: Path) -> None:
    developer = measured.access.add_user("dev", ["developer"])
    with pytest.raises(PermissionDenied):
        export.run("plain", tmp_path / "plain", developer, measured.parts)
    assert not (tmp_path / "plain").exists()
    assert last_records(measured, 1)[0]["outcome"] == "denied"
