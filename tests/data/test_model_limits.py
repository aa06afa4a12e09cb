"""What a base model allows an example to be."""

from types import SimpleNamespace

import pytest

from fedllm.data.model_limits import require_positions, vocabulary_of
from fedllm.errors import ConfigError


def test_a_model_has_a_position_for_every_token():
    from transformers import GPT2Config, MambaConfig

    require_positions(64, GPT2Config(n_positions=64))
    require_positions(10**6, MambaConfig())
    with pytest.raises(ConfigError, match=r"train.max-length: must be at most 64.*65"):
        require_positions(65, GPT2Config(n_positions=64))


def test_the_vocabulary_is_that_of_the_text_part():
    from transformers import GPT2Config

    assert vocabulary_of(GPT2Config(vocab_size=7)) == 7
    whole = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=9))
    assert vocabulary_of(whole) == 9
    assert vocabulary_of(SimpleNamespace()) is None
