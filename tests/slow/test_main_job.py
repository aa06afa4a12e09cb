"""The README's first command, on the real model; then what a user does with the run."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.config import fedllm_home
from fedllm.privacy.wording import plain
from tests.helpers.flower_processes import (
    BIN,
    ROOT,
    environment,
    latest_run,
    readme_command,
    typed,
)

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1800)]

WITHOUT_FEDLLM = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fedllm":
            raise ImportError("fedllm is not installed here")
sys.meta_path.insert(0, Blocked())
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
folder, rows, dtype = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=getattr(torch, dtype))
model = AutoPeftModelForCausalLM.from_pretrained(
    folder, quantization_config=config, dtype=getattr(torch, dtype)).eval()
base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
tokenizer = AutoTokenizer.from_pretrained(base)
total = count = 0
for line in open(rows):
    row = json.loads(line)
    prompt = [{"role": "user", "content": row["instruction"]}]
    whole = prompt + [{"role": "assistant", "content": row["response"]}]
    short = tokenizer.apply_chat_template(prompt, add_generation_prompt=True,
                                          return_dict=True)["input_ids"]
    ids = torch.tensor([tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    answer = losses[len(short) - 1:]
    total += answer.sum().item()
    count += answer.numel()
print("LOSS", total / count)
"""

