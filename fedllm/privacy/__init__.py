"""Client-level differential privacy: mechanism, accounting and planning."""
