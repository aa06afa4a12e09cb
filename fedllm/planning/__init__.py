"""Before a run: noise, expected loss, memory, adapter kind."""
