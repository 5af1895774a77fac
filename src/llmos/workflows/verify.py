"""Verify a certificate, an erasure receipt or a log proof offline: no home, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmos.errors import VerificationFailed
from llmos.reports import (
    erasure_receipt,
    federated_certificate,
    federated_verification,
    receipt_verification,
    verification,
)

_FEDERATED: Final = (federated_certificate.MEDIA_TYPE, federated_certificate.MEDIA_TYPE_1)


def run(
    file: Path, keys: Path | None, site_keys: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """Check a file against the public keys and return what it proves.

    Args:
        file: certificate, erasure receipt or log proof.
        keys: the home's public keys; default: home.pub beside the file.
        site_keys: for a federated certificate: public keys that sites published, by their names.

    Raises:
        VerificationFailed: the message says which check failed, or what is missing.
    """
    key_file = keys or file.parent / "home.pub"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise VerificationFailed(f"{file} cannot be read: {error.strerror}") from error
    public_keys = _read_keys(key_file)
    fields = _fields(data)
    if fields.get("mediaType") in _FEDERATED:
        own = {name: _read_keys(path) for name, path in (site_keys or {}).items()}
        return federated_verification.verify_file(data, public_keys, site_keys=own).summary()
    if site_keys:
        raise VerificationFailed("only the certificate of a federated model has sites")
    if fields.get("mediaType") == erasure_receipt.MEDIA_TYPE:
        return receipt_verification.verify_receipt(data, public_keys)
    if "envelope" in fields:
        return verification.verify_bundle(data, public_keys).summary()
    return verification.verify_log_proof(data, public_keys)


def _read_keys(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationFailed(
            f"there are no public keys at {path}",
            hint="name the home's public key file with --key",
        ) from error


def _fields(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise VerificationFailed("the file is not JSON: it was cut or changed") from error
