"""A software token (SoftHSM 2) for tests: its library, and tokens in a folder of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

_PLACES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
PIN: Final = "471108"
LABEL: Final = "hospital"


def module() -> Path:
    """Return SoftHSM's library, or skip the test where it is not installed."""
    for place in map(Path, _PLACES):
        if place.exists() and shutil.which("softhsm2-util") is not None:
            if find_spec("pkcs11") is None:
                pytest.skip("python-pkcs11 is not installed: pip install 'llmos[hsm]'")
            return place
    pytest.skip("SoftHSM is not installed: apt-get install softhsm2")


def make_token(folder: Path, label: str = LABEL, pin: str = PIN) -> None:
    """Make a token; processes see those of the folder that SOFTHSM2_CONF's file names."""
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    conf = folder / "softhsm2.conf"
    conf.write_text(f"directories.tokendir = {folder}/tokens\nlog.level = ERROR\n")
    subprocess.run(
        [
            *("softhsm2-util", "--init-token", "--free", "--label", label),
            *("--so-pin", "00000000", "--pin", pin),
        ],
        env={**os.environ, "SOFTHSM2_CONF": str(conf)},  # noqa: TID251
        check=True,
        capture_output=True,
    )
