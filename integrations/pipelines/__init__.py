"""Adapters of all parts of a diffusers pipeline."""
