"""Made-up personal names for canaries and for synthetic records; nobody is meant."""

from __future__ import annotations

from typing import Final

_FIRST: Final = """
Maria James Aisha Wei Ivan Olga Peter Fatima Chen Lucas Nina Omar Priya Hugo Elena Tariq Sofia
Jonas Mei Pablo Ingrid Kofi Leila Anton Rosa Dmitri Yara Felix Noor Bruno
"""
_LAST: Final = """
Lopez Smith Khan Zhang Petrov Novak Jones Hassan Liu Moreau Rossi Haddad Patel Weber Costa
Rahman Silva Berg Wang Ortiz Larsen Mensah Karimi Bauer Greco Orlov Santos Klein Ahmed Conti
"""

NAMES: Final = tuple(  # 900, all distinct
    f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()
)
