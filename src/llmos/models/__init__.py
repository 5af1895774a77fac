"""Base models, adapters, their registry, and text in and out of them."""
