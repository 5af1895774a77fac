"""Tables whose rows stay as they were written: the database itself refuses to change them."""

from __future__ import annotations

from alembic import op


def protect(table: str) -> None:
    """Refuse every change and removal of rows of a table."""
    if op.get_bind().dialect.name == "sqlite":
        for statement in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{statement.lower()} BEFORE {statement} "
                f"ON {table} BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE integrity_constraint_violation USING MESSAGE = TG_TABLE_NAME || ' is append-only'; "
        "END $$"
    )
    for statement, each in (("UPDATE", "ROW"), ("DELETE", "ROW"), ("TRUNCATE", "STATEMENT")):
        op.execute(
            f"CREATE TRIGGER {table}_no_{statement.lower()} BEFORE {statement} "
            f"ON {table} FOR EACH {each} EXECUTE FUNCTION refuse_change()"
        )
