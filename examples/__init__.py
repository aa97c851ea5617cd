"""Notebooks: see README.md."""
