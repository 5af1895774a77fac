"""Verify a certificate, an erasure receipt or a log proof offline: no home, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmos.errors import VerificationFailed
from llmos.reports import erasure_receipt, receipt_verification, verification


def run(file: Path, keys: Path | None) -> dict[str, Any]:
    """Check a file against the public keys and return what it proves.

    Raises:
        VerificationFailed: the message says which check failed, or what is missing.
    """
    key_file = keys or file.parent / "home.pub"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise VerificationFailed(f"{file} cannot be read: {error.strerror}") from error
    try:
        public_keys = key_file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationFailed(
            f"there are no public keys at {key_file}",
            hint="name the home's public key file with --key",
        ) from error
    fields = _fields(data)
    if fields.get("mediaType") == erasure_receipt.MEDIA_TYPE:
        return receipt_verification.verify_receipt(data, public_keys)
    if "envelope" in fields:
        return verification.verify_bundle(data, public_keys).summary()
    return verification.verify_log_proof(data, public_keys)


def _fields(data: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise VerificationFailed("the file is not JSON: it was cut or changed") from error
