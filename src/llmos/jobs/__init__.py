"""Durable work: jobs, their steps and the lease that one live process holds on each."""
