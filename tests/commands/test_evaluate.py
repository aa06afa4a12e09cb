import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedllm.adapters.resolve import adapter_spec
from fedllm.client.personal import make_personal
from fedllm.commands.evaluate import main
from fedllm.commands.main import main as fedllm
from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.evaluation.inference import ChatModel, find_model
from fedllm.models.location import load_config
from fedllm.reporting.sentences import NOT_ADVICE
from fedllm.runs.directory import CONFIG_FILE, RESULT_FILE, RunDirectory
from tests.helpers.deliveries import deliver_to
from tests.helpers.rows import write_rows
from tests.helpers.tiny_models import SENTENCES

QUESTION = ["--question", "What is asthma?", "--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, tmp_path: Path, tiny_chat_llama: Path) -> RunDirectory:
    """A finished run whose adapter changes every answer."""
    test_rows = tmp_path / "test.jsonl"
    rows = [{"instruction": text[:20], "response": text[20:]} for text in SENTENCES]
    test_rows.write_text("\n".join(json.dumps(row) for row in rows))
    config = parse_run_config(
        {
            "model.name": str(tiny_chat_llama),
            "model.quantization": 0,
            "data.name": str(test_rows),
            "data.public-test": str(test_rows),
        }
    )
    spec = adapter_spec(config.adapter, load_config(str(tiny_chat_llama)), 1)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(0, 5, s) for n, s in spec.trained_shapes.items()}
    origin = {"model": "tiny", "quantization": 0}
    run = RunDirectory.create(home, 3)
    base = str(tiny_chat_llama)
    run.write_json(CONFIG_FILE, {"run_config": flat(config), "base": base})
    run.save_round(2, spec, arrays, base, origin)
    final = run.copy_adapter(2, "peft_final")
    run.write_json(RESULT_FILE, {"recommended": str(final)})
    return run


def ask(capsys: Any, *arguments: str) -> str:
    main(list(arguments))
    return str(capsys.readouterr().out)


def ask_json(capsys: Any, *arguments: str) -> dict[str, Any]:
    return dict(json.loads(ask(capsys, *arguments, "--json")))


def failure(*arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


def test_the_latest_runs_adapter_answers_and_says_which_it_is(
    run, capsys, tiny_chat_llama
):
    lines = ask(capsys, *QUESTION).splitlines()

    assert lines[0] == (
        f"answers: {tiny_chat_llama} with the adapter {run.path / 'peft_final'}, round 2"
    )
    assert lines[-1] == NOT_ADVICE
    assert any(line.startswith("tuned: ") for line in lines)
    assert not any(line.startswith("base: ") for line in lines)


def test_the_untuned_model_answers_beside_it(run, capsys):
    got = ask_json(capsys, *QUESTION, "--base")

    assert set(got["answers"]) == {"base", "tuned"}
    assert got["answers"]["base"] != got["answers"]["tuned"]
    assert got["question"] == "What is asthma?"
    assert got["note"] == NOT_ADVICE


def test_json_is_one_object_and_nothing_else(run, capsys):
    got = ask_json(capsys, *QUESTION, "--held-out")

    assert set(got) == {"answers_for", "held_out", "question", "answers", "note"}


def test_held_out_measures_both_models_on_the_runs_test_rows(run, capsys):
    got = ask_json(capsys, "--held-out", "--base")["held_out"]

    assert got["base"]["loss"] == pytest.approx(np.log(384), abs=0.5)
    assert abs(got["base"]["loss"] - got["tuned"]["loss"]) > 1e-2
    assert got["base"]["perplexity"] == pytest.approx(np.exp(got["base"]["loss"]))
    assert got["base"]["num_examples"] == 10
    out = ask(capsys, "--held-out")
    assert f"tuned: loss {got['tuned']['loss']:.3f}, perplexity" in out
    assert "on 10 test rows" in out


def test_where_the_base_is_recommended_the_base_answers(run, capsys):
    run.write_json(RESULT_FILE, {"recommended": "base"})

    out = ask(capsys, *QUESTION)

    assert out.startswith("answers: the untuned ")
    assert str(run.path) in out.splitlines()[0]
    assert "\nbase: " in out


def test_a_named_round_answers_for_itself(run, capsys):
    got = ask_json(capsys, *QUESTION, "--peft-path", str(run.path / "peft_2"))

    assert got["answers_for"].endswith("peft_2, round 2")


@pytest.mark.parametrize("bits", ["0", "4"])
@pytest.mark.parametrize("make_config", [LoraConfig, IA3Config, VeraConfig])
def test_an_adapter_of_plain_peft_answers(
    tiny_chat_llama, tmp_path, capsys, make_config, bits
):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    config = make_config(task_type="CAUSAL_LM", target_modules=["v_proj"])
    if make_config is IA3Config:
        config.feedforward_modules = set()
    get_peft_model(base, config).save_pretrained(str(tmp_path / "plain"))
    arguments = [*QUESTION, "--peft-path", str(tmp_path / "plain")]

    got = ask_json(capsys, *arguments, "--quantization", bits)

    assert str(tmp_path / "plain") in got["answers_for"]
    assert str(tiny_chat_llama) in got["answers_for"]
    assert set(got["answers"]) == {"tuned"}


def test_a_benchmark_scores_both_models_against_chance(run, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    rows = [
        {
            "question": "What is asthma?",
            "options": ["A bone.", "A disorder."],
            "answer": k,
        }
        for k in (0, 1)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))

    got = ask_json(capsys, "--benchmark", str(path), "--base")["benchmark"]

    assert set(got) == {"base", "tuned"}
    # The same question with either option as the answer: one of the two is right.
    assert got["base"]["accuracy"] == got["tuned"]["accuracy"] == 0.5
    assert got["base"]["chance"] == 0.5
    assert got["base"]["num_questions"] == 2
    low, high = got["base"]["interval_95"]
    assert 0 < low < 0.5 < high < 1
    assert "chance 0.500" in ask(capsys, "--benchmark", str(path))


def test_float32_computes_in_float32_whatever_the_hardware_prefers(run, monkeypatch):
    monkeypatch.setattr(
        "fedllm.models.loading.compute_dtype", lambda device: torch.bfloat16
    )
    choice = find_model(None, run.path.parent.parent)
    choice.quantization, choice.in_float32 = 0, True

    types = {p.dtype for p in ChatModel(choice).model.parameters()}

    assert types == {torch.float32}


def adapter_of(folder: Path, base_name: str) -> Path:
    """Make an adapter without weights that names its base."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    config = {"peft_type": "LORA", "base_model_name_or_path": base_name}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_base_that_is_loaded_is_named_and_not_another_one(tmp_path):
    """fedllm.json is the maker's word, and adapter_config.json is what is fetched."""
    folder = adapter_of(tmp_path / "adapter", "a/evil\x1b[2J")
    origin = {"model": "smollm2-135m-instruct", "server_round": 3}
    (folder / "fedllm.json").write_text(json.dumps(origin))

    described = find_model(str(folder), tmp_path).described

    assert "answers: a/evil\\x1b[2J with" in described
    assert "smollm2" not in described


def test_float32_is_of_no_quantised_base(run, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*QUESTION, "--float32", "--quantization", "4"])

    assert caught.value.code == 2
    assert "--float32" in capsys.readouterr().err


