"""Whether this client's base model is the server's."""

from fedllm.config import fedllm_home
from fedllm.errors import ConfigError
from fedllm.foreign_text import printable


def require_same_base(name: str, server_digest: object) -> None:
    """Check that the base model here is the one that the server holds, before it is loaded.

    An adapter of another base is noise to this one, and a base that somebody chose for
    this client alone could make its update tell more.

    Args:
        name: `model.name`.
        server_digest: The digest in the server's message; None: it sent none.

    Raises:
        ConfigError: They differ; both digests are in it.
        ModelError: The model cannot be had, or a file of it has changed.
    """
    if server_digest is None:
        return
    from fedllm.models.location import base_digest, locate

    home = fedllm_home()
    digest = base_digest(locate(name, home), home)
    if digest != server_digest:
        raise ConfigError(
            f"model.name: {name} is another model here than on the server ({digest}; the "
            f"server's: {printable(server_digest)}): install the same files and the same "
            "version of transformers, or pin a hub id by @ and its commit"
        )
