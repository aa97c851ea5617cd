"""Adapters in all components of a diffusers pipeline."""
