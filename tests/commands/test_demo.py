"""The page of base and tuned model: what it offers, says and refuses, and how it looks.

FEDLLM_SCREENSHOTS names a folder that is to hold pictures for a person to look at.
"""

import contextlib
import html
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fedllm.adapters.resolve import adapter_spec
from fedllm.commands import demo, demo_page
from fedllm.config import AdapterConfig
from fedllm.models.location import load_config
from fedllm.runs import listing
from fedllm.runs.directory import RunDirectory
from tests.helpers.listening import listeners
from tests.helpers.sample_runs import HOSTILE, write_run

NO_PRIVACY = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
OLD, NEW = "2026-01-02_03-04-05_7", "2026-03-02_03-04-05_8"


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_chat_llama):
    """Two runs with adapters of their own, and what is none."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    add_run(tmp_path, tiny_chat_llama, OLD, 1, **NO_PRIVACY)
    add_run(tmp_path, tiny_chat_llama, NEW, 2, data__name="wordnet-medical")
    (tmp_path / "runs" / "latest").symlink_to(NEW)
    write_run(tmp_path / "runs" / "2026-04-02_03-04-05_9", rounds=0, finished=False)
    return tmp_path


def add_run(home: Path, base: Path, name: str, seed: int, **changes) -> Path:
    """Write a run with rounds 2 and 10, of which it recommends peft_best, round 2."""
    folder = write_run(home / "runs" / name, model__name=str(base), **changes)
    spec = adapter_spec(AdapterConfig(), load_config(str(base)), 1)
    draw = np.random.default_rng(seed)
    origin = {"model": "tiny", "quantization": 0}
    for server_round in (2, 10):
        arrays = {n: draw.normal(0, 5, s) for n, s in spec.trained_shapes.items()}
        RunDirectory(folder).save_round(server_round, spec, arrays, str(base), origin)
    RunDirectory(folder).copy_adapter(2, "peft_best")
    RunDirectory(folder).copy_adapter(10, "peft_final")
    return folder


def options():
    return demo_page.AnswerOptions(6, 0.0, None)


def no_turns():
    return {"base": [], "tuned": []}


def last(answers):
    *_, said = answers
    return said


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        demo.main(list(arguments))
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def test_runs_with_adapters_are_offered_newest_first(home):
    labels, names = zip(*listing.run_choices(home), strict=True)

    assert names == (NEW, OLD)
    assert labels[0].startswith("2026-03-02 03:04, ")
    assert labels[0].endswith("epsilon 8.00, finished")
    assert "epsilon none" in labels[1]


def test_rounds_are_offered_in_the_order_of_numbers_and_the_recommended_is_chosen(home):
    folder = home / "runs" / NEW

    names = listing.adapter_names(folder)
    assert names == ["peft_final", "peft_best", "peft_10", "peft_2"]
    assert listing.recommended_adapter(folder) == "peft_best"
    (folder / "result.json").unlink()
    assert listing.recommended_adapter(folder) == "peft_final"


def test_the_runs_own_statement_and_what_it_leaves_out_are_shown(home):
    private = json.loads((home / "runs" / NEW / "privacy.json").read_text())

    text = html.unescape(demo_page.about(home / "runs" / NEW))

    assert all(x in text for x in [private["statement"], *private["not_covered"]])
    assert "not medical advice" in text
    bare = demo_page.about(home / "runs" / OLD)
    assert "No differential privacy: no noise was added" in bare


def test_no_text_of_a_run_becomes_html(home):
    path = home / "runs" / NEW / "privacy.json"
    path.write_text(json.dumps({"statement": HOSTILE, "not_covered": [HOSTILE]}))

    assert "<script" not in demo_page.about(home / "runs" / NEW)


def test_the_two_models_answer_and_each_round_for_itself(home):
    resident = demo_page.Resident(options(), home)
    folder = home / "runs" / NEW

    def ask(name):
        answers = resident.answers(folder / name, "What is asthma?", no_turns())
        return last(answers)

    final, second, best = ask("peft_final"), ask("peft_2"), ask("peft_best")

    assert final["base"] == second["base"] != ""
    assert len({final["base"], final["tuned"], second["tuned"]}) == 3
    assert best == second
    # A run that goes on writes its best round anew.
    RunDirectory(folder).copy_adapter(10, "peft_best")
    assert ask("peft_best") == final


def test_one_model_is_in_memory_and_stays_there(home, monkeypatch):
    loaded, alive = [], []

    class Fake(demo_page.ChatModel):
        def __init__(self, choice):
            assert not alive
            self.choice = choice
            loaded.append(choice.folder.name)
            alive.append(self.choice)

        def __del__(self):
            alive.clear()

        def variants(self):
            return ["base", "tuned"]

        def answer(self, *asked):
            yield "yes"

    monkeypatch.setattr(demo_page, "ChatModel", Fake)
    resident = demo_page.Resident(options(), home)
    for name in ("peft_2", "peft_2", "peft_10"):
        last(resident.answers(home / "runs" / NEW / name, "?", no_turns()))

    assert loaded == ["peft_2", "peft_10"]


def test_a_conversation_goes_on_from_what_each_model_said_itself(home, monkeypatch):
    prompts = []

    def echo(model, tokenizer, prompt, *_):
        prompts.append(prompt)
        yield f"word{len(prompts)}"

    monkeypatch.setattr("fedllm.evaluation.generation.generate", echo)
    handlers = demo_page.Handlers(options(), home)
    turns = handlers.no_turns()
    for question in ("first?", "second?"):
        *_, turns, _ = last(handlers.ask(NEW, "peft_2", question, turns))

    base, tuned = prompts[2:]
    assert "first?" in base and "word1" in base and "word2" not in base
    assert "word2" in tuned and "word1" not in tuned
    assert turns["tuned"] == [("first?", "word2"), ("second?", "word4")]


BREAK = {
    "adapter_model.safetensors": "damaged",
    "adapter_config.json": "cannot be read",
    "fedllm.json": "JSONDecodeError",
}


@pytest.mark.parametrize("name", BREAK)
def test_a_bad_adapter_is_a_line_on_the_page_which_goes_on(home, name):
    (home / "runs" / NEW / "peft_10" / name).write_text("{")
    handlers = demo_page.Handlers(options(), home)

    question, *_, told = last(handlers.ask(NEW, "peft_10", "why?", no_turns()))

    assert BREAK[name] in told and question == "why?"
    *_, tuned, turns, told = last(handlers.ask(NEW, "peft_2", "why?", no_turns()))
    assert told == "" and turns["tuned"][0][1] == tuned[1]["content"] != ""


@pytest.mark.parametrize(
    ("run", "adapter"),
    [(f"../runs/{NEW}", "peft_2"), (NEW, f"../{OLD}/peft_2"), (None, None), (NEW, "x")],
)
def test_only_what_is_offered_can_be_asked(home, run, adapter):
    told = last(demo_page.Handlers(options(), home).ask(run, adapter, "?", no_turns()))[
        -1
    ]

    assert told.startswith("AdapterError: ") and "reload the page" in told


def test_without_a_run_and_without_gradio_the_error_says_what_to_do(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "find_spec", lambda name: object())
    assert "no run with an adapter there: start one" in failure(capsys)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install 'fedllm[demo]'" in failure(capsys)


@pytest.mark.parametrize("typed", [["--port", "0"], ["--max-new-tokens", "0"], ["x"]])
def test_a_wrong_command_line_says_how_to_use_it(typed, capsys):
    with pytest.raises(SystemExit):
        demo.main(typed)

    assert "usage:" in capsys.readouterr().err


needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs fedllm[demo]"
)


@needs_gradio
def test_a_port_that_is_taken_is_one_line(home):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        got = subprocess.run(start(port), capture_output=True, text=True, check=False)

    assert got.returncode == 1
    assert got.stderr.splitlines()[-1].startswith(f"ConfigError: --port {port}: ")
    assert "Traceback" not in got.stderr


def start(port: str) -> list[str]:
    command = [sys.executable, "-m", "fedllm.commands.demo", "--no-browser"]
    return [*command, "--max-new-tokens", "6", "--port", port]


class Served(NamedTuple):
    """The page's address and process."""

    url: str
    pid: int


