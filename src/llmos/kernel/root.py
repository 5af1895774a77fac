"""root.json: how a home's root key is kept and opened, and how that is changed."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import rfc8785

from llmos import errors
from llmos.config import Config
from llmos.crypto import keys
from llmos.crypto.root_keys import KeyFile, Passphrase, RootKeyProvider

Ask = Callable[[str], str]  # asks a person for a "passphrase" or a "PIN"
_NAME: Final = "root.json"


def unlock(config: Config, *, passphrase: str | None = None, ask: Ask | None = None) -> bytes:
    """Return the root key of a home.

    Raises:
        HomeMissing: there is no home at this place.
        WrongPassphrase, UnsafeKeyFile, TokenUnavailable: it cannot be had.
        IntegrityError: root.json is not what was written.
    """
    path = config.home / _NAME
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise errors.HomeMissing(
            f"there is no home at {config.home}", hint=f"make one: llmos --home {config.home} init"
        ) from error
    except OSError as error:
        raise errors.StorageError.of(error, str(path)) from error
    except ValueError:
        fields = None
    match fields:
        case {"v": 1, "provider": "key-file"}:
            return key_file(config).open(fields)
        case {"v": 1, "provider": "passphrase", "sealed": dict()}:
            given = passphrase if passphrase is not None else secret(config, "passphrase", ask)
            return Passphrase(given).open(fields)
        case {"v": 1, "provider": "pkcs11", "token": str(label), "key": str(), "sealed": str()}:
            return token(config, label, ask).open(fields)
    raise errors.IntegrityError(f"{path} is damaged", hint="restore it from a backup")


def write(home: Path, provider: RootKeyProvider, root_key: bytes) -> None:
    """Let `provider` keep the root key from now on; a crash leaves the old way or the new one.

    The new root.json is opened and compared before it takes the old one's place, and only then the
    key file in the home is removed, unless it is the new way. One elsewhere may open other homes.

    Raises:
        IntegrityError: the provider does not give back what it was given.
        HomeExists, StorageError, WrongPassphrase, TokenUnavailable: it cannot keep it.
    """
    new, old = home / f"{_NAME}.part", home / "root.key"
    try:
        new.unlink(missing_ok=True)  # left by a crash
        keys.write_private(new, rfc8785.dumps({"v": 1, **provider.seal(root_key)}))
        if not hmac.compare_digest(provider.open(json.loads(new.read_bytes())), root_key):
            raise errors.IntegrityError("what was to keep the root key gives another one back")
        new.replace(home / _NAME)
        keys.sync_directory(home)
        if old.exists() and not (isinstance(provider, KeyFile) and old.samefile(provider.path)):
            old.unlink()
            keys.sync_directory(home)
    except OSError as error:
        raise errors.StorageError.of(error, str(error.filename or new)) from error
    finally:
        with suppress(OSError):
            new.unlink()


def key_file(config: Config) -> KeyFile:
    """Return the provider that keeps the root key in the configured file."""
    return KeyFile(config.key_file or config.home / "root.key")


def token(config: Config, label: str, ask: Ask | None) -> RootKeyProvider:
    """Return the provider that keeps the root key under a key in a hardware token.

    The home does not name the module: whoever could write there could have any code run.

    Raises:
        TokenUnavailable: no module is named, or python-pkcs11 is not installed.
        ConfigError, WrongPassphrase: there is no PIN; see `secret`.
    """
    if config.pkcs11_module is None or find_spec("pkcs11") is None:
        raise errors.TokenUnavailable(
            f"no PKCS#11 module is named for the token {label!r}, or python-pkcs11 is missing",
            hint="set LLMOS_PKCS11_MODULE to the token's library; pip install 'llmos[hsm]'",
        )
    from llmos.crypto.tokens import Token  # noqa: PLC0415 - python-pkcs11 is an extra

    return Token(config.pkcs11_module, label, secret(config, "PIN", ask))


def secret(config: Config, what: str, ask: Ask | None) -> str:
    """Return the passphrase or the PIN as it is configured, or as a person says it.

    Raises:
        ConfigError: the configured file holds none.
        WrongPassphrase: none is configured and there is nobody to ask.
    """
    is_pin = what == "PIN"
    file = config.pkcs11_pin_file if is_pin else config.passphrase_file
    if config.passphrase is not None and not is_pin:
        return config.passphrase.get_secret_value()
    if file is not None:
        return first_line(file, what)
    if ask is None:
        hint = f"set LLMOS_{'PKCS11_PIN' if is_pin else 'PASSPHRASE'}_FILE, or use a terminal"
        raise errors.WrongPassphrase(f"no {what} was given", hint=hint)
    return ask(what)


def first_line(file: Path, what: str, read: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """Return the first line of a file that holds a secret.

    Raises:
        ConfigError: it cannot be read or is empty.
    """
    try:
        return read(file).decode().splitlines()[0]
    except (OSError, ValueError, IndexError) as error:
        raise errors.ConfigError(f"{file} holds no {what}") from error
