"""Adapters on a model: choosing weights, adding, controlling, merging and removing adapters."""
