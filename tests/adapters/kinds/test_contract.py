"""The contract that every kind of adapter keeps; a new kind is tested by being listed."""

import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils import constants
from safetensors.numpy import load_file

from fedllm.adapters import kinds
from fedllm.adapters.files import load_adapter, save_adapter
from fedllm.adapters.kinds import KINDS, kind_of
from fedllm.adapters.peft_model import (
    get_trained,
    initial_arrays,
    peft_arrays,
    set_trained,
)
from fedllm.config import WITHOUT_DROPOUT, AdapterKind
from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError, ConfigError
from tests.helpers.adapters import load_base, logits, make_spec, random_arrays

ALL = list(KINDS)


def rows_of_the_docstring() -> dict[str, list[str]]:
    """Return the cells of the table in the docstring of `kinds`, by kind."""
    lines = [line for line in str(kinds.__doc__).splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_config_the_registry_and_the_table_name_the_same_kinds():
    assert [*KINDS, "auto"] == list(get_args(AdapterKind))
    assert list(rows_of_the_docstring()) == list(KINDS)


def test_a_name_that_is_no_kind_raises_an_error():
    with pytest.raises(ValueError, match="unknown kind of adapter 'qlora'"):
        kind_of("qlora")


def test_no_kind_needs_torch_before_there_is_a_model():
    script = """
import sys
from fedllm.adapters.kinds import KINDS
from fedllm.adapters.peft_model import initial_arrays, peft_arrays
from fedllm.adapters.resolve import resolve
from fedllm.config import AdapterConfig
from fedllm.models.layer_shapes import linear_shapes
for kind in KINDS:
    shapes = linear_shapes("smollm2-135m-instruct")
    spec = resolve(AdapterConfig(kind=kind), shapes, {}, "llama", 1)
    peft_arrays(spec, initial_arrays(spec))
assert not {"torch", "peft", "transformers"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ALL)
def test_initial_arrays_are_the_declared_ones_and_leave_the_base_unchanged(
    tiny_llama, attached, kind
):
    model, spec = attached[kind]
    arrays = initial_arrays(spec)
    set_trained(model, spec, arrays)

    assert {name: a.shape for name, a in arrays.items()} == spec.trained_shapes
    assert all(a.dtype == np.float32 for a in arrays.values())
    torch.testing.assert_close(logits(model), logits(load_base(tiny_llama)))


@pytest.mark.parametrize("kind", ALL)
def test_values_go_in_and_out_and_change_the_answer(tiny_llama, attached, kind):
    model, spec = attached[kind]
    arrays = random_arrays(spec)
    set_trained(model, spec, arrays)

    got = get_trained(model, spec)

    assert list(got) == list(spec.trained_shapes)
    assert all((got[name] == arrays[name]).all() for name in arrays)
    assert (logits(model) - logits(load_base(tiny_llama))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ALL)
def test_only_trained_parameters_need_a_gradient_and_each_gets_one(attached, kind):
    model, spec = attached[kind]
    set_trained(model, spec, random_arrays(spec))
    model.zero_grad(set_to_none=True)

    logits_of = model(input_ids=torch.arange(3, 35).reshape(2, 16)).logits
    logits_of.square().sum().backward()

    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == spec.num_trainable
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_adapter_opens_by_peft_alone_and_by_ours(
    tiny_llama, attached, tmp_path, kind
):
    model, spec = attached[kind]
    arrays = random_arrays(spec)
    set_trained(model, spec, arrays)
    save_adapter(tmp_path, spec, arrays, str(tiny_llama), {})

    alone = PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path)).eval()
    ours = load_adapter(load_base(tiny_llama), tmp_path).eval()

    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours), logits(alone))
    assert (logits(alone) - logits(load_base(tiny_llama))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ALL)
def test_every_weight_of_a_module_in_a_file_has_a_declared_shape(
    tiny_llama, tmp_path, kind
):
    spec = make_spec(tiny_llama, kind, target_modules="all-linear")
    save_adapter(tmp_path, spec, random_arrays(spec), str(tiny_llama), {})
    forms = kind_of(kind).file_shapes
    checked = set()

    for name, value in load_file(tmp_path / "adapter_model.safetensors").items():
        module, _, side = name.removesuffix(".weight").rpartition(".")
        module = module.removeprefix("base_model.model.")
        if module not in spec.modules:
            continue
        out_features, in_features = spec.modules[module]
        sizes = {"out": out_features, "in": in_features, "r": spec.rank, "1": 1}
        allowed = [tuple(sizes[word] for word in form) for form in forms[side]]
        assert value.shape in allowed
        checked.add(side)
    assert checked == set(forms)


@pytest.mark.parametrize("kind", ALL)
def test_a_file_for_other_layers_raises_an_error(tiny_llama, tmp_path, kind):
    spec = make_spec(tiny_llama, kind, target_modules="all-linear")
    save_adapter(tmp_path, spec, random_arrays(spec), str(tiny_llama), {})
    base = load_base(tiny_llama)
    head = base.lm_head
    for layer in base.model.layers:
        layer.mlp.down_proj = head

    with pytest.raises(AdapterError, match="made for another base model"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("kind", ALL)
def test_rank_counts_only_for_a_kind_that_has_one(tiny_llama, kind):
    sizes = {
        sum(np.size(a) for a in peft_arrays(spec, initial_arrays(spec)).values())
        for spec in (make_spec(tiny_llama, kind, rank=rank) for rank in (2, 4))
    }

    assert (len(sizes) == 2) == kind_of(kind).has_rank


@pytest.mark.parametrize("kind", ALL)
def test_the_largest_rank_is_the_one_that_the_kind_declares(tiny_llama, kind):
    shapes = make_spec(tiny_llama, kind).modules.values()
    largest = kind_of(kind).max_rank(shapes)

    if largest is None:
        assert make_spec(tiny_llama, kind, rank=1000).rank == 1000
        return
    assert largest == min(min(shape) for shape in shapes)
    assert make_spec(tiny_llama, kind, rank=largest).rank == largest
    with pytest.raises(AdapterError, match=f"adapter.rank: must be at most {largest}"):
        make_spec(tiny_llama, kind, rank=largest + 1)


@pytest.mark.parametrize("kind", ALL)
def test_dropout_is_allowed_for_a_kind_that_has_it(tiny_llama, kind):
    settings: dict[str, Any] = {"adapter.kind": kind, "adapter.dropout": 0.5}
    has_dropout = kind_of(kind).has_dropout

    assert (kind in WITHOUT_DROPOUT) == (not has_dropout)
    if not has_dropout:
        with pytest.raises(ConfigError, match=f"adapter.dropout: .*{kind} has no"):
            parse_run_config(settings)
        return
    assert parse_run_config(settings).adapter.dropout == 0.5
    config = kind_of(kind).peft_config(make_spec(tiny_llama, kind, dropout=0.5))
    assert [v for k, v in config.to_dict().items() if k.endswith("_dropout")] == [0.5]


@pytest.mark.parametrize("kind", ALL)
def test_the_hubs_tag_is_pefts_own_name_of_the_method(tiny_llama, kind):
    config = kind_of(kind).peft_config(make_spec(tiny_llama, kind))

    assert kind_of(kind).peft_method.upper() == config.peft_type.value


@pytest.mark.parametrize("kind", ALL)
def test_the_mean_is_exact_where_kind_and_table_declare_it(attached, kind):
    model, spec = attached[kind]
    one, two = random_arrays(spec, 1), random_arrays(spec, 2)
    mean = {name: (one[name] + two[name]) / 2 for name in one}

    weights = [weights_of(model, spec, arrays) for arrays in (one, two, mean)]

    exact = np.allclose(weights[2], (weights[0] + weights[1]) / 2, atol=1e-5)
    assert exact == kind_of(kind).is_mean_exact
    assert rows_of_the_docstring()[kind][-1] == ("yes" if exact else "no")


def weights_of(model: Any, spec: Any, arrays: Any) -> Any:
    """Return the weights that the adapted layers act with, all values in one row."""
    set_trained(model, spec, arrays)
    base = model.get_base_model()
    with torch.no_grad():
        products = [
            base.get_submodule(module)(torch.eye(in_features))
            for module, (_, in_features) in spec.modules.items()
        ]
    return np.concatenate([product.numpy().ravel() for product in products])


@pytest.mark.parametrize("kind", ALL)
def test_default_modules_are_pefts_for_llama_and_exist_in_one(tiny_llama, kind):
    targets, rescaled = kind_of(kind).default_modules("llama")[0]

    assert set(rescaled) <= set(targets)
    spec = make_spec(tiny_llama, kind)
    assert {module.rsplit(".", 1)[-1] for module in spec.modules} == set(targets)
    table = f"TRANSFORMERS_MODELS_TO_{kind_of(kind).peft_method.upper()}"
    assert (
        list(targets) == getattr(constants, f"{table}_TARGET_MODULES_MAPPING")["llama"]
    )
    known = getattr(constants, f"{table}_FEEDFORWARD_MODULES_MAPPING", {"llama": []})
    assert list(rescaled) == known["llama"]
