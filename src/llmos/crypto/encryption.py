"""C2SP chunked encryption, Cobblestone-256: AES-256-GCM over 16 KiB chunks, key-committing.

Streams go through `cryptography.cobblestone`; random access, which that module does not offer, is
`DecryptingReader` here. A sealed object is `salt 24 | commitment 32 | chunk 0 | chunk 1 | ...`,
each chunk 16 KiB + 16 bytes of tag and the last one shorter, so that a cut is always seen.
Specification: https://c2sp.org/chunked-encryption.
"""

from __future__ import annotations

import hmac
import io
from typing import TYPE_CHECKING, BinaryIO, Final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from llmos.errors import TamperedObject

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES: Final = 16 * 1024
TAG_BYTES: Final = 16
SALT_BYTES: Final = 24
COMMITMENT_BYTES: Final = 32
HEADER_BYTES: Final = SALT_BYTES + COMMITMENT_BYTES
SEALED_CHUNK_BYTES: Final = CHUNK_BYTES + TAG_BYTES
BUFFER_BYTES: Final = 16 * CHUNK_BYTES  # one read; larger ones fall out of the CPU's caches
_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_INFO: Final = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"


def encrypt(key: bytes, source: BinaryIO, sink: BinaryIO, *, context: bytes) -> int:
    """Encrypt `source` to its end into `sink` and return the number of plaintext bytes.

    Args:
        key: 32 uniformly random bytes.
        source: read to its end.
        sink: receives 56 bytes, the ciphertext and 16 bytes for each chunk.
        context: says what the object is; the same bytes are needed to open it.

    Raises:
        ValueError: the key is not 32 bytes.
    """
    encryptor = Cobblestone256Encryptor(key, context)
    # 16 chunks may leave at once, one more that was held back, and the header before them
    sealed = memoryview(bytearray(HEADER_BYTES + BUFFER_BYTES // CHUNK_BYTES * SEALED_CHUNK_BYTES))
    plaintext_bytes = 0
    while plain := source.read(BUFFER_BYTES):
        _write_all(sink, sealed[: encryptor.update_into(plain, sealed)])
        plaintext_bytes += len(plain)
    _write_all(sink, memoryview(encryptor.finalize()))
    return plaintext_bytes


def decrypt(key: bytes, source: BinaryIO, sink: BinaryIO, *, context: bytes) -> int:
    """Decrypt `source` to its end into `sink` and return the number of plaintext bytes.

    Only authenticated chunks reach the sink. After an error it holds at most a genuine beginning of
    the plaintext, which the caller throws away.

    Raises:
        TamperedObject: wrong key or context, or a changed, cut or lengthened object.
        ValueError: the key is not 32 bytes.
    """
    decryptor = Cobblestone256Decryptor(key, context)
    plain = memoryview(bytearray(BUFFER_BYTES + CHUNK_BYTES))
    plaintext_bytes = 0
    try:
        while sealed := source.read(BUFFER_BYTES):
            size = decryptor.update_into(sealed, plain)
            _write_all(sink, plain[:size])
            plaintext_bytes += size
        last = decryptor.finalize()
    except InvalidTag as error:
        raise _tampered() from error
    _write_all(sink, memoryview(last))
    return plaintext_bytes + len(last)


class DecryptingReader(io.RawIOBase):
    """A seekable view of the plaintext that decrypts only the chunks it is asked for.

    Commitment and length are authenticated before the first byte; closing it closes its source.
    """

    def __init__(self, key: bytes, source: BinaryIO, context: bytes) -> None:
        """Read the header and authenticate the end of the object.

        Raises:
            TamperedObject: wrong key or context, or an object of changed length.
            ValueError: the key is not 32 bytes.
        """
        super().__init__()
        self._source = source
        if len(key) != _KEY_BYTES:
            raise ValueError("an encryption key has 32 bytes")
        sealed_bytes = source.seek(0, io.SEEK_END)
        last_chunk, last_bytes = divmod(sealed_bytes - HEADER_BYTES, SEALED_CHUNK_BYTES)
        if last_chunk < 0:
            raise _tampered()
        source.seek(0)
        header = _read_all(source, HEADER_BYTES)
        salt, commitment = header[:SALT_BYTES], header[SALT_BYTES:]
        derived = HKDFExpand(
            SHA512(), _KEY_BYTES + _NONCE_BYTES + COMMITMENT_BYTES, _INFO + salt + context
        ).derive(key)
        if not hmac.compare_digest(derived[_KEY_BYTES + _NONCE_BYTES :], commitment):
            raise _tampered()
        self._aead = AESGCM(derived[:_KEY_BYTES])
        self._base_nonce = int.from_bytes(derived[_KEY_BYTES : _KEY_BYTES + _NONCE_BYTES], "big")
        self._size = last_chunk * CHUNK_BYTES + last_bytes - TAG_BYTES
        self._position = 0
        self._chunks(last_chunk, last_chunk)

    @property
    def size(self) -> int:
        """The number of plaintext bytes."""
        return self._size

    def readable(self) -> bool:
        """Tell that this stream can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that this stream knows where it is and can move."""
        return True

    def tell(self) -> int:
        """Return the position in the plaintext."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position in the plaintext; beyond the end there is nothing to read.

        Raises:
            ValueError: unknown `whence`, or a position before the beginning.
        """
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        if whence not in starts:
            raise ValueError(f"whence must be 0, 1 or 2, not {whence}")
        position = starts[whence] + offset
        if position < 0:
            raise ValueError(f"cannot seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` from the current position; 0 means the end.

        Raises:
            TamperedObject: a chunk in this range was changed.
        """
        target = memoryview(buffer).cast("B")
        wanted = min(len(target), self._size - self._position, BUFFER_BYTES)
        if wanted <= 0:
            return 0
        first, skipped = divmod(self._position, CHUNK_BYTES)
        plain = self._chunks(first, (self._position + wanted - 1) // CHUNK_BYTES)
        target[:wanted] = memoryview(plain)[skipped : skipped + wanted]
        self._position += wanted
        return wanted

    def readall(self) -> bytes:
        """Return everything from the current position to the end."""
        plain = bytearray(max(0, self._size - self._position))
        filled = 0
        while size := self.readinto(memoryview(plain)[filled:]):
            filled += size
        return bytes(plain)

    def close(self) -> None:
        """Close the reader and its source."""
        self._source.close()
        super().close()

    def _chunks(self, first: int, last: int) -> bytes:
        """Return the authenticated plaintext of chunks `first` to `last`, both included."""
        self._source.seek(HEADER_BYTES + first * SEALED_CHUNK_BYTES)
        sealed = memoryview(_read_all(self._source, (last - first + 1) * SEALED_CHUNK_BYTES))
        plain = []
        for index in range(first, last + 1):
            start = (index - first) * SEALED_CHUNK_BYTES
            nonce = (self._base_nonce ^ index).to_bytes(_NONCE_BYTES, "big")
            try:
                plain.append(
                    self._aead.decrypt(nonce, sealed[start : start + SEALED_CHUNK_BYTES], None)
                )
            except InvalidTag as error:
                raise _tampered() from error
        return b"".join(plain)


def _tampered() -> TamperedObject:
    return TamperedObject(
        "an encrypted object was changed or cut, or does not belong to this key and name",
        hint="restore it from a backup; `llmos log verify` tells whether the log is whole",
    )


def _write_all(sink: BinaryIO, data: memoryview) -> None:
    """Write every byte; an unbuffered sink may take fewer than it is offered."""
    while data:
        data = data[sink.write(data) :]


def _read_all(source: BinaryIO, size: int) -> bytes:
    """Read `size` bytes or up to the end; an unbuffered source may give fewer than asked."""
    parts = []
    while size and (part := source.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
