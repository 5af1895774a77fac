"""The command line: one file a noun; `main.py` prints the errors."""
