"""The planner: exact figures, what is expected, and no torch."""

import json
import subprocess
import sys
import time

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant

from fedllm.commands import plan
from tests.test_federation import write_rows


def told(capsys, *arguments: str) -> str:
    plan.main(list(arguments))
    return str(capsys.readouterr().out)


def planned(capsys, *arguments: str) -> dict:
    return json.loads(told(capsys, "--json", *arguments))


def test_epsilon_and_noise_are_dp_accountings(capsys):
    there = planned(capsys, "--clients", "20", "--rounds", "5", "--epsilon", "8")
    back = planned(
        capsys, "--clients", "20", "--rounds", "5",
        "--noise-multiplier", str(there["noise_multiplier"]),
    )  # fmt: skip

    accountant = PLDAccountant()
    event = GaussianDpEvent(there["noise_multiplier"])
    accountant.compose(SelfComposedDpEvent(event, 5))
    assert there["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert back["epsilon"] == pytest.approx(there["epsilon"])
    assert there["noise_multiplier"] == pytest.approx(1.342, abs=1e-3)
    assert there["epsilon_replace_one"] == pytest.approx(19.12, abs=0.01)


def test_an_epsilon_as_a_flag_takes_the_place_of_a_typed_noise_multiplier(capsys):
    typed = "privacy.noise-multiplier=3.0 privacy.target-epsilon=0.0"

    found = planned(capsys, "--run-config", typed, "--epsilon", "8", "--rounds", "5")

    assert found["noise_multiplier"] == pytest.approx(1.342, abs=1e-3)


def test_noise_beyond_what_was_measured_is_said_to_be(capsys):
    assert "beyond what was measured" in told(
        capsys, "--clients", "3", "--epsilon", "1"
    )
    assert "beyond what was measured" not in told(capsys, "--clients", "20")


def test_no_kind_is_advised_for_what_it_did_with_less_noise(capsys):
    found = planned(capsys, "--clients", "20", "--epsilon", "1")

    changes = [row["change"] for row in found["better"]]
    assert "100 clients" in changes
    assert not any(change.startswith("adapter.kind") for change in changes)


def test_a_client_of_records_is_planned_for_by_dp_accountings_numbers(capsys):
    typed = ("--run-config", "configs/record-level.toml", "--records", "486")
    found = planned(capsys, *typed)

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    noise = GaussianDpEvent(found["noise_multiplier"])
    event = PoissonSampledDpEvent(32 / 486, noise)
    accountant.compose(SelfComposedDpEvent(event, 5 * 2))
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert 7.9 < found["epsilon"] <= 8.0
    assert "noise multiplier 0.5" in told(capsys, *typed)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ((), "--records: is needed"),
        (("--records", "31"), "this client has 31"),
        (("--records", "486", "--probe"), "--probe and --plot are for"),
    ],
)
def test_a_plan_for_records_that_cannot_be_made_is_one_line(capsys, flags, told):
    with pytest.raises(SystemExit) as caught:
        plan.main(["--run-config", "configs/record-level.toml", *flags])

    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "d"),
    [
        ("ffa-lora", 184_320),
        ("lora-core", 3_840),
        ("lora", 460_800),
        ("ia3", 57_600),
        ("vera", 23_520),
    ],
)
def test_trained_values_are_counted_without_the_model(capsys, kind, d):
    assert planned(capsys, "--kind", kind)["num_trainable"] == d


def test_the_blueprints_own_setting_is_called_no_protection(capsys):
    text = told(capsys, "--run-config", "configs/openllama-3b.toml")

    assert "epsilon 127,132 zero-out" in text
    assert "protection is none to speak of" in text
    assert "2 in each of 100 rounds" in text


def test_the_apps_own_settings_count_where_nothing_is_typed(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nnum-server-rounds = 9\nadapter.rank = 4\n"
    )
    monkeypatch.chdir(tmp_path)

    found = planned(capsys)

    assert (found["num_rounds"], found["num_trainable"]) == (9, 92_160)


