"""Differential privacy of clients and records: mechanism, accounting and planning."""
