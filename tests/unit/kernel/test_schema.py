"""The standing tables: the log names their digest, and a change without an act is found."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from llmos.config import Config
from llmos.errors import TamperedLog
from llmos.kernel import kernel as kernels
from llmos.kernel.schema import KERNEL, STANDING
from llmos.kernel.store import Store
from llmos.transparency import tables as _partners  # noqa: F401 - adds its tables to KERNEL

GROWS_WITH_EVERY_JOB = {
    "budget_costs",
    "budget_events",
    "budget_reservations",
    "job_steps",
    "jobs",
    "log_checkpoints",
    "log_cosignatures",
    "log_entries",
    "log_nodes",
}


def change(home: Path, statement: str) -> None:
    """Write to kernel.db as somebody does who has no log key."""
    with closing(Store.open(home / "kernel.db", KERNEL)) as store, store.transaction() as conn:
        conn.exec_driver_sql(statement)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(home=tmp_path / "home")
    kernel = kernels.create(config)
    kernel.store.close()
    kernel.vault.keyring.store.close()
    return config


def test_every_table_is_in_the_digest_or_known_to_grow() -> None:
    from llmos.jobs import tables as _jobs  # noqa: F401
    from llmos.models import tables as _models  # noqa: F401

    assert set(KERNEL.tables) == set(STANDING) | GROWS_WITH_EVERY_JOB


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE principals SET roles = '["auditor"]'""",
        "INSERT INTO settings (name, value) VALUES ('new', '')",
        "DROP TRIGGER budget_events_no_update",
    ],
)
def test_a_change_without_an_act_is_found_at_the_next_opening(
    config: Config, statement: str
) -> None:
    change(config.home, statement)
    with pytest.raises(TamperedLog, match="not as the last act left it"):
        kernels.open_kernel(config)
