"""Measuring what a model betrays: models and numbers only, no stored data and no kernel."""
