"""Adapters that are attached to a small model or saved to a folder."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.adapters.files import save_adapter
from fedllm.adapters.peft_model import attach
from tests.helpers.adapters import KINDS, load_base, make_spec, random_arrays


@pytest.fixture(scope="module")
def attached(tiny_llama: Path) -> dict[str, Any]:
    """Kind -> (model, spec); a test sets the trained values that it wants."""
    made = {}
    for kind in KINDS:
        spec = make_spec(tiny_llama, kind)
        made[kind] = (attach(load_base(tiny_llama), spec).eval(), spec)
    return made


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> Path:
    spec = make_spec(tiny_llama)
    origin = {"model": "tiny", "server_round": 3}
    save_adapter(tmp_path / "a", spec, random_arrays(spec), str(tiny_llama), origin)
    return tmp_path / "a"
