"""Databases other than SQLite for the kernel's stores; a home on SQLite loads none of them."""
