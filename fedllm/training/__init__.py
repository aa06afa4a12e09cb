"""One client's rows to an update."""
