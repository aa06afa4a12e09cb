"""Flower's private task identity, which a message needs outside a run.

A Message takes its sender from the task of its process, and Flower keeps that private.
This module alone uses it: for the audit, for comparisons in one process, and for tests.
It is imported when it is called, so that no real run depends on it.
"""

from fedllm.errors import FederationError


def set_task_identity() -> None:
    """Give this process the identity that Flower's Message needs, unless it has one.

    Raises:
        FederationError: This version of Flower keeps it elsewhere.
    """
    try:
        from flwr.supercore.task_identity import TaskIdentity

        _ = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    except RuntimeError:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    except (ImportError, AttributeError) as error:
        raise FederationError(
            f"flwr: this version makes no messages outside a run ({error}): install the "
            "version that pyproject.toml names"
        ) from None
