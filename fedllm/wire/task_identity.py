"""Flower's private task identity, which a message needs outside a run."""

from flwr.supercore.task_identity import TaskIdentity

from fedllm.errors import PrivacyError


def set_task_identity() -> None:
    """Give this process the identity that Flower's Message wants (private API)."""
    try:
        _ = TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id
    except RuntimeError:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    except AttributeError as error:
        raise PrivacyError(
            f"this version of Flower cannot be audited outside a run: {error}"
        ) from None
