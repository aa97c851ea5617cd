"""Modules that are adapted in place."""
