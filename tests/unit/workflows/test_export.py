from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import rfc8785
import torch
from sqlalchemy import select, update
from sqlalchemy.exc import DatabaseError
from tests.databases import refuse
from tests.homes import Person, checked_books, hire, last_records, log_size
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmos.errors import (
    ApprovalConflict,
    ModelError,
    PermissionDenied,
    StorageError,
    StorageFull,
    UnknownModel,
)
from llmos.kernel.policy import Action
from llmos.models import lora
from llmos.models.loading import load_base
from llmos.models.tables import models
from llmos.system import System
from llmos.workflows import export, outputs


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


@pytest.fixture
def leaky(measured: System) -> System:
    """Let `plain`, which was trained without privacy, have been trained on sensitive data."""
    this = models.c.name == "plain"
    act = measured.kernel.monitor.act(measured.who, Action.MANAGE_JOBS, measured.kernel.home)
    with act as conn:
        card = json.loads(conn.execute(select(models.c.card).where(this)).scalar_one())
        changed = rfc8785.dumps(card | {"classification": "sensitive"}).decode()
        conn.execute(update(models).where(this).values(card=changed))
    return measured


@pytest.fixture
def bob(leaky: System, tmp_path: Path) -> Person:
    return hire(leaky.kernel.config.home, "bob", "steward", tmp_path)


def approve(bob: Person, leaky: System, *, approve: bool = True) -> None:
    *_, asked = leaky.approvals.overview()
    with bob.at_work() as his:
        his.approvals.decide(asked["id"], approve=approve)


def test_two_people_export_what_may_hold_data_once(
    leaky: System, bob: Person, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(ApprovalConflict, match="second person") as refused:
        leaky.export("plain", folder)
    assert "--reason" in refused.value.hint
    assert leaky.approvals.overview() == []
    for _ in range(2):  # the second time it waits still
        with pytest.raises(ApprovalConflict, match="not approved approval-"):
            leaky.export("plain", folder, reason="the ethics board agreed")
    (asked,) = leaky.approvals.overview()
    digest = leaky.registry.model("plain").digest
    assert (asked["act"], asked["subject"], asked["request"]["digest"]) == (
        "export",
        "plain",
        digest,
    )
    approve(bob, leaky)
    assert not folder.exists()
    written = leaky.export("plain", folder)
    assert all(path.exists() for path in written)
    record = last_records(leaky, 1)[0]
    assert (record["outcome"], record["details"]["approval"]) == ("done", asked["id"])
    with pytest.raises(ApprovalConflict):
        leaky.export("plain", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_approval_is_for_its_proposer_and_these_weights(
    leaky: System, bob: Person, tmp_path: Path
) -> None:
    with pytest.raises(ApprovalConflict):
        leaky.export("plain", tmp_path / "out", reason="agreed")
    approve(bob, leaky)
    other = leaky.access.add_user("eve", ["engineer"])
    with pytest.raises(ApprovalConflict):
        export.run("plain", tmp_path / "out", other, leaky.parts)
    with leaky.kernel.store.transaction() as conn:
        mine = models.c.name == "plain"
        conn.execute(update(models).where(mine).values(digest="0" * 64))
    with pytest.raises(ApprovalConflict):
        leaky.export("plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_export_can_be_asked_for_again(
    leaky: System, bob: Person, tmp_path: Path
) -> None:
    for count in (1, 2):
        with pytest.raises(ApprovalConflict):
            leaky.export("plain", tmp_path / "out", reason="please")
        assert len(leaky.approvals.overview()) == count
        approve(bob, leaky, approve=False)
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_leaves_its_approval(
    leaky: System, bob: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ApprovalConflict):
        leaky.export("plain", tmp_path / "out", reason="agreed")
    approve(bob, leaky)

    def full(*_: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "write_folder", full)
        with pytest.raises(StorageFull):
            leaky.export("plain", tmp_path / "out")
    assert leaky.approvals.overview()[0]["used_at"] is None
    assert leaky.export("plain", tmp_path / "out")


def test_an_export_whose_use_cannot_be_recorded_leaves_no_files(
    leaky: System, bob: Person, tmp_path: Path
) -> None:
    with pytest.raises(ApprovalConflict):
        leaky.export("plain", tmp_path / "out", reason="agreed")
    approve(bob, leaky)
    with leaky.kernel.store.transaction() as conn:
        done, exported = (
            f"instr(NEW.data, CAST('{word}' AS BLOB))"
            if conn.dialect.name == "sqlite"
            else f"position('{word}'::bytea IN NEW.data) > 0"
            for word in ('"done"', "export-model")
        )
        refuse(conn, "INSERT", "log_entries", when=f"{done} AND {exported}")
    with pytest.raises(DatabaseError, match="no more"):
        leaky.export("plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert leaky.approvals.overview()[0]["used_at"] is None


def test_who_may_not_export_may_not_propose_it_either(leaky: System, tmp_path: Path) -> None:
    developer = leaky.access.add_user("dev", ["developer"])
    with pytest.raises(PermissionDenied):
        export.run("plain", tmp_path / "out", developer, leaky.parts, reason="please")
    assert leaky.approvals.overview() == []


def test_a_service_proposes_no_export(leaky: System, tmp_path: Path) -> None:
    robot = leaky.access.add_user("robot", ["engineer"], kind="service")
    with pytest.raises(ApprovalConflict, match="service account"):
        export.run("plain", tmp_path / "out", robot, leaky.parts, reason="please")
    assert leaky.approvals.overview() == []