def test_the_interactive_mode_ends_with_an_empty_line(run, capsys, monkeypatch):
    lines = iter(["What is asthma?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    out = ask(capsys, "--interactive", "--max-new-tokens", "3")

    assert out.count("tuned: ") == 1
    assert NOT_ADVICE in out


def test_each_model_remembers_what_it_said_until_it_is_told_to_forget(
    run, capsys, monkeypatch
):
    prompts = []

    def echo(model, tokenizer, prompt, *_):
        prompts.append(prompt)
        yield f"word{len(prompts)}"

    lines = iter(["first?", "second?", "/new", "third?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("fedllm.evaluation.generation.generate", echo)

    ask(capsys, "--interactive", "--base", "--max-new-tokens", "3")

    assert len(prompts) == 6
    base, tuned = prompts[2:4]
    assert "first?" in base and "word1" in base and "word2" not in base
    assert "word2" in tuned and "word1" not in tuned
    assert not any("first?" in prompt or "word" in prompt for prompt in prompts[4:])


def test_the_oldest_turns_go_where_the_model_cannot_hold_them_all(
    run, capsys, monkeypatch
):
    prompts = []

    def echo(model, tokenizer, prompt, *_):
        prompts.append(prompt)
        yield "yes"

    lines = iter(["old " * 800, "new " * 200, "last?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("fedllm.evaluation.generation.generate", echo)

    ask(capsys, "--interactive", "--max-new-tokens", "500")

    assert "old" not in prompts[2] and "new" in prompts[2]


def test_off_topic_shows_the_loss_of_both_models(run, capsys):
    got = ask_json(capsys, "--off-topic")["off_topic"]

    assert got["base"]["num_examples"] == got["tuned"]["num_examples"] == 40
    assert got["base"]["loss"] < got["tuned"]["loss"]


def test_open_questions_are_scored_by_what_the_models_say(run, tmp_path, capsys):
    said = ask_json(capsys, *QUESTION, "--base")["answers"]
    path = tmp_path / "open.jsonl"
    row = {"question": QUESTION[1], "answer": said["base"]}
    path.write_text(json.dumps(row))

    got = ask_json(
        capsys, "--open", str(path), "--base", "--max-new-tokens", QUESTION[3]
    )["open"]

    assert got["base"] == {"exact_match": 1.0, "rouge_l": 1.0, "num_questions": 1}
    assert got["tuned"]["exact_match"] == 0.0


def test_the_interactive_mode_ends_with_the_input(run, capsys, monkeypatch):
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)

    assert NOT_ADVICE in ask(capsys, "--interactive")


def test_without_a_run_the_error_says_what_to_do(home):
    text = failure(*QUESTION)

    assert text.startswith(f"AdapterError: {home / 'runs' / 'latest'}: no finished run")
    assert "--peft-path" in text


def test_a_run_that_has_not_finished_is_no_run_to_ask(run):
    (run.path / RESULT_FILE).unlink()

    assert "no finished run" in failure(*QUESTION)


@pytest.mark.parametrize("name", [CONFIG_FILE, RESULT_FILE])
@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_run_is_one_line(run, name, text):
    (run.path / name).write_text(text)

    assert str(name) in failure(*QUESTION)


def test_a_missing_adapter_folder_is_one_line(tmp_path):
    text = failure(*QUESTION, "--peft-path", str(tmp_path / "none"))

    assert text.startswith("AdapterError: ")
    assert "no such folder" in text


def test_an_adapter_whose_base_is_gone_is_one_line(run):
    path = run.path / "peft_final" / "adapter_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "base_model_name_or_path": "/gone/model"}))

    assert failure(*QUESTION).startswith("ModelError: ")


def test_held_out_without_public_test_rows_is_one_line(run):
    path = run.path / CONFIG_FILE
    about = json.loads(path.read_text())
    about["run_config"]["data.public-test"] = ""
    path.write_text(json.dumps(about))

    assert "data.public-test" in failure("--held-out")


def test_a_malformed_benchmark_names_its_line(run, tmp_path):
    (tmp_path / "q.jsonl").write_text("{}\n")

    assert f"{tmp_path / 'q.jsonl'}:1: needs question" in failure(
        "--benchmark", str(tmp_path / "q.jsonl")
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["--base"], [*QUESTION, "--quantization", "3"], [*QUESTION, "--nonsense"]],
)
def test_a_wrong_command_line_says_how_to_use_it(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [*QUESTION, "--max-new-tokens", "0"],
        [*QUESTION, "--max-new-tokens", "-1"],
        [*QUESTION, "--temperature", "-1"],
        [*QUESTION, "--temperature", "nan"],
    ],
)
def test_a_number_out_of_range_is_refused(run, arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)


@pytest.fixture
def made(home, tmp_path, tiny_chat_llama):
    """A node with a personal adapter."""
    node = {"data-path": write_rows(tmp_path / "own.jsonl", 60)}
    return make_personal(deliver_to(tiny_chat_llama, node))


def test_base_shared_and_personal_answer_side_by_side_and_the_choice_is_named(
    made, capsys
):
    got = ask_json(capsys, *QUESTION, "--personal")

    assert list(got["answers"]) == ["base", "shared", "personal"]
    # What was delivered is untuned.
    assert got["answers"]["base"] == got["answers"]["shared"]
    assert got["answers"]["personal"] != got["answers"]["base"]
    assert got["chosen"] == made.choice == "personal"
    assert got["losses"] == made.losses and got["rows"] == made.rows
    out = ask(capsys, *QUESTION, "--personal", "1").splitlines()
    rows = made.rows["choosing"]
    assert f"chosen by {rows} held-out rows: personal (loss: base " in out[0]
    assert [line.partition(": ")[0] for line in out if ": " in line][1:4] == [
        "base",
        "shared",
        "personal",
    ]


def test_personal_adapters_are_measured_side_by_side_too(made, capsys):
    got = ask_json(capsys, "--personal", "--held-out")["held_out"]

    assert list(got) == ["base", "shared", "personal"]
    assert got["base"]["loss"] == got["shared"]["loss"] != got["personal"]["loss"]


def test_without_a_personal_adapter_the_next_step_is_named(home, tmp_path):
    assert "no run has delivered an adapter here" in failure(*QUESTION, "--personal")


@pytest.mark.parametrize("other", [["--peft-path", "x"], ["--quantization", "0"]])
def test_personal_is_of_its_own_run_and_base(other, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*QUESTION, "--personal", "1", *other])

    assert caught.value.code == 2
    assert "--personal is of a run and its base" in capsys.readouterr().err


class Asked(Exception):
    """A hub was asked for a base."""


def never(*_: Any, **__: Any) -> None:
    raise Asked


@pytest.mark.parametrize(
    "command", [["evaluate", "--question", "?"], ["export", "--out", "merged"]]
)
def test_no_hub_is_asked_for_what_a_strangers_adapter_names_as_its_base(
    command, home, tmp_path, monkeypatch
):
    name = "attacker/evil-model"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedllm.models.location.commit_of", never)
    folder = adapter_of(tmp_path / "adapter", name)
    full = [*command, "--peft-path", str(folder)]

    with pytest.raises(
        SystemExit, match=f"{name} is not on this machine: --fetch-base"
    ):
        fedllm(full)
    with pytest.raises(Asked):
        fedllm([*full, "--fetch-base"])
