"""The one typed configuration: what differs between machines; sole reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from llmos.errors import ConfigError

DEFAULT_HOME: Final = Path("~/.llmos")
# A secret beside what it opens protects nothing; a module that is named there would be run.
_NOT_IN_FILE: Final = frozenset({"home", "passphrase", "pkcs11_module"})

_SECRETS: Final = frozenset({"LLMOS_PASSPHRASE", "LLMOS_DATABASE_URL"})


class Device(StrEnum):
    """Where models run; `auto` takes a GPU when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Config(BaseSettings):
    """Settings: default, then `llmos.toml` in the home, then LLMOS_<NAME>, then a flag."""

    model_config = SettingsConfigDict(env_prefix="LLMOS_", extra="forbid", frozen=True)

    home: Path = Field(DEFAULT_HOME, description="directory of one installation")
    principal: str = Field("admin", description="who the command line acts as")
    api_key_file: Path | None = Field(
        None, description="file with an API key; the command line then acts as its holder"
    )
    key_file: Path | None = Field(
        None, description="key file that opens the vault; default: root.key in home"
    )
    passphrase: SecretStr | None = Field(
        None, description="passphrase that opens the vault, when the home was made with one"
    )
    passphrase_file: Path | None = Field(
        None, description="file whose first line is the passphrase"
    )
    pkcs11_module: Path | None = Field(None, description="library that reaches a hardware token")
    pkcs11_pin_file: Path | None = Field(None, description="file whose first line is its PIN")
    cache: Path = Field(
        Path("~/.cache/llmos"), description="verified downloads of public files, shared by homes"
    )
    database_url: SecretStr | None = Field(
        None, description="PostgreSQL database of the home; none: SQLite files in the home"
    )
    device: Device = Field(Device.AUTO, description="auto, cpu or cuda")
    threads: int = Field(0, ge=0, description="CPU threads for training; 0 means all cores")
    busy_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="how long one process waits for another one's database write",
    )
    host: str = Field("127.0.0.1", description="address that `llmos serve` binds")
    port: int = Field(
        8080, ge=0, le=65535, description="port that `llmos serve` binds; 0 picks one"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, environment, then the home's file."""
        del dotenv_settings, file_secret_settings
        flags = init_settings()
        environment = env_settings()
        home = _absolute(Path(flags.get("home") or environment.get("home") or DEFAULT_HOME))
        toml = TomlConfigSettingsSource(settings_cls, toml_file=home / "llmos.toml")
        if misplaced := _NOT_IN_FILE & toml().keys():
            raise ConfigError(
                f"{home / 'llmos.toml'} must not hold {min(misplaced)}",
                hint="set it in the environment; whoever can write to the home could change it",
            )
        return (init_settings, env_settings, toml)


def load(**flags: Any) -> Config:  # noqa: ANN401 - pydantic checks the values
    """Read the configuration once; flags that are None are left to the other sources.

    Raises:
        ConfigError: a value does not fit its type, or a name is unknown.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        config = Config(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"setting {name}: {first['msg']}",
            hint="see docs/configuration.md for the settings and their ranges",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"llmos.toml cannot be read: {error}") from error
    paths = {name: _absolute(value) for name, value in config if isinstance(value, Path)}
    return config.model_copy(update=paths)


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{path}: nobody has this home directory") from error


def let_threads_sleep() -> None:
    """Let idle threads of OpenMP and OpenBLAS sleep, not spin, unless the user says otherwise.

    Where another process shares the cores, spinning makes training several times slower. Must be
    called before NumPy and PyTorch are loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")  # spin for 2^10 cycles, not 2^26


def child_environment(**extra: str) -> Mapping[str, str]:
    """Return the environment for a child process, without LLMOS secrets in it."""
    return {  # a setting's name is read in any case
        name: value for name, value in os.environ.items() if name.upper() not in _SECRETS
    } | extra
