"""The page that asks both models: what it offers, what it says, and in a browser."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedllm.adapter_files import save_adapter
from fedllm.adapters import adapter_spec
from fedllm.commands import demo
from fedllm.config import parse_run_config
from fedllm.errors import FedllmError
from fedllm.models import load_config
from tests.reporting.sample_runs import write_run
from tests.reporting.test_browser import browser  # noqa: F401 - a fixture
from tests.slow.flower_processes import ROOT, free_port

OLD, NEW = "2026-01-01_00-00-00_1", "2026-02-01_00-00-00_2"


@pytest.fixture
def runs(tiny_chat_llama, tmp_path, monkeypatch):
    """Two runs with adapters and one without; the newer run has no privacy."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    folder = tmp_path / "runs"
    quiet = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
    write_run(folder / OLD)
    write_run(folder / NEW, **quiet)
    write_run(folder / "2026-03-01_00-00-00_3")
    config = parse_run_config({"adapter.kind": "lora", "adapter.rank": 4})
    name = str(tiny_chat_llama)
    spec = adapter_spec(config.adapter, load_config(name), 1)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(0, 5, s) for n, s in spec.trained_shapes.items()}
    origin = {"model": "tiny", "quantization": 0, "server_round": 2}
    for run, adapter in ((OLD, "peft_10"), (OLD, "peft_9"), (NEW, "peft_final")):
        save_adapter(folder / run / adapter, spec, arrays, name, origin)
    (folder / "latest").symlink_to(folder / NEW)
    return folder


def test_runs_with_adapters_are_offered_newest_first_and_rounds_in_order(runs):
    found = demo.runs_with_adapters(runs)

    assert [run.name for run in found] == [NEW, OLD]
    assert [text for text, _ in demo.adapters(found[0])] == ["the last round"]
    assert [text for text, _ in demo.adapters(found[1])] == ["round 9", "round 10"]


def test_the_statement_is_the_run_s_own(runs):
    assert "Client-level differential privacy" in demo.told_of(runs / OLD)
    assert "No differential privacy" in demo.told_of(runs / NEW)
    (runs / NEW / "privacy.json").write_text("{")
    assert "is damaged" in demo.told_of(runs / NEW)


def test_both_models_answer_and_remember_what_they_said_themselves(runs):
    answering, folder = demo.Answering(max_new_tokens=8), runs / OLD / "peft_9"

    *_, first = answering.ask(folder, "What is a fever?", {})
    *_, second = answering.ask(folder, "And a cough?", first)

    assert set(first) == {"base", "tuned"}
    assert first["base"] != first["tuned"]
    for name, turns in second.items():
        assert turns[:1] == first[name]
        assert [question for question, _ in turns] == [
            "What is a fever?",
            "And a cough?",
        ]


def test_a_damaged_adapter_is_an_error_and_the_next_one_answers(runs):
    answering = demo.Answering(max_new_tokens=4)
    (runs / OLD / "peft_9" / "adapter_model.safetensors").write_bytes(b"{")

    with pytest.raises(FedllmError, match="damaged"):
        list(answering.ask(runs / OLD / "peft_9", "What is a fever?", {}))

    assert list(answering.ask(runs / OLD / "peft_10", "What is a fever?", {}))


def test_without_runs_or_without_gradio_one_line_says_what_to_do(
    runs, tmp_path, monkeypatch
):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gradio", None)
        with pytest.raises(SystemExit, match=r"pip install -e '\.\[demo\]'"):
            demo.main([])
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="no run with an adapter"):
        demo.main([])


@pytest.fixture
def address(runs):
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-m", "fedllm.commands.demo", "--no-browser"]
    command += ["--port", str(port), "--max-new-tokens", "8"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            line = process.stdout.readline().decode()
            assert f"http://127.0.0.1:{port}" in line, line
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


@pytest.mark.browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_in_a_browser_both_answer_and_nothing_is_fetched_from_elsewhere(
    browser, address, size  # noqa: F811 - the fixture
):
    width, height = size
    view = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    view.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    view.on("pageerror", lambda error: said.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(address)
    view.get_by_text("No differential privacy").first.wait_for()

    view.get_by_label("Question").fill("What is a fever?")
    view.get_by_role("button", name="Ask").click()
    answers = view.locator(".bot.message")
    with contextlib.suppress(Exception):
        answers.nth(1).wait_for(timeout=60_000)
    if pictures := os.environ.get("FEDLLM_SCREENSHOTS"):
        view.screenshot(path=str(Path(pictures) / f"demo-{width}.png"), full_page=True)

    assert answers.count() == 2
    assert all(text.strip() for text in answers.all_inner_texts())
    assert said == []
    assert [u for u in asked if not re.match(f"{address}|data:|blob:", u)] == []
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    view.close()
