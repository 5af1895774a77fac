"""Passwords and one-time codes: how people show who they are before they get an API key."""
