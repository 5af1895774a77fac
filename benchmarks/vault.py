"""How fast the vault encrypts, against `openssl speed`, and how little memory a large object takes.

    python benchmarks/vault.py --json benchmarks/results/vault.json

Three figures of one thread, on buffers in memory and so without the disk: C2SP chunked encryption
and decryption as the vault uses them, and OpenSSL's own AES-256-GCM over blocks of the same 16 KiB
(`openssl speed -evp aes-256-gcm -bytes 16384`), taken in turns and all in CPU seconds, which is
what `openssl speed` counts, so that other load on the machine matters little.
Then an object is streamed into a vault and out again, in a process of its own whose peak memory is
read before and after; its speed, in seconds of the clock, is bound by the disk and an fsync at the
end: beside it stands that of writing as many bytes with no encryption.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import cryptography
from cryptography.hazmat.backends.openssl import backend

from llmos.crypto import encryption, keys
from llmos.kernel.schema import KEYS
from llmos.kernel.store import Store
from llmos.kernel.vault import Vault

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

OPENSSL = ["openssl"]
CONTEXT = b"benchmark"
PIECE = bytes(1 << 20)
GOAL_RATIO, GOAL_MEMORY_MIB = 0.9, 64


class Zeros(io.RawIOBase):
    """A stream of zeros of a given length, with no memory behind it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = size

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` of the bytes that are left."""
        size = min(self.left, len(PIECE), size if size >= 0 else len(PIECE))
        self.left -= size
        return PIECE[:size]


class Nowhere(io.RawIOBase):
    """A sink that counts and forgets."""

    def write(self, data: Buffer) -> int:
        """Take all of it."""
        return memoryview(data).nbytes


class Everything:
    """A grant for all objects."""

    def permits(self, object_id: str) -> bool:
        """Permit it."""
        return bool(object_id)


def mb_per_s(size: int, seconds: float) -> float:
    """Return millions of bytes a second, as `openssl speed` counts."""
    return round(size / seconds / 1e6, 1)


def encrypting(seconds: float) -> float:
    """Encrypt buffers from memory to nowhere for about so long and return the speed."""
    key, size, spent = keys.generate_key(), 64 << 20, 0.0
    rounds = 0
    while spent < seconds:
        begun = time.process_time()
        encryption.encrypt(
            key, cast("BinaryIO", Zeros(size)), cast("BinaryIO", Nowhere()), context=CONTEXT
        )
        spent += time.process_time() - begun
        rounds += 1
    return mb_per_s(rounds * size, spent)


def decrypting(seconds: float) -> float:
    """Decrypt a buffer in memory to nowhere for about so long and return the speed."""
    key, size, spent = keys.generate_key(), 64 << 20, 0.0
    sealed = io.BytesIO()
    encryption.encrypt(key, cast("BinaryIO", Zeros(size)), sealed, context=CONTEXT)
    rounds = 0
    while spent < seconds:
        sealed.seek(0)
        begun = time.process_time()
        encryption.decrypt(key, sealed, cast("BinaryIO", Nowhere()), context=CONTEXT)
        spent += time.process_time() - begun
        rounds += 1
    return mb_per_s(rounds * size, spent)


def openssl_speed(seconds: int) -> float:
    """Return the speed that the system's OpenSSL reports for the same cipher and chunk."""
    command = [*OPENSSL, "speed", "-evp", "aes-256-gcm", "-bytes", str(encryption.CHUNK_BYTES)]
    told = subprocess.run(
        [*command, "-seconds", str(seconds)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"^aes-256-gcm\s+([\d.]+)k", told, re.MULTILINE | re.IGNORECASE)
    assert found is not None, told
    return round(float(found[1]) / 1e3, 1)  # thousands of bytes a second


def throughput(rounds: int) -> dict[str, Any]:
    """Measure the three in turns and return the medians and their ratios."""
    measured: dict[str, list[float]] = {"openssl": [], "encrypt": [], "decrypt": []}
    for _ in range(rounds):
        measured["openssl"].append(openssl_speed(2))
        measured["encrypt"].append(encrypting(2.0))
        measured["decrypt"].append(decrypting(2.0))
    medians = {name: statistics.median(values) for name, values in measured.items()}
    ratios = {name: round(medians[name] / medians["openssl"], 3) for name in ("encrypt", "decrypt")}
    return {"mb_per_s": measured, "medians": medians, "ratio_to_openssl": ratios}


def peak_mib() -> float:
    """Return the most memory that this program has held (`ru_maxrss` would count its parent's)."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def stream_object(home: Path, size: int) -> dict[str, Any]:
    """Put a large object and read it again in pieces; return seconds and additional peak memory."""
    with closing(Store.open(home / "keys.db", KEYS)) as store:
        vault = Vault(home, store, keys.generate_key())
        small = vault.put("records", b"everything is loaded now")
        vault.read(small, "records", Everything())
        before = peak_mib()
        begun = time.perf_counter()
        object_id = vault.put("records", cast("BinaryIO", Zeros(size)))
        put_s = time.perf_counter() - begun
        after_put = peak_mib()
        begun, length = time.perf_counter(), 0
        with vault.open(object_id, "records", Everything()) as stream:
            while piece := stream.read(len(PIECE)):
                assert piece == PIECE[: len(piece)]
                length += len(piece)
        open_s = time.perf_counter() - begun
        assert length == size
        vault.delete(object_id)
    return {
        "bytes": size,
        "put_mb_per_s": mb_per_s(size, put_s),
        "open_mb_per_s": mb_per_s(size, open_s),
        "plain_write_mb_per_s": mb_per_s(size, plain_write(home / "plain", size)),
        "additional_peak_mib": {
            "put": round(after_put - before, 1),
            "put and open": round(peak_mib() - before, 1),
        },
    }


def plain_write(path: Path, size: int) -> float:
    """Write as many bytes with no encryption, flush them, and return the seconds."""
    begun, source = time.perf_counter(), Zeros(size)
    with path.open("wb", buffering=0) as file:
        while piece := source.read(encryption.BUFFER_BYTES):
            file.write(piece)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def cpu_name() -> str:
    """Return the processor's name, where Linux tells it."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> int:
    """Measure, print and keep; exit status 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stream-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    size = int(arguments.gigabytes * 1e9)
    if arguments.stream_in is not None:
        print(json.dumps(stream_object(arguments.stream_in, size)))
        return 0
    if shutil.which(OPENSSL[0]) is None:
        parser.error("this compares with the openssl command, which is not installed")
    load_before = os.getloadavg()[0]
    speed = throughput(arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        # a process of its own: the peak of this one is that of the measurement before
        child = [sys.executable, __file__, "--stream-in", folder]
        told = subprocess.run(
            [*child, "--gigabytes", str(arguments.gigabytes)],
            capture_output=True,
            text=True,
            check=True,
        )
    streamed = json.loads(told.stdout)
    additional = streamed["additional_peak_mib"]["put and open"]
    openssl = subprocess.run([*OPENSSL, "version"], capture_output=True, text=True, check=True)
    result = {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "openssl": openssl.stdout.strip(),
            "cryptography": f"{cryptography.__version__}, {backend.openssl_version_text()}",
        },
        "throughput": speed,
        "stream": streamed,
        "goals": {
            f"encryption at least {GOAL_RATIO} x openssl": (
                speed["ratio_to_openssl"]["encrypt"] >= GOAL_RATIO
            ),
            f"decryption at least {GOAL_RATIO} x openssl": (
                speed["ratio_to_openssl"]["decrypt"] >= GOAL_RATIO
            ),
            f"less than {GOAL_MEMORY_MIB} MiB more for the object": additional < GOAL_MEMORY_MIB,
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")
    return 0 if all(result["goals"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
