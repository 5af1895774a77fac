from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text
from tests.databases import STRICT, copy_home, outside, server_url
from tests.homes import record_state

from llmos.config import Config, load
from llmos.crypto.notes import Verifier
from llmos.crypto.root_keys import Argon2Cost, Passphrase
from llmos.errors import (
    ConfigError,
    HomeExists,
    HomeMissing,
    IntegrityError,
    LlmosError,
    PolicyError,
    StorageError,
    TamperedLog,
    TamperedObject,
    UnknownPrincipal,
    UnsafeKeyFile,
    WrongPassphrase,
)
from llmos.kernel.identity import Role
from llmos.kernel.kernel import Kernel, create, open_kernel
from llmos.kernel.policy import DEFAULTS, Action, Policy

pytestmark = pytest.mark.databases

Opener = Callable[[Kernel], Kernel]
PASSPHRASE = "correct horse battery staple"


@pytest.fixture
def closing_later() -> Iterator[Opener]:
    """Close the databases of the kernels that a test has opened."""
    with ExitStack() as opened:

        def remember(kernel: Kernel) -> Kernel:
            opened.callback(kernel.store.close)
            return kernel

        yield remember


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(home=tmp_path / "home")


@pytest.fixture(scope="module")
def made_home(tmp_path_factory: pytest.TempPathFactory, database: str) -> Path:
    """Make one home with a key file in it; tests work on copies."""
    home = tmp_path_factory.mktemp("made") / "home"
    create(load(home=home)).store.close()
    return home


@pytest.fixture(scope="module")
def sealed_home(tmp_path_factory: pytest.TempPathFactory, database: str) -> Path:
    """Make one home that a passphrase opens; each opening costs 64 MiB and some tenths of a s."""
    home = tmp_path_factory.mktemp("sealed") / "home"
    create(load(home=home), passphrase=PASSPHRASE).store.close()
    return home


@pytest.fixture
def copied(config: Config, made_home: Path) -> Config:
    copy_home(made_home, config.home)
    return config


@pytest.fixture
def copied_sealed(config: Config, sealed_home: Path) -> Config:
    copy_home(sealed_home, config.home)
    return config


