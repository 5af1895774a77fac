"""Federations: jobs that a coordinator proposes and sites agree to, as both homes keep them."""
