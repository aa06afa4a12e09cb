"""A token that a model lacks is one line, before a step."""

import pytest
import torch
from transformers import AutoConfig

from fedllm.errors import ModelError
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.limits import num_embeddings
from tests.helpers.architectures import ARCHITECTURES

MODELS = {architecture.name: architecture for architecture in ARCHITECTURES}


def test_a_token_without_an_embedding_is_one_line_and_never_looked_up():
    model = MODELS["Llama"].model()
    batch = collate([{"input_ids": [1, 96, 4], "labels": [-100, 96, 4]}], 0)

    assert num_embeddings(model) == 96
    with pytest.raises(
        ModelError, match="token 96, and the model has embeddings for 96"
    ):
        answer_losses(model, **batch)


def test_a_vocabulary_in_a_text_configuration_counts():
    config = AutoConfig.for_model("gemma3", **MODELS["Gemma 3, vision"].settings)

    class Wrapped:
        def get_input_embeddings(self) -> object:
            return torch.nn.Identity()

    wrapped = Wrapped()
    wrapped.config = config

    assert num_embeddings(wrapped) == 96
