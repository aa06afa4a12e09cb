"""The merged model says what base and adapter say together."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.adapter_files import load_adapter, save_adapter
from fedllm.adapters import adapter_spec
from fedllm.commands.export import main
from fedllm.config import parse_run_config
from fedllm.models import load_base, load_config


@pytest.mark.parametrize("kind", ["lora", "ffa-lora", "lora-core", "ia3", "vera"])
def test_merged_logits_are_those_of_base_and_adapter(
    kind, tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    name, folder, out = str(tiny_chat_llama), tmp_path / "peft", tmp_path / "merged"
    config = parse_run_config({"adapter.kind": kind, "adapter.rank": 4})
    spec = adapter_spec(config.adapter, load_config(name), 1)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(0, 0.5, s) for n, s in spec.trained_shapes.items()}
    save_adapter(folder, spec, arrays, name, {})
    command = ["--peft-path", str(folder), "--out", str(out)]

    main(command)

    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        base = load_base(name, 0, tmp_path / "home").float()
        before = base(ids).logits
        together = load_adapter(base, folder)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids)
    assert torch.allclose(merged.logits, together, atol=1e-3)
    assert not torch.allclose(before, together, atol=1e-2)
    with pytest.raises(SystemExit, match="exists already"):
        main(command)
