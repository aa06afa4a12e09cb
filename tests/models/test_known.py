"""Models that are known by name."""

from fedllm.config import RunConfig
from fedllm.models.known import BUILT_IN_MODEL, KNOWN_MODELS


def test_the_built_in_model_is_the_default_and_known():
    assert RunConfig().model.name == BUILT_IN_MODEL.name == "smollm2-135m-instruct"
    assert KNOWN_MODELS[BUILT_IN_MODEL.name] is BUILT_IN_MODEL
