"""Measure a model and prompt it."""
