"""Measuring, and writing up what was measured."""