def files(folder: Path) -> dict[str, bytes | None]:
    """Return everything below a folder; directories have no bytes."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def change(config: Config, database: str, statement: str, **values: object) -> None:
    with outside(config.home, database) as conn:
        assert conn.execute(text(statement), values).rowcount == 1


def refuse_to_open(config: Config, error: type[LlmosError], match: str) -> LlmosError:
    with pytest.raises(error, match=match) as refused:
        open_kernel(config)
    return refused.value


def test_a_new_home_has_all_that_the_contract_names(config: Config, closing_later: Opener) -> None:
    kernel = closing_later(create(config))
    names = {
        path.name for path in config.home.iterdir() if not path.name.endswith(("-wal", "-shm"))
    }
    assert names == {
        *("root.json", "root.key", "home.pub"),
        *(("schema",) if server_url() else ("kernel.db", "keys.db")),
        *("objects", "models", "reports", "run", "policy"),
    }
    for policy in DEFAULTS.iterdir():
        assert (config.home / "policy" / policy.name).read_bytes() == policy.read_bytes()
    assert [path.name for path in config.home.parent.iterdir()] == ["home"]
    assert kernel.config is config


def test_a_new_home_is_for_its_owner_only(config: Config, closing_later: Opener) -> None:
    closing_later(create(config))
    for path in (config.home, *config.home.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_new_home_has_one_administrator_and_a_log_that_begins_with_its_making(
    tmp_path: Path, closing_later: Opener
) -> None:
    kernel = closing_later(create(load(home=tmp_path / "home", principal="ada")))
    assert kernel.principal().name == "ada"
    assert kernel.principal().roles == {Role.ADMINISTRATOR}
    assert [who.name for who in kernel.identity.principals()] == ["ada"]
    (entry,) = kernel.auditlog.entries()
    assert (entry.fields["actor"], entry.fields["action"]) == ("ada", "init")
    assert entry.fields["resource"] == f"Home::{kernel.home_id}"
    shipped = Policy.load(DEFAULTS)
    assert entry.fields["details"] == {
        "public_keys": kernel.public_keys,
        "policy_digest": shipped.digest,
    }
    assert kernel.policy.digest == shipped.digest


def test_home_pub_holds_the_keys_that_sign(config: Config, closing_later: Opener) -> None:
    kernel = closing_later(create(config))
    assert (config.home / "home.pub").read_text() == kernel.public_keys
    certificate, log = kernel.public_keys.splitlines()
    assert Verifier.parse(certificate).name == f"llmos.local/{kernel.home_id}/certificates"
    assert Verifier.parse(log).name == f"llmos.local/{kernel.home_id}"
    assert kernel.auditlog.verify().size == 1


def test_an_opened_home_is_the_one_that_was_made(config: Config, closing_later: Opener) -> None:
    made = closing_later(create(config))
    with made.monitor.act(made.principal(), Action.MANAGE_KEYS, made.home) as conn:
        issued = made.identity.create_key(conn, made.principal(), "laptop", None, None)
    secret = made.vault.put("notes", b"secret")
    opened = closing_later(open_kernel(config))
    assert opened.home_id == made.home_id
    assert opened.public_keys == made.public_keys
    assert opened.identity.authenticate(issued.token).name == "admin"

    class Everything:
        def permits(self, object_id: str) -> bool:
            return True

    assert opened.vault.read(secret, "notes", Everything()) == b"secret"


def test_no_two_homes_share_a_key(tmp_path: Path, made_home: Path, closing_later: Opener) -> None:
    other = closing_later(create(load(home=tmp_path / "other")))
    for name in ("root.key", "home.pub"):
        assert (tmp_path / "other" / name).read_bytes() != (made_home / name).read_bytes()
    assert other.home_id not in (made_home / "home.pub").read_text()


def test_no_key_lies_in_the_clear_but_in_the_key_file(
    config: Config, closing_later: Opener
) -> None:
    kernel = closing_later(create(config))
    seeds = [kernel.vault.secret(name) for name in ("certificate-key", "log-key", "api-key-pepper")]
    root_key = bytes.fromhex((config.home / "root.key").read_text().split(":")[1])
    for name, content in files(config.home).items():
        assert not any(seed in (content or b"") for seed in seeds), name
        assert root_key not in (content or b""), name


def test_an_empty_folder_becomes_a_home_with_private_modes(
    config: Config, closing_later: Opener
) -> None:
    config.home.mkdir(mode=0o755)
    closing_later(create(config))
    assert config.home.stat().st_mode & 0o777 == 0o700


def test_a_link_to_a_folder_can_name_the_home(
    config: Config, tmp_path: Path, closing_later: Opener
) -> None:
    (tmp_path / "disk").mkdir()
    config.home.symlink_to(tmp_path / "disk/llmos")
    closing_later(create(config))
    assert config.home.is_symlink()
    assert (tmp_path / "disk/llmos/root.json").exists()


@pytest.mark.parametrize("existing", ["file", "folder", "home"])
def test_what_exists_is_refused_and_unchanged(
    config: Config, made_home: Path, existing: str
) -> None:
    if existing == "file":
        config.home.write_text("mine")
    elif existing == "folder":
        config.home.mkdir()
        (config.home / "thesis.txt").write_text("mine")
    else:
        copy_home(made_home, config.home)
    before = files(config.home.parent)
    with pytest.raises(HomeExists, match="exists and is not empty") as refused:
        create(config)
    assert "--home" in refused.value.hint
    assert files(config.home.parent) == before


# Makes the home argv[1] with the key file argv[2] and no room for a file above argv[3] bytes.
MAKER = """
import resource, signal, sys
from pathlib import Path
from llmos.config import load
from llmos.errors import LlmosError
from llmos.kernel.kernel import create

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = load(home=Path(sys.argv[1]), key_file=Path(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
print("ready", flush=True)
sys.stdin.readline()
try:
    create(config)
    print("made")
except LlmosError as error:
    print(type(error).__name__)
"""


@contextmanager
def maker(home: Path, key_file: Path, room_bytes: int = -1) -> Iterator[subprocess.Popen[str]]:
    """Start a process that makes a home as soon as it gets a line."""
    command = [sys.executable, *STRICT, "-c", MAKER]
    command += [str(home), str(key_file), str(room_bytes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


def test_only_one_of_two_makers_wins(tmp_path: Path, made_home: Path) -> None:
    home, key_file = tmp_path / "home", made_home / "root.key"
    with maker(home, key_file) as one, maker(home, key_file) as two:
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        assert sorted(process.communicate()[0] for process in (one, two)) == [
            "HomeExists\n",
            "made\n",
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    open_kernel(load(home=home, key_file=key_file)).store.close()


def test_a_home_that_appears_while_ours_is_built_wins(
    config: Config, made_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def too_late(building: Path, place: Path) -> Path:
        shutil.copytree(made_home, place)
        return rename(building, place)

    monkeypatch.setattr(Path, "rename", too_late)
    with pytest.raises(HomeExists):
        create(config)
    assert [path.name for path in config.home.parent.iterdir()] == ["home"]
    assert files(config.home) == files(made_home)


@pytest.mark.parametrize(
    "room_bytes", [0, 100, 1000, pytest.param(50_000, marks=pytest.mark.sqlite("its file"))]
)
def test_a_disk_that_fills_in_the_middle_leaves_nothing(tmp_path: Path, room_bytes: int) -> None:
    with maker(tmp_path / "home", tmp_path / "root.key", room_bytes) as process:
        output, errors = process.communicate("\n")
    assert output in {"StorageFull\n", "StorageError\n"}, errors
    assert files(tmp_path) == {}


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_fault_at_any_moment_leaves_nothing_or_a_whole_home(
    tmp_path: Path, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(home=tmp_path / "home", key_file=tmp_path / "root.key")
    fsync, calls_left, faults = os.fsync, 0, 0

    def failing(descriptor: int) -> None:
        nonlocal calls_left
        calls_left -= 1
        if calls_left < 0:
            raise fault
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    while not config.home.exists():
        assert files(tmp_path) == {}
        calls_left = faults
        faults += 1
        with pytest.raises((StorageError, KeyboardInterrupt)):
            create(config)
    assert faults > 6, "there was a fault after the home had been renamed into its place"
    monkeypatch.undo()
    open_kernel(config).store.close()


def test_an_empty_passphrase_leaves_nothing(config: Config) -> None:
    with pytest.raises(WrongPassphrase, match="must not be empty"):
        create(config, passphrase="")
    assert files(config.home.parent) == {}


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="home cannot be used: Not a directory"):
        create(load(home=tmp_path / "file/home"))


def test_there_is_no_home_where_none_was_made(config: Config) -> None:
    missing = refuse_to_open(config, HomeMissing, "there is no home at")
    assert missing.hint == f"make one: llmos --home {config.home} init"
    config.home.write_text("a file")
    refuse_to_open(config, HomeMissing, "there is no home at")
    assert config.home.read_text() == "a file"


def test_a_key_file_can_live_elsewhere(tmp_path: Path, closing_later: Opener) -> None:
    config = load(home=tmp_path / "home", key_file=tmp_path / "stick.key")
    made = closing_later(create(config))
    assert not (tmp_path / "home/root.key").exists()
    assert (tmp_path / "stick.key").stat().st_mode & 0o777 == 0o600
    assert closing_later(open_kernel(config)).public_keys == made.public_keys
    with pytest.raises(WrongPassphrase) as refused:
        open_kernel(load(home=tmp_path / "home"))
    assert "LLMOS_KEY_FILE" in refused.value.hint


def test_a_key_file_that_is_there_is_used_and_never_replaced(
    tmp_path: Path, made_home: Path, closing_later: Opener
) -> None:
    key_file = tmp_path / "stick.key"
    shutil.copy2(made_home / "root.key", key_file)
    config = load(home=tmp_path / "home", key_file=key_file)
    closing_later(create(config))
    closing_later(open_kernel(config))
    key_file.write_text("not a key")
    with pytest.raises(WrongPassphrase, match="is not an LLMOS key file"):
        create(load(home=tmp_path / "other", key_file=key_file))
    assert key_file.read_text() == "not a key"
    assert not (tmp_path / "other").exists()


def test_the_key_file_of_another_home_does_not_open_this_one(
    tmp_path: Path, copied: Config, closing_later: Opener
) -> None:
    closing_later(create(load(home=tmp_path / "other")))
    foreign = load(home=copied.home, key_file=tmp_path / "other/root.key")
    refused = refuse_to_open(foreign, WrongPassphrase, "the root key does not open keys.db")
    assert "LLMOS_KEY_FILE" in refused.hint
    closing_later(open_kernel(copied))


def test_a_key_file_that_others_can_read_is_refused(copied: Config) -> None:
    (copied.home / "root.key").chmod(0o640)
    refuse_to_open(copied, UnsafeKeyFile, "others can reach the key file")


def test_a_passphrase_opens_its_home(copied_sealed: Config, closing_later: Opener) -> None:
    config = copied_sealed
    assert not (config.home / "root.key").exists()
    for content in files(config.home).values():
        assert PASSPHRASE.encode() not in (content or b"")
    kernel = closing_later(open_kernel(config, passphrase=PASSPHRASE))
    assert (config.home / "home.pub").read_text() == kernel.public_keys
    with pytest.raises(WrongPassphrase, match="does not open this home"):
        open_kernel(config, passphrase="wrong horse")


def test_a_home_can_be_made_with_any_provider(config: Config, closing_later: Opener) -> None:
    cheap = Passphrase(PASSPHRASE, Argon2Cost(memory_kib=32, passes=1, lanes=1))
    made = closing_later(create(config, provider=cheap))
    assert not (config.home / "root.key").exists()
    opened = closing_later(open_kernel(config, passphrase=PASSPHRASE))
    assert opened.public_keys == made.public_keys


def test_without_a_passphrase_its_home_stays_closed(copied_sealed: Config) -> None:
    refused = refuse_to_open(copied_sealed, WrongPassphrase, "no passphrase was given")
    assert "LLMOS_PASSPHRASE_FILE" in refused.hint


def test_a_person_is_asked_only_when_nothing_else_gives_the_passphrase(
    copied_sealed: Config, monkeypatch: pytest.MonkeyPatch, closing_later: Opener
) -> None:
    asked: list[str] = []

    def ask(what: str) -> str:
        asked.append(what)
        return PASSPHRASE

    closing_later(open_kernel(copied_sealed, ask=ask))
    assert asked == ["passphrase"]
    monkeypatch.setenv("LLMOS_PASSPHRASE", PASSPHRASE)
    closing_later(open_kernel(load(home=copied_sealed.home), ask=ask))
    assert asked == ["passphrase"]


def test_the_passphrase_can_be_the_first_line_of_a_file(
    copied_sealed: Config, tmp_path: Path, closing_later: Opener
) -> None:
    file = tmp_path / "passphrase"
    config = load(home=copied_sealed.home, passphrase_file=file)
    file.write_text(f"{PASSPHRASE}\nanother line\n")
    closing_later(open_kernel(config))
    for content in (b"", b"\xff\xfe"):
        file.write_bytes(content)
        refuse_to_open(config, ConfigError, "holds no passphrase")
    file.unlink()
    refuse_to_open(config, ConfigError, "holds no passphrase")
    file.write_text("wrong horse\n")
    refuse_to_open(config, WrongPassphrase, "does not open this home")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"v": 2, "provider": "key-file"}',
        '{"v": 1, "provider": "nothing"}',
        '{"v": 1, "provider": "passphrase"}',
        '{"v": 1, "provider": "passphrase", "sealed": "key"}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_root_json_is_refused(copied: Config, content: str | bytes) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (copied.home / "root.json").write_bytes(raw)
    refused = refuse_to_open(copied, IntegrityError, r"root\.json is damaged")
    assert "backup" in refused.hint


def test_a_root_json_that_cannot_be_read_is_refused(copied: Config) -> None:
    (copied.home / "root.json").unlink()
    (copied.home / "root.json").mkdir()
    refuse_to_open(copied, StorageError, r"root\.json cannot be used: Is a directory")


def test_a_sealed_root_key_that_was_changed_is_refused(copied_sealed: Config) -> None:
    path = copied_sealed.home / "root.json"
    description = json.loads(path.read_text())
    description["sealed"]["memory_kib"] = 2**40
    path.write_text(json.dumps(description))
    with pytest.raises(TamperedObject, match="the sealed root key is damaged: memory_kib"):
        open_kernel(copied_sealed, passphrase=PASSPHRASE)


def test_a_home_does_not_open_when_its_log_was_changed(copied: Config) -> None:
    change(copied, "kernel", "INSERT INTO log_entries (idx, data) VALUES (1, :data)", data=b"{}")
    refuse_to_open(copied, TamperedLog, "the log was changed")


def test_a_home_does_not_open_under_another_identity(copied: Config) -> None:
    change(copied, "kernel", "UPDATE settings SET value = 'beef' WHERE name = 'home_id'")
    refuse_to_open(copied, TamperedLog, "its checkpoint is not genuine")
    change(copied, "kernel", "DELETE FROM settings WHERE name = 'home_id'")
    refuse_to_open(copied, IntegrityError, r"kernel\.db does not name its home")


def test_a_home_does_not_open_with_a_swapped_secret(copied: Config) -> None:
    change(
        copied,
        "keys",
        "UPDATE sealed_secrets SET sealed = (SELECT sealed FROM sealed_secrets WHERE name = :one) "
        "WHERE name = :other",
        one="certificate-key",
        other="log-key",
    )
    refuse_to_open(copied, TamperedObject, "a wrapped key was changed")


@pytest.mark.parametrize("text", ["permit (nonsense);", "permit (principal, action, resource);"])
def test_files_with_policies_are_drafts(copied: Config, closing_later: Opener, text: str) -> None:
    (copied.home / "policy/odd.cedar").write_text(text)
    kernel = closing_later(open_kernel(copied))
    assert kernel.policy.digest == Policy.load(DEFAULTS).digest


def test_a_home_made_before_there_were_versions_has_its_policies_in_files(
    copied: Config, closing_later: Opener
) -> None:
    change(copied, "kernel", "DELETE FROM settings WHERE name = 'policy'")
    record_state(copied.home)
    draft = copied.home / "policy/odd.cedar"
    draft.write_text("permit (nonsense);")
    refuse_to_open(copied, PolicyError, r"odd\.cedar")
    draft.write_text("forbid (principal, action, resource);")
    kernel = closing_later(open_kernel(copied))
    assert kernel.policy.digest == Policy.load(copied.home / "policy").digest
    assert set(kernel.policy.files) == {"default.cedar", "odd.cedar"}


def test_a_home_does_not_open_with_policies_that_were_changed_in_its_database(
    copied: Config,
) -> None:
    other = '{"a.cedar": "permit (principal, action, resource);"}'
    change(copied, "kernel", "UPDATE policy_versions SET files = :other", other=other)
    refuse_to_open(copied, IntegrityError, "policies in kernel.db were changed")


def test_a_file_with_an_api_key_that_others_can_reach_is_refused(
    copied: Config, tmp_path: Path, closing_later: Opener
) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    kernel = closing_later(open_kernel(copied.model_copy(update={"api_key_file": file})))
    who = kernel.identity.principal("admin")
    with kernel.store.transaction() as conn:
        file.write_text(kernel.identity.create_key(conn, who, "", None, None).token + "\n")
    assert kernel.principal().key_id is not None
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(UnsafeKeyFile, match="others can reach"):
            kernel.principal()


@pytest.mark.sqlite("its file")
def test_a_home_that_did_not_open_is_not_kept_open(copied: Config) -> None:
    change(copied, "kernel", "INSERT INTO log_entries (idx, data) VALUES (1, :data)", data=b"{}")
    refuse_to_open(copied, TamperedLog, "the log was changed")
    opened = {path.resolve() for path in Path("/proc/self/fd").iterdir()}
    assert not [path for path in opened if path.is_relative_to(copied.home)]


def test_a_principal_that_was_removed_from_the_home_cannot_act(
    copied: Config, closing_later: Opener
) -> None:
    closing_later(open_kernel(copied))
    nobody = closing_later(open_kernel(load(home=copied.home, principal="nobody")))
    with pytest.raises(UnknownPrincipal, match="nobody"):
        nobody.principal()
