"""Checks of the machine and of a home, each with what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from llmos.config import Config
from llmos.errors import LlmosError, PolicyError
from llmos.jobs.jobs import Jobs
from llmos.kernel import kernel as kernels
from llmos.kernel.policy import Policy
from llmos.models.devices import resolve_device
from llmos.workflows import books, change_policy, vault

_ENOUGH_DISK_BYTES: Final = 2 << 30
_ENOUGH_MEMORY_BYTES: Final = 4 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One check and how it went."""

    name: str
    ok: bool
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)


def run(config: Config) -> list[Finding]:
    """Run every check; none of them changes anything."""
    checks: dict[str, Callable[[Config], tuple[bool, str]]] = {
        "python": _python,
        "memory": _memory,
        "disk": _disk,
        "device": _device,
        "home": _home,
        "policies": _policies,
    }
    findings = []
    for name, check in checks.items():
        try:
            ok, detail = check(config)
        except LlmosError as error:
            ok, detail = False, f"{error.message} ({error.hint})" if error.hint else error.message
        findings.append(Finding(name, ok, detail))
    return findings


def _python(config: Config) -> tuple[bool, str]:
    del config
    return sys.version_info >= (3, 11), sys.version.split()[0]


def _memory(config: Config) -> tuple[bool, str]:
    del config
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total >= _ENOUGH_MEMORY_BYTES, f"{total / 2**30:.1f} GiB, 4 are needed"


def _disk(config: Config) -> tuple[bool, str]:
    place = config.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return free >= _ENOUGH_DISK_BYTES, f"{free / 2**30:.1f} GiB free at {place}, 2 are needed"


def _device(config: Config) -> tuple[bool, str]:
    device = resolve_device(config.device)
    return True, f"{device.type}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads"


def _home(config: Config) -> tuple[bool, str]:
    if not config.home.exists():
        return True, f"none at {config.home} yet: llmos init makes one"
    if config.home.stat().st_mode & 0o077:
        return False, f"{config.home} can be entered by other users: chmod 700 {config.home}"
    kernel = kernels.open_kernel(config)
    kept = vault.way(config)
    if kept != "key-file" and (stray := config.home / "root.key").exists():
        return False, f"{stray} lies in a home that a {kept} opens: llmos vault rekey --to {kept}"
    entries = kernel.auditlog.verify().size
    books.check(kernel, Jobs(kernel.store, config.home))
    return True, f"{config.home}: log of {entries} entries verified, ledger equals its events"


def _policies(config: Config) -> tuple[bool, str]:
    """Say which policies are in force, and whether the log knows of them."""
    if not config.home.exists():
        return True, "none yet"
    kernel = kernels.open_kernel(config)
    digest = kernel.policy.digest
    if change_policy.recorded(kernel) not in {digest, None}:
        return False, f"{digest[:12]} are in force, which the log does not know of"
    try:
        draft = Policy.load(config.home / "policy").digest
    except PolicyError as error:
        return True, f"{digest[:12]} are in force; the drafts are not valid: {error.message}"
    same = "" if draft == digest else "; the drafts differ: llmos policy apply proposes them"
    return True, f"{digest[:12]} are in force{same}"
