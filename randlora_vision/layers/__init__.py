"""Modules adapted in place."""
