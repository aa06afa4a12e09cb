"""The run config of a comparison of seconds."""

import pytest

from tests.helpers.rows import write_rows


@pytest.fixture
def config_file(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    # The page of an arm's run is drawn from its other files, and most of its seconds.
    monkeypatch.setattr("fedllm.reporting.monitor.write_report", lambda folder: None)
    path = tmp_path / "run.toml"
    rows = [write_rows(tmp_path / f"{i}.jsonl", 12, 100 * i) for i in range(3)]
    path.write_text(f"""
num-server-rounds = 2
[model]
name = "{tiny_llama}"
quantization = 0
[data]
name = "{rows[0]}"
public-validation = "{rows[1]}"
public-test = "{rows[2]}"
[adapter]
kind = "lora"
rank = 4
[train]
batch-size = 2
local-steps = 1
""")
    return path
