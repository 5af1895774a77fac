"""Alembic migrations of both databases; `llmos.kernel.store` runs them."""
