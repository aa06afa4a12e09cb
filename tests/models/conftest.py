"""No network, and a model that a test may spoil."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def own_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
