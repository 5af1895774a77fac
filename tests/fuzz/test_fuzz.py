"""Each parser of untrusted bytes is fuzzed for a while, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.homes import process_environment

TARGETS = (
    "api-key",
    "canary-book",
    "certificate",
    "chat-request",
    "ciphertext",
    "csv",
    "envelope",
    "jsonl",
    "log-proof",
    "mechanism",
    "notes",
    "parquet",
    "policy",
    "root-json",
    "witness-request",
)
SECONDS = 5


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("target", TARGETS)
def test_only_our_errors_leave_a_parser(target: str, tmp_path: Path, long: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=4096", "-verbosity=1"]
    fuzzing = subprocess.run(
        [
            *[sys.executable, "-m", "tests.fuzz.targets", target, str(corpus)],
            *[f"-max_total_time={SECONDS * long}", f"-artifact_prefix={tmp_path}/", *limits],
        ],
        cwd=Path(__file__).parents[2],
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # the fuzzer speaks on stderr, the traceback stands on stdout
        text=True,
        check=False,
    )
    assert fuzzing.returncode == 0, fuzzing.stdout[-4000:]
    assert "stat::number_of_executed_units" in fuzzing.stdout or "Done" in fuzzing.stdout
