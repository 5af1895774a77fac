"""The verbs of a system by noun, as the command line and the Python API have them."""
