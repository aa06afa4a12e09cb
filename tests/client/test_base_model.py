"""A client's base model and the server's."""

import pytest

from fedllm.config import fedllm_home
from fedllm.models.location import base_digest
from fedllm.wire.messages import ARRAYS, BASE_MODEL, CONFIG
from tests.helpers.client_replies import WITHOUT_DP, code_of, text_of
from tests.helpers.flower_messages import train_instruction


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_a_client_with_another_base_than_the_server_says_so(
    answer, arrays, home, message_type
):
    message = train_instruction(arrays, message_type=message_type)
    message.content.config_records[CONFIG][BASE_MODEL] = "weights 0 config 0"

    reply = answer(WITHOUT_DP, message=message)

    assert code_of(reply) == "bad-config"
    assert "is another model here than on the server (weights" in text_of(reply)
    (log,) = [path.read_text() for path in (home / "logs").glob("client-*.log")]
    assert "the server's: weights 0 config 0" in log


def test_a_client_with_the_server_s_base_trains(answer, arrays, run_config):
    message = train_instruction(arrays)
    digest = base_digest(run_config["model.name"], fedllm_home())
    message.content.config_records[CONFIG][BASE_MODEL] = digest

    assert ARRAYS in answer(message=message).content
