"""Rows to tokens."""
