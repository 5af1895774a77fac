from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.databases import place

from llmos.databases.postgresql import PostgreSQL
from llmos.errors import JobBusy, StorageError
from llmos.jobs import lease

HOLDER = """
import sys
from pathlib import Path
from llmos.jobs import lease
from tests.databases import place
where = place(Path(sys.argv[1]))
with lease.hold(where, "job-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def where(tmp_path: Path) -> Path | PostgreSQL:
    return place(tmp_path / "run")


@pytest.mark.databases
def test_one_holder_at_a_time(where: Path | PostgreSQL) -> None:
    assert not lease.is_held(where, "job-1")
    with lease.hold(where, "job-1"):
        assert lease.is_held(where, "job-1")
        assert not lease.is_held(where, "job-2")
        with pytest.raises(JobBusy, match="job-1") as busy, lease.hold(where, "job-1"):
            pytest.fail("two hold one lease")
        assert "llmos jobs show job-1" in busy.value.hint
    assert not lease.is_held(where, "job-1")


@pytest.mark.databases
def test_the_lease_ends_with_its_block_when_the_block_fails(where: Path | PostgreSQL) -> None:
    with pytest.raises(ValueError, match="oops"), lease.hold(where, "job-1"):
        raise ValueError("oops")
    assert not lease.is_held(where, "job-1")


@pytest.mark.databases
def test_the_lease_of_a_killed_process_is_free(where: Path | PostgreSQL, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert lease.is_held(where, "job-1")
        with pytest.raises(JobBusy), lease.hold(where, "job-1"):
            pytest.fail("two hold one lease")
        holder.kill()
        holder.wait()
    wait_until_free(where)
    with lease.hold(where, "job-1"):
        pass


def wait_until_free(where: Path | PostgreSQL) -> None:
    """A file's lock is free at once; a server first has to notice that the connection is gone."""
    deadline = time.monotonic() + (10 if isinstance(where, PostgreSQL) else 0)
    while lease.is_held(where, "job-1"):
        assert time.monotonic() < deadline


def test_looking_does_not_count_as_holding(tmp_path: Path) -> None:
    with lease.hold(tmp_path, "job-1"):
        pass
    with (tmp_path / "job-1.lock").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # what another process's `is_held` does
        assert not lease.is_held(tmp_path, "job-1")


def test_files_and_folder_are_private(tmp_path: Path) -> None:
    with lease.hold(tmp_path / "run", "job-1"):
        pass
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run/job-1.lock").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_used_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(StorageError, match="the lease of job-1 cannot be used"):
        lease.is_held(tmp_path / "run", "job-1")
