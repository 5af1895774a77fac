"""Trust without learning: everything that decides, pays and records."""
