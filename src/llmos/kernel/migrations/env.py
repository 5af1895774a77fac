"""Alembic's entry: run the revisions on the connection, and in the transaction, of the store."""

from __future__ import annotations

from typing import Final

from alembic import context
from sqlalchemy import Connection

_OF_A_LANGUAGE: Final = (
    "SELECT table_name, column_name FROM information_schema.columns WHERE data_type = 'text' "
    "AND table_schema = current_schema() AND collation_name IS DISTINCT FROM 'C'"
)


def _compare_bytewise(connection: Connection) -> None:
    """Let PostgreSQL compare texts byte by byte, as SQLite does.

    The order of a language may change with the server's C library, and its indices then break.
    """
    for table, column in connection.exec_driver_sql(_OF_A_LANGUAGE).all():
        connection.exec_driver_sql(
            f'ALTER TABLE "{table}" ALTER COLUMN "{column}" TYPE text COLLATE "C"'
        )


_connection = context.config.attributes["connection"]
context.configure(connection=_connection)
context.run_migrations()
if _connection.dialect.name == "postgresql":
    _compare_bytewise(_connection)
