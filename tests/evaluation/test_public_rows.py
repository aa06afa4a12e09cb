"""Public rows load the base model only if there are any."""

from flwr.app import Message, RecordDict

from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS
from tests.helpers.federations import start


def test_a_server_without_public_rows_never_loads_the_base(settings, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the base was loaded")

    server = {**settings, "data.public-validation": "", "data.public-test": ""}
    federation, _ = start(server, answer=lambda m, c: None if False else _echo(m))
    monkeypatch.setattr("fedllm.adapters.adapted_model.load_base", refuse)
    result = federation.run()

    assert result["test_loss_before"] is None
    assert result["recommended"].endswith("peft_final")


def _echo(message):
    """Reply with the global adapter itself: a zero update."""
    arrays = message.content.array_records[ARRAYS]
    return Message(masked(RecordDict({ARRAYS: arrays})), reply_to=message)
