"""Bytes on disk: what is written whole, and what is checked before it is read."""