NUM_QUESTIONS = 30


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The run, and everything that it printed; the model's cache is the user's own."""
    env = environment(tmp_path_factory.mktemp("flwr"), fedllm_home())
    env.pop("HF_HUB_OFFLINE")
    # A hub that nobody can reach, as on a machine without one.
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    setup, _, command = readme_command("Run it").rpartition("&&")
    assert "pip install" in setup
    words = shlex.split(command)
    assert words[0] == ".venv/bin/fedllm"
    started = time.monotonic()
    done = typed([str(BIN / "fedllm"), *words[1:]], env, 1500)
    seconds = time.monotonic() - started
    (tmp_path_factory.mktemp("log") / "main-job.log").write_text(done.stdout)
    sys.stdout.write(done.stdout[-6000:] + done.stderr[-2000:])
    sys.stdout.write(f"\nmain job: {seconds:.0f} s\n")
    assert done.returncode == 0
    return done.stdout, env


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, pattern
    return float(found[1])


def test_the_main_job_learns_under_the_epsilon_it_states(job):
    output, _ = job
    run = latest_run(fedllm_home())
    result = json.loads((run / "result.json").read_text())
    privacy = json.loads((run / "privacy.json").read_text())

    before = number(r"test loss: ([\d.]+) before", output)
    after = number(r"before, ([\d.]+) after", output)
    assert before - after >= 0.85
    assert result["test_loss_after"] == pytest.approx(after, abs=6e-4)
    assert privacy["epsilon"] <= 8.0
    assert privacy["delta"] == 1e-5
    assert privacy["population_size"] == 20
    assert number(r"epsilon: ([\d.]+) zero-out", output) <= 8.0
    assert f"{plain(privacy['epsilon_replace_one'])} replace-one" in output
    assert privacy["statement"] in output
    assert f"run folder: {run}" in output
    assert "fedllm evaluate --question" in output
    assert "Traceback" not in output


def test_two_clients_of_the_defaults_stop_before_round_1_and_read_what_to_change(
    job, tmp_path
):
    _, env = job
    (tmp_path / "models").symlink_to(fedllm_home() / "models")
    env = env | {"FEDLLM_HOME": str(tmp_path)}
    command = [str(BIN / "fedllm"), "simulate", "--num-supernodes", "2"]
    done = typed(command, env, 600)

    assert done.returncode == 1
    (line,) = [text for text in done.stdout.splitlines() if "PrivacyError" in text]
    assert "noise alone raises the validation loss by" in line
    assert (
        "which protects single rows and not whole clients (--run-config configs/record-level.toml)"
        in line
    )
    assert "more clients: fedllm simulate --num-supernodes 20" in line
    assert "round 1/" not in done.stdout
    assert "Traceback" not in done.stdout
    spent = json.loads((latest_run(tmp_path) / "privacy.json").read_text())
    assert spent["releases"] == []


def test_evaluate_answers_and_measures_what_the_run_recommends(job):
    _, env = job
    run = latest_run(fedllm_home())
    command = [sys.executable, "evaluate.py", "--json", "--base", "--held-out"]
    command += ["--question", "What are some symptoms of covid-19?"]
    command += ["--max-new-tokens", "24"]
    done = typed(command, env)
    assert done.returncode == 0, done.stdout + done.stderr

    report = json.loads(done.stdout)
    result = json.loads((run / "result.json").read_text())
    assert set(report["answers"]) == {"base", "tuned"}
    # What a noised model says differs by run, and may be three words.
    assert all(text.strip() for text in report["answers"].values())
    assert report["held_out"]["tuned"]["loss"] == pytest.approx(
        result["test_loss_after"], abs=5e-3
    )
    assert "smollm2-135m-instruct" in report["answers_for"]
    assert "round" in report["answers_for"]
    assert "not medical advice" in report["note"]


def test_peft_opens_the_adapter_where_fedllm_is_not_installed(job, tmp_path):
    import torch

    from fedllm.models.loading import compute_dtype

    run = latest_run(fedllm_home())
    result = json.loads((run / "result.json").read_text())
    folder = Path(result["recommended"])
    rows = ROOT / "fedllm/data/wordnet_medical/test.jsonl"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = str(compute_dtype(device)).removeprefix("torch.")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FEDLLM, str(folder), str(rows), dtype],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    loss = number(r"LOSS ([\d.]+)", done.stdout)
    assert loss == pytest.approx(result["test_loss_after"], abs=0.02)


def test_another_harness_agrees_on_the_same_questions(job, tmp_path):
    _, env = job
    page = (ROOT / "docs/evaluation.md").read_text("utf-8")
    block = page.split("### Beside lm-evaluation-harness\n", 1)[1].split("```")[1]
    lines = block.removeprefix("bash\n").replace("\\\n", " ").strip().splitlines()
    _, theirs, ours = [
        line.replace("~/", "$HOME/").replace("$HOME/.fedllm", str(fedllm_home()))
        for line in lines
    ]
    # The hundred take a busy core a quarter of an hour.
    questions = "fedllm/data/wordnet_medical/choice.jsonl"
    some = (ROOT / questions).read_text("utf-8").splitlines()[:NUM_QUESTIONS]
    (tmp_path / "some.jsonl").write_text("\n".join(some), "utf-8")
    assert questions in ours
    ours = ours.replace(questions, str(tmp_path / "some.jsonl"))
    theirs += f" --limit {NUM_QUESTIONS}"
    env = env | {"HF_HOME": str(tmp_path / "hf")}
    scores = {}
    for name, line in (
        ("theirs", f"{theirs} --output_path {tmp_path}/theirs.json"),
        ("ours", f"{ours} --json".replace("python ", f"{sys.executable} ", 1)),
    ):
        done = typed(["bash", "-euo", "pipefail", "-c", line], env)
        assert done.returncode == 0, done.stdout + done.stderr
        scores[name] = done.stdout

    (written,) = tmp_path.glob("theirs*.json")
    result = json.loads(written.read_text())
    score = json.loads(scores["ours"])["benchmark"]["tuned"]
    assert result["n-samples"]["medical_choice"]["effective"] == NUM_QUESTIONS
    assert score["num_questions"] == NUM_QUESTIONS
    assert result["results"]["medical_choice"]["acc_bytes,none"] == pytest.approx(
        score["accuracy_per_byte"], abs=0.005
    )


def test_the_documented_lines_turn_an_export_into_gguf(job, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    _, env = job
    run = latest_run(fedllm_home())
    export = [sys.executable, "-m", "fedllm.commands.export"]
    export += [
        "--peft-path",
        str(run / "peft_final"),
        "--out",
        str(tmp_path / "my-model"),
    ]
    assert typed(export, env).returncode == 0
    page = (ROOT / "docs/evaluation.md").read_text("utf-8")
    lines = page.split("### GGUF\n", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    load = AutoModelForCausalLM.from_pretrained
    exported = load(tmp_path / "my-model", dtype=torch.float32).state_dict()
    read = load(tmp_path, gguf_file="my-model.gguf", dtype=torch.float32).state_dict()
    assert read.keys() == exported.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-3, atol=1e-6)
