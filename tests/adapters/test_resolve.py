"""Which layers an adapter trains, and what is refused."""

import shutil

import pytest

from fedllm.adapters.kinds import KINDS
from fedllm.adapters.peft_model import attach
from fedllm.adapters.resolve import resolve, with_kind
from fedllm.config import AdapterConfig
from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError, ConfigError
from tests.helpers.adapters import Q, load_base, make_config, make_spec


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_the_closed_list_takes_the_place_of_auto(kind):
    config = make_config()

    resolved = with_kind(config, kind)

    assert resolved.adapter.kind == kind
    assert with_kind(resolved, "auto") == resolved
    assert resolved.train == config.train


@pytest.mark.parametrize("named", [None, "auto", "qlora", "", 3, ["lora"], b"lora"])
def test_any_other_name_raises_an_error(named):
    with pytest.raises(ConfigError, match="adapter.kind: is 'auto'"):
        with_kind(make_config(), named)


def test_if_the_run_names_a_kind_no_other_name_counts():
    config = parse_run_config({"adapter.kind": "lora-core"})

    assert with_kind(config, "lora") is config
    assert with_kind(config, None) is config


def test_the_spec_needs_no_weights(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)

    assert make_spec(tmp_path) == make_spec(tiny_llama)


def test_a_rank_above_the_smallest_side_raises_an_error(tiny_llama):
    assert make_spec(tiny_llama, rank=32).rank == 32
    with pytest.raises(
        AdapterError, match=r"adapter.rank: must be at most 32.*\(got 33\)"
    ):
        make_spec(tiny_llama, rank=33)


@pytest.mark.parametrize("named", ["query", "q_proj,query", "proj", ","])
def test_unknown_target_modules_are_answered_with_the_known_ones(tiny_llama, named):
    with pytest.raises(AdapterError, match="adapter.target-modules.*it has.*q_proj"):
        make_spec(tiny_llama, target_modules=named)


def test_all_linear_is_every_linear_layer_but_the_head(tiny_llama):
    spec = make_spec(tiny_llama, target_modules="all-linear")

    assert len(spec.modules) == 2 * 7
    assert "lm_head" not in spec.target_modules
    assert spec.modules["model.layers.1.mlp.down_proj"] == (64, 128)


def test_the_output_head_as_a_target_raises_an_error(tiny_llama):
    with pytest.raises(AdapterError, match="lm_head is the output head"):
        make_spec(tiny_llama, target_modules="q_proj,lm_head")


def test_a_module_named_in_full_is_the_only_one_adapted(tiny_llama):
    spec = make_spec(tiny_llama, target_modules="layers.0.self_attn.q_proj")

    model = attach(load_base(tiny_llama), spec)

    assert list(spec.modules) == ["model.layers.0.self_attn.q_proj"]
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A.default")]
    assert adapted == [f"{Q}.lora_A.default"]


def test_all_linear_on_a_model_without_linear_layers_is_one_line():
    config = AdapterConfig(target_modules="all-linear")

    with pytest.raises(AdapterError, match="adapter.target-modules"):
        resolve(config, {}, {}, "llama", 0)
