"""Small random models with the parts of real ones."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.tiny_models import CHAT_TEMPLATE, save_llama

# Workers with as many threads each as there are cores are many times slower than one
# worker. Set before anything imports NumPy or torch, which read it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a sentencepiece tokenizer and no chat template.

    Its files are those that OpenLLaMA has, and no more.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama`, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny-chat-llama")
    save_llama(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that is already there; FEDLLM_CHROMIUM may name it."""
    found = [os.environ.get("FEDLLM_CHROMIUM"), *map(shutil.which, _BROWSERS)]
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("no Chromium on this machine; FEDLLM_CHROMIUM may name one")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # As root, in a container, its sandbox cannot be made.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=program, args=options)
        yield chromium
        chromium.close()
