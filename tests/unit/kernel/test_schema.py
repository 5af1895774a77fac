"""The standing tables: the log names their digest, and a change without an act is found."""

from __future__ import annotations

from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from tests.databases import outside

import llmos
from llmos.config import Config
from llmos.errors import RequestError, TamperedLog
from llmos.kernel import kernel as kernels
from llmos.kernel.schema import KERNEL, STANDING, settings
from llmos.kernel.store import Store
from llmos.transparency import tables as _partners  # noqa: F401 - adds its tables to KERNEL

GROWS_WITH_EVERY_JOB = {
    "budget_costs",
    "budget_events",
    "budget_reservations",
    "federated_answers",
    "federated_jobs",
    "federated_rounds",
    "federated_statements",
    "job_steps",
    "jobs",
    "log_checkpoints",
    "log_cosignatures",
    "log_entries",
    "log_nodes",
    "site_jobs",
}
# Party certificates are checked by their signatures; tokens by their HMAC; attempts are counted
# when nobody is known to act; receipts are signed; a coordinator's keys come with its first call.
CHANGED_OUTSIDE_OF_ACTS = {
    "coordinators",
    "erasure_receipts",
    "join_tokens",
    "login_attempts",
    "memberships",
    "parties",
    "party_authority",
    "party_certificates",
    "trusted_organisations",
}


def change(home: Path, statement: str) -> None:
    """Write to kernel.db as somebody does who has no log key."""
    with outside(home) as conn:
        conn.exec_driver_sql(statement)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config(home=tmp_path / "home")
    kernel = kernels.create(config)
    kernel.store.close()
    kernel.vault.keyring.store.close()
    return config


def test_every_table_is_in_the_digest_or_known_to_grow() -> None:
    for tables in Path(llmos.__file__).parent.glob("*/tables.py"):
        import_module(f"llmos.{tables.parent.name}.tables")
    assert set(KERNEL.tables) == set(STANDING) | GROWS_WITH_EVERY_JOB | CHANGED_OUTSIDE_OF_ACTS


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE principals SET roles = '["auditor"]'""",
        "INSERT INTO settings (name, value) VALUES ('new', '')",
        pytest.param(
            "DROP TRIGGER budget_events_no_update",
            marks=pytest.mark.sqlite("its schema is a table"),
        ),
    ],
)
def test_a_change_without_an_act_is_found_at_the_next_opening(
    config: Config, statement: str
) -> None:
    change(config.home, statement)
    with pytest.raises(TamperedLog, match="not as the last act left it"):
        kernels.open_kernel(config)


def test_a_text_with_a_nul_is_refused_before_it_is_written(config: Config) -> None:
    with closing(Store.open(config.home / "kernel.db", KERNEL)) as store:
        new = insert(settings).values(name="a", value="b\0c")
        with pytest.raises(RequestError, match="NUL"), store.transaction() as conn:
            conn.execute(new)
        with store.read() as conn:
            assert "a" not in conn.execute(select(settings.c.name)).scalars().all()
