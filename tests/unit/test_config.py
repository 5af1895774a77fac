from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmos.config import Config, Device, child_environment, let_threads_sleep, load
from llmos.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start with no LLMOS variable and a user's home directory that is empty."""
    for name in list(os.environ):  # noqa: TID251
        if name.upper().startswith("LLMOS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".llmos").mkdir()
    return tmp_path / ".llmos"


def write_settings(home: Path, text: str) -> None:
    (home / "llmos.toml").write_text(text)


def test_the_defaults_are_private_and_local(home: Path) -> None:
    config = load()
    assert config.home == home
    assert config.cache == home.parent / ".cache/llmos"
    assert (config.principal, config.device, config.threads) == ("admin", Device.AUTO, 0)
    assert (config.host, config.port, config.busy_timeout_s) == ("127.0.0.1", 8080, 60.0)
    assert (config.key_file, config.passphrase, config.passphrase_file) == (None, None, None)


def test_flag_beats_environment_beats_file_beats_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load().port == 8080
    write_settings(home, "port = 1001\nthreads = 3\n")
    assert load().port == 1001
    monkeypatch.setenv("LLMOS_PORT", "1002")
    assert load().port == 1002
    assert load(port=1003).port == 1003
    assert load(port=None).port == 1002, "a flag that was not given changes nothing"
    assert load(port=1003).threads == 3, "the other settings keep their source"


def test_the_file_is_that_of_the_home_that_is_opened(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = {}
    for name, port in (("flag", 2001), ("environment", 2002)):
        (tmp_path / name).mkdir()
        write_settings(tmp_path / name, f"port = {port}\n")
    write_settings(home, "port = 2003\n")
    ports["default"] = load().port
    monkeypatch.setenv("LLMOS_HOME", str(tmp_path / "environment"))
    ports["environment"] = load().port
    ports["flag"] = load(home="~/flag").port
    assert ports == {"default": 2003, "environment": 2002, "flag": 2001}
    assert load(home="~/flag").home == tmp_path / "flag"


def test_every_path_is_expanded_and_absolute(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_settings(home, 'key_file = "~/usb/root.key"\npassphrase_file = "secret.txt"\n')
    config = load(cache="cache")
    assert config.key_file == tmp_path / "usb/root.key"
    assert config.passphrase_file == tmp_path / "secret.txt"
    assert config.cache == tmp_path / "cache"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 65536),
        ("port", -1),
        ("port", "http"),
        ("threads", -1),
        ("busy_timeout_s", 0),
        ("busy_timeout_s", 3601),
        ("busy_timeout_s", "nan"),
        ("busy_timeout_s", "inf"),
        ("device", "tpu"),
        ("colour", "green"),
    ],
)
def test_an_unknown_name_or_value_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^setting {setting}: ") as refused:
        load(**{setting: value})
    assert "docs/configuration.md" in refused.value.hint


def test_values_from_the_environment_and_the_file_are_checked_too(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(home, "prot = 8080\n")
    with pytest.raises(ConfigError, match="setting prot"):
        load()
    write_settings(home, "")
    monkeypatch.setenv("LLMOS_THREADS", "many")
    with pytest.raises(ConfigError, match="setting threads"):
        load()


def test_a_refusal_does_not_quote_the_passphrase() -> None:
    with pytest.raises(ConfigError) as refused:
        load(passphrase=["hunter2"])
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe", b"[port\n"])
def test_a_file_that_is_no_toml_is_refused(home: Path, content: bytes) -> None:
    (home / "llmos.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"llmos\.toml cannot be read"):
        load()


@pytest.mark.parametrize("setting", ["home", "passphrase"])
def test_the_file_holds_neither_the_home_nor_the_passphrase(home: Path, setting: str) -> None:
    write_settings(home, f'{setting} = "hunter2"\n')
    with pytest.raises(ConfigError, match=f"must not hold {setting}") as refused:
        load()
    assert "hunter2" not in refused.value.message


def test_a_home_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="home directory"):
        load(home="~no-such-user/llmos")
    with pytest.raises(ConfigError, match="home directory"):
        load(cache="~no-such-user/cache")


def test_other_variables_with_our_prefix_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load()
    monkeypatch.setenv("LLMOS_SHELL_PROMPT", "yes")
    assert load() == before


def test_a_configuration_cannot_be_changed() -> None:
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.port = 1  # type: ignore[misc]
    assert config.port == 8080


def test_the_passphrase_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_PASSPHRASE", "hunter2")
    config = load()
    assert config.passphrase is not None
    assert config.passphrase.get_secret_value() == "hunter2"
    assert "hunter2" not in f"{config!r} {config} {config.model_dump_json()}"


@pytest.mark.parametrize("spelling", ["LLMOS_PASSPHRASE", "llmos_passphrase", "Llmos_Passphrase"])
def test_a_child_process_does_not_get_the_passphrase(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(spelling, "hunter2")
    monkeypatch.setenv("LLMOS_PORT", "1002")
    passphrase = load().passphrase
    assert passphrase is not None, "the setting's name is read in any case"
    child = subprocess.run(
        [sys.executable, "-c", "import os; print(dict(os.environ))"],
        env=child_environment(GREETING="hello"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "hunter2" not in child.stdout
    assert "'LLMOS_PORT': '1002'" in child.stdout
    assert "'GREETING': 'hello'" in child.stdout
    assert load().passphrase == passphrase, "our own environment is as it was"


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("OMP_WAIT_POLICY", "PASSIVE", "ACTIVE"), ("OPENBLAS_THREAD_TIMEOUT", "10", "26")],
)
def test_threads_sleep_unless_the_user_says_otherwise(
    name: str, ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, theirs)  # so that whatever it was before comes back
    monkeypatch.delenv(name)
    let_threads_sleep()
    assert child_environment()[name] == ours
    monkeypatch.setenv(name, theirs)
    let_threads_sleep()
    assert child_environment()[name] == theirs


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Config.model_fields.values())


def test_the_database_is_set_by_environment_or_file_and_its_password_is_shown_nowhere(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load().database_url is None
    write_settings(home, 'database_url = "postgresql://me:hunter2@file/db"\n')
    monkeypatch.setenv("LLMOS_PASSPHRASE", "hunter2")
    for config in (load(), load(port=1)):
        assert config.database_url is not None
        assert config.database_url.get_secret_value().endswith("@file/db")
    monkeypatch.setenv("LLMOS_DATABASE_URL", "postgresql://me:hunter2@environment/db")
    config = load()
    assert config.database_url is not None
    assert config.database_url.get_secret_value().endswith("@environment/db")
    assert "hunter2" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
    assert "hunter2" not in str(child_environment()), "children are given it only on purpose"
