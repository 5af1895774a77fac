"""A few small files as one byte string: what an adapter is stored as in the vault.

Layout, after safetensors: 8 bytes little-endian length of the header; the header, canonical JSON
`{"name": size}` in the order of the names; then the files' bytes in that order and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from llmos.errors import ModelError

_LENGTH_BYTES: Final = 8
_HEADER_LIMIT_BYTES: Final = 1 << 16
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def pack(files: Mapping[str, bytes]) -> bytes:
    """Join files into one byte string; equal files give equal bytes.

    Raises:
        ModelError: a name is not a plain file name.
    """
    names = sorted(files)
    for name in names:
        _check_name(name)
    header = json.dumps({name: len(files[name]) for name in names}, separators=(",", ":")).encode()
    length = len(header).to_bytes(_LENGTH_BYTES, "little")
    return b"".join([length, header, *(files[name] for name in names)])


def unpack(packed: bytes) -> dict[str, bytes]:
    """Take a packed byte string apart again.

    Raises:
        ModelError: these bytes are not what `pack` writes.
    """
    sizes, at = _header(packed)
    files = {}
    for name, size in sizes.items():
        _check_name(name)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ModelError(f"an adapter container states no size for {name}")
        files[name] = packed[at : at + size]
        at += size
    if at != len(packed) or list(files) != sorted(files):
        raise ModelError("an adapter container's header does not describe its content")
    return files


def _header(packed: bytes) -> tuple[dict[str, object], int]:
    end = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "little")
    if len(packed) < _LENGTH_BYTES or end > min(len(packed), _HEADER_LIMIT_BYTES):
        raise ModelError("an adapter container is cut or has no header")
    try:
        sizes = json.loads(packed[_LENGTH_BYTES:end])
    except ValueError as error:
        raise ModelError("an adapter container's header is not JSON") from error
    if not isinstance(sizes, dict):
        raise ModelError("an adapter container's header is not a JSON object")
    return sizes, end


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ModelError(f"{name!r} cannot be the name of a file in an adapter container")
