"""A full disk: reading goes on, writing is refused with a reason, and room ends it at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tests.disks import fill, mounted
from tests.homes import checked_books, log_size, opened, run_llmos

from llmos.cli.conversation import running_server
from llmos.errors import StorageFull
from llmos.models.runtimes import Runtimes
from llmos.system import System
from llmos.workflows import chat

pytestmark = pytest.mark.sqlite("its files lie on the full disk")

QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "asthma?"}], "max_tokens": 2}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture
def system(disk: Path, prepared_home: Path) -> Iterator[System]:
    shutil.copytree(prepared_home, disk / "home")
    with opened(disk / "home") as system:
        yield system


def test_an_opened_home_reads_on_and_writes_again_when_there_is_room(
    system: System, disk: Path
) -> None:
    before = checked_books(system)
    records = log_size(system)
    fill(disk / "ballast")
    with pytest.raises(StorageFull, match="no room") as refused:
        system.access.create_key(label="nobody's")
    assert "free some space" in refused.value.hint
    with pytest.raises(StorageFull, match="no room"):
        system.kernel.vault.put("note", bytes(100_000))
    assert checked_books(system) == before
    assert log_size(system) == records
    (disk / "ballast").unlink()
    assert checked_books(system) == before
    system.access.create_key(label="somebody's")
    assert [key["label"] for key in system.access.keys()]  # noqa: SIM118 == ["somebody's"]
    assert log_size(system) == records + 1


def test_a_server_refuses_what_it_cannot_record_and_recovers(system: System, disk: Path) -> None:
    token = system.access.create_key(label="ward").token
    with (
        running_server(disk / "home") as url,
        httpx.Client(
            base_url=url, timeout=60, headers={"Authorization": f"Bearer {token}"}
        ) as client,
    ):
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 200
        records = log_size(system)
        fill(disk / "ballast")
        for stream in (False, True):
            refused = client.post("/v1/chat/completions", json=QUESTION | {"stream": stream})
            assert refused.status_code == 507
            assert refused.json()["error"]["code"] == "storage_full"
            assert "disk is full" in refused.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 200
        assert client.get("/health").status_code == 200
        shown = run_llmos(disk / "home", "log", "show", "--json")
        assert (shown.returncode, shown.stderr) == (0, "")
        typed = run_llmos(disk / "home", "user", "add", "eve", "--role", "auditor")
        assert typed.returncode == 12
        assert "there is no room" in typed.stderr
        assert "llmos: hint: free some space" in typed.stderr
        assert log_size(system) == records
        (disk / "ballast").unlink()
        assert client.post("/v1/chat/completions", json=QUESTION).status_code == 200
        assert log_size(system) == records + 2
    checked_books(system)


def test_an_answer_whose_counts_cannot_be_recorded_is_not_finished(
    system: System, disk: Path
) -> None:
    runtimes = Runtimes(system.registry, torch.device("cpu"))
    request = chat.ChatRequest("tiny", ({"role": "user", "content": "asthma?"},), max_tokens=3)
    answer = chat.run(request, system.who, system.parts, runtimes)
    assert next(answer).prompt_tokens
    fill(disk / "ballast")
    with pytest.raises(StorageFull), answer:
        list(answer)
    (disk / "ballast").unlink()
    with chat.run(request, system.who, system.parts, runtimes) as again:
        assert list(again)[-1].completion_tokens
    checked_books(system)


def test_a_home_that_nobody_has_open_says_that_it_needs_room(
    disk: Path, prepared_home: Path
) -> None:
    shutil.copytree(prepared_home, disk / "home")
    fill(disk / "ballast")
    with pytest.raises(StorageFull, match="no room"), opened(disk / "home"):
        pass
    (disk / "ballast").unlink()
    with opened(disk / "home") as system:
        checked_books(system)
