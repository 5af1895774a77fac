"""Cryptography without state: objects, keys, Merkle trees, signed notes and envelopes."""
