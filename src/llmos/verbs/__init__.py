"""The verbs of the command line in groups, each a small class over an opened home."""
