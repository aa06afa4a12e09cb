"""Where a run runs: SuperLink, SuperNode, keys, checks."""