@pytest.fixture
def served(home):
    """The page, served by the command itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Every request to the outside fails.
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    with subprocess.Popen(
        start(port), env=os.environ | proxies, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Served(server.stdout.readline().split()[0], server.pid)
        server.terminate()


@pytest.fixture
def url(served):
    return served.url


@needs_gradio
def test_the_served_page_is_this_machines_own(served):
    found = listeners(served.pid)
    assert found
    assert [x for x in found if not x.is_local()] == []

    host = served.url.removeprefix("http://").rstrip("/")
    port = host.rpartition(":")[2]
    wanted = {
        (host, None): 200,
        (f"localhost:{port}", f"http://localhost:{port}"): 200,
        (f"evil.example:{port}", None): 403,
        (f"evil.example:{port}", f"http://evil.example:{port}"): 403,
        (host, "http://evil.example"): 403,
    }
    assert {named: status(host, *named) for named in wanted} == wanted


def status(address: str, host: str, origin: str | None) -> int:
    """Return the status of the page's configuration, asked for by another name."""
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    connection = http.client.HTTPConnection(address, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/config", headers=headers)
        with connection.getresponse() as response:
            return response.status


BOTH_ANSWERED = """() => {
    const answers = [...document.querySelectorAll(".message.bot")];
    return answers.length === 2 && answers.every((answer) => answer.innerText.trim());
}"""


@needs_gradio
@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_answers_in_a_browser_and_asks_nobody_else(
    browser, url, home, width, height
):
    from playwright.sync_api import TimeoutError

    page = browser.new_page(viewport={"width": width, "height": height})
    # Two models answer, perhaps on a busy machine.
    page.set_default_timeout(60_000)
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))

    def ask(question):
        page.get_by_label("Question to both").fill(question)
        page.get_by_role("button", name="Ask").click()

    page.goto(url)
    page.get_by_text("Client-level differential privacy").wait_for()
    assert page.get_by_label("Run").input_value().startswith("2026-03-02 03:04")
    assert page.get_by_label("Adapter").input_value() == "peft_best"
    assert page.get_by_text("not medical advice").is_visible()
    bots = page.locator(".message.bot")
    for _ in range(6):
        # Gradio loses what is asked before all of the page has come to life.
        ask("What is asthma?")
        with contextlib.suppress(TimeoutError):
            page.locator(".message.user").first.wait_for(timeout=20_000)
            break
    page.wait_for_function("document.querySelector('textarea').value === ''")
    page.wait_for_function(BOTH_ANSWERED)
    base, tuned = bots.all_inner_texts()
    assert base and tuned and base != tuned
    if pictures := os.environ.get("FEDLLM_SCREENSHOTS"):
        path = Path(pictures) / f"demo-{width}.png"
        page.screenshot(path=str(path), full_page=True)
    page.get_by_role("button", name="Clear").last.click()
    bots.first.wait_for(state="detached")
    (home / "runs" / NEW / "peft_best" / "adapter_config.json").write_text("{")
    ask("And now?")
    page.get_by_text("AdapterError: ").wait_for()
    page.get_by_label("Run").click()
    page.get_by_role("option").nth(1).click()
    page.get_by_text("No differential privacy: no noise was added").wait_for()
    picture = '<img src="http://example.com/x.png">'
    ask(picture)
    bots.nth(1).wait_for()
    assert page.locator(".message.user").first.inner_text() == picture

    assert said == []
    assert [u for u in asked if not u.startswith((url, "data:", "blob:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
