"""The audit of client-level privacy, through the real strategy."""