def test_a_typed_file_comes_before_the_flags(capsys, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("num-server-rounds = 7\n[strategy]\nnum-clients = 33\n")

    found = planned(capsys, "--run-config", str(file), "--rounds", "2")

    assert (found["num_clients"], found["num_rounds"]) == (33, 2)
    pairs = planned(capsys, "--run-config", "num-server-rounds=9 adapter.rank=4")
    assert (pairs["num_rounds"], pairs["num_trainable"]) == (9, 92_160)


def test_more_clients_are_expected_to_help_and_the_figures_are_said(capsys):
    few = planned(capsys, "--clients", "20", "--epsilon", "2")
    many = planned(capsys, "--clients", "200", "--epsilon", "2")

    assert many["expected"]["test_loss"] < few["expected"]["test_loss"]
    changes = {row["change"]: row["test_loss"] for row in few["better"]}
    assert changes["100 clients"] < few["expected"]["test_loss"]
    assert list(changes.values()) == sorted(changes.values())


def test_fewer_rounds_than_were_measured_are_no_promise(capsys):
    assert "fewer are fewer steps" in told(capsys, "--rounds", "1")
    assert "fewer are fewer steps" not in told(capsys, "--rounds", "8")
    changes = [row["change"] for row in planned(capsys, "--rounds", "8")["better"]]
    assert changes and not any("rounds" in change for change in changes)


def test_the_step_by_rule_is_in_units_of_the_clipping_norm(capsys):
    plain = planned(capsys)
    smaller = planned(capsys, "--run-config", "privacy.clipping-norm=0.3")

    assert plain["server_learning_rate_by_rule"] == pytest.approx(0.60, abs=0.01)
    assert smaller["server_learning_rate_by_rule"] == pytest.approx(1.20, abs=0.02)
    assert planned(capsys, "--kind", "ia3")["server_learning_rate_by_rule"] is None
    assert "strategy.server-learning-rate 0.6 on" in told(capsys)


def test_a_plot_is_written_and_its_path_said(capsys, tmp_path):
    file = tmp_path / "plan.svg"

    text = told(capsys, "--plot", str(file))

    assert f"plot: {file}" in text
    assert "epsilon 8" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "0"], "privacy.target-epsilon"),
        (["--epsilon", "-1"], "privacy.target-epsilon"),
        (["--epsilon", "nan"], "privacy.target-epsilon"),
        (["--delta", "1"], "privacy.delta"),
        (["--clients", "1"], "strategy.num-clients"),
        (["--fraction", "0.5"], "strategy.fraction-train"),
        (["--kind", "qlora"], "adapter.kind"),
        (["--model", "someone/some-model"], "--trainable"),
        (["--trainable", "0"], "--trainable"),
        (["--run-config", "missing.toml"], "cannot be read"),
        (["--run-config", "what"], "neither a .toml nor key=value"),
        (["--run-config", "configs/no-privacy.toml"], "privacy.unit"),
        (["--plot", "/nowhere/plan.svg"], "--plot"),
        (["--plot", "plan.what"], "--plot"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        plan.main(arguments)

    lines = str(stopped.value.code).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_it_loads_neither_torch_nor_flower_and_takes_under_two_seconds_of_cpu():
    script = (
        "import sys, time\n"
        "from fedllm.commands.plan import main\n"
        "main(['--clients', '20', '--rounds', '100'])\n"
        "assert not {'torch', 'flwr', 'transformers'} & set(sys.modules)\n"
        "print('cpu', time.process_time())\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    cpu = float(done.stdout.split("cpu ")[1])
    assert cpu < 2, f"{cpu} s of processor, {time.monotonic() - began} s in all"


def test_the_probe_scores_noise_on_the_real_base(
    capsys, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    rows = write_rows(tmp_path / "validation.jsonl", 6)
    typed = f"model.name='{tiny_llama}' model.quantization=0 data.name='{rows}' "
    probe = ["--run-config", typed + f"data.public-validation='{rows}'", "--probe"]

    quiet = planned(capsys, *probe, "--noise-multiplier", "1e-9")["noise_probe"]
    loud = planned(capsys, *probe, "--noise-multiplier", "1e3")["noise_probe"]

    assert quiet["noise_alone"] == pytest.approx(quiet["before"], abs=1e-4)
    # On a random model noise is as good as anything, but it moves the loss.
    assert abs(loud["noise_alone"] - loud["before"]) > 1e-3
    with pytest.raises(SystemExit, match="data.public-validation"):
        plan.main(["--run-config", typed, "--probe"])
