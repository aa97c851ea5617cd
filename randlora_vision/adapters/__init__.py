"""Whole adapters: saving, loading, reading PEFT's folders, adding adapters up."""
