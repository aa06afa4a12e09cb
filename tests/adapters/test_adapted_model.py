"""A run's base model with its adapter on it, loaded in one place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.adapters import adapted_model
from fedllm.adapters.adapted_model import AdaptedModel, load_adapted_model
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError
from tests.helpers.adapters import logits, make_spec, random_arrays


def config_of(folder: Path, **more: Any) -> RunConfig:
    settings = {"model.name": str(folder), "model.quantization": 0, "adapter.rank": 4}
    return parse_run_config({**settings, "seed": 5, **more})


@pytest.fixture(scope="module")
def adapted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return load_adapted_model(config_of(tiny_llama), tmp_path_factory.mktemp("home"))


def test_a_run_gets_its_base_its_adapter_and_its_tokenizer(adapted, tiny_llama):
    assert adapted.spec == make_spec(tiny_llama)
    assert adapted.model.get_base_model().name_or_path == str(tiny_llama)
    assert adapted.tokenizer.name_or_path == str(tiny_llama)
    assert adapted.pad_token_id == adapted.tokenizer.pad_token_id


def test_a_fresh_adapter_changes_nothing_and_set_values_come_back(adapted):
    with adapted.model.disable_adapter():
        base = logits(adapted.model)
    fresh, arrays = adapted.get(), random_arrays(adapted.spec)
    before = logits(adapted.model)

    adapted.set(arrays)

    assert torch.equal(before, base)
    assert (logits(adapted.model) - base).abs().max() > 1e-2
    got = adapted.get()
    assert all(np.array_equal(got[name], arrays[name]) for name in arrays)
    adapted.set(fresh)
    assert torch.equal(logits(adapted.model), base)


def test_an_adapter_that_does_not_fit_is_reported_before_weights_are_read(
    tiny_llama, tmp_path, monkeypatch
):
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(adapted_model, "load_base", load)

    with pytest.raises(AdapterError, match="adapter.rank"):
        load_adapted_model(config_of(tiny_llama, **{"adapter.rank": 64}), tmp_path)


def test_every_setting_of_the_model_reaches_the_loader(
    tiny_llama, tmp_path, monkeypatch
):
    class LoadedError(Exception):
        """Ends the test where the base would be loaded."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise LoadedError(args, kwargs)

    monkeypatch.setattr(adapted_model, "load_base", load)
    more = {"model.quantization": 8, "model.quantize-embeddings": True}

    with pytest.raises(LoadedError) as caught:
        load_adapted_model(config_of(tiny_llama, **more), tmp_path, "cpu")

    assert caught.value.args == (
        (str(tiny_llama), 8, tmp_path, "cpu"),
        {"quantize_embeddings": True},
    )
