"""The parties of an audit are real clients and trustees."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.client.trustee import Trustee
from fedllm.commands.sealed_parties import SealedParties
from fedllm.errors import ConfigError
from fedllm.wire.messages import CONFIG
from fedllm.wire.resumed_run import run_name
from fedllm.wire.sealed_messages import HELLO, RUN_NAME, read_certificate
from fedllm.wire.task_identity import set_task_identity
from tests.helpers.audits import sealed


@pytest.fixture
def parties(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)
    set_task_identity()
    return SealedParties(sealed(), 4)


def greeted(parties, node):
    config = ConfigRecord({RUN_NAME: run_name(sealed(), 1)})
    message = Message(RecordDict({CONFIG: config}), node, HELLO)
    reply = Message(parties.answer(node, message), reply_to=message)
    return read_certificate(reply) is not None


def test_the_first_nodes_are_the_trustees(parties):
    assert [greeted(parties, node) for node in (1, 2, 3, 4)] == [True] * 3 + [False]
    assert isinstance(parties.trustee("c"), Trustee)
    assert parties.sealing_key("a") != parties.sealing_key("b")
    assert parties.last_slot("a") == 0


def test_a_client_without_a_training_refuses(parties):
    message = Message(RecordDict({CONFIG: ConfigRecord()}), 4, "train")

    with pytest.raises(ConfigError, match="nothing to train on"):
        parties.answer(4, message)
