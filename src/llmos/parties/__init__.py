"""Parties: organisations that compute together, the certificates by which they know each other."""
