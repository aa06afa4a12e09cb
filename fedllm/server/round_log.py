"""What a round leaves behind: its line in the log and in metrics.jsonl."""

from fedllm.wire.messages import ERROR_CODES


def where_to_look(code: str) -> str:
    """Say on whose side an update came to nothing, and so where the reason is."""
    if code in ERROR_CODES:
        return (
            "; the client failed, and its own log has the reason if it could write "
            "one: logs/client-<partition>.log under its ~/.fedllm"
        )
    return "; the server finds so of the reply, and the client's log need not say why"
