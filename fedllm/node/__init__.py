"""What a node's owner decides and can look up: apps, approvals of runs, reviewers, the log.

    >>> from fedllm.node.log import append
    >>> append("spent", run_id=7, epsilon=0.5)

Enters: the bytes of a delivered app, a run's settings, facts to keep. Leaves: an answer to
whether the owner allows it, and files under FEDLLM_HOME/node that only the owner may read.
Knows no server, no training and no Flower. Must not import torch, `client` or `deployment`.
"""
