"""What the user did or met that stops a run: one line, with the remedy."""


class FedllmError(Exception):
    """Base of all errors that are shown to a person as one line, without traceback."""


class ConfigError(FedllmError):
    """The run config is not valid; names every bad key at once."""


class DataError(FedllmError):
    """A data file or data set cannot be used."""


class ModelError(FedllmError):
    """A base model cannot be found, loaded or quantised."""


class AdapterError(FedllmError):
    """An adapter folder cannot be used, or does not fit the base model."""


class PrivacyError(FedllmError):
    """A privacy setting cannot be honoured; nothing was released."""


class BudgetError(PrivacyError):
    """One more release would pass what may be spent; nothing was released."""


class FederationError(FedllmError):
    """The federation cannot train: too few clients, or none ever answered."""


class TimeLimitError(FedllmError):
    """A client cannot finish within the time that a round has."""


class KeyFolderError(FedllmError):
    """Keys for a deployment cannot be made there; nothing was written over."""


class NodeError(FedllmError):
    """A node's owner has not allowed it, or what the node keeps cannot be trusted."""
