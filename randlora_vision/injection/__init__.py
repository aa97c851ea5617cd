"""Adapters in a model: selecting weights, and adding, controlling, merging and removing adapters."""
