"""The planner: exact figures, what is expected, and no torch."""

import subprocess
import sys
import time

import pytest

from fedllm.commands import plan
from tests.helpers.plans import plan_json
from tests.helpers.rows import write_rows


def test_an_epsilon_as_a_flag_takes_the_place_of_a_typed_noise_multiplier(capsys):
    typed = "privacy.noise-multiplier=3.0 privacy.target-epsilon=0.0"

    plan = plan_json(capsys, "--run-config", typed, "--epsilon", "8", "--rounds", "5")

    assert plan["noise_multiplier"] == pytest.approx(1.342, abs=1e-3)


@pytest.mark.parametrize(("trustees", "ratio"), [("3", 1.225), ("5", 1.118)])
def test_trustees_cost_noise_and_both_epsilons_are_shown(capsys, trustees, ratio):
    central = plan_json(capsys, "--rounds", "5")
    sealed = plan_json(capsys, "--rounds", "5", "--trustees", trustees)

    assert sealed["noise_multiplier"] == central["noise_multiplier"]
    assert sealed["epsilon"] == central["epsilon"] > sealed["epsilon_adapters"]
    assert sealed["noise_to_signal"] / central["noise_to_signal"] == pytest.approx(
        ratio, abs=1e-3
    )
    assert (sealed["trustees"], sealed["colluding_trustees"]) == (int(trustees), 1)
    plan.main(["--rounds", "5", "--trustees", trustees, "--colluding", "0"])
    assert "1.00 times that of a trusted server" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trustees", "1"], "privacy.trustees"),
        (["--trustees", "3", "--colluding", "3"], "privacy.colluding-trustees"),
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
        (["--run-config", "what"], "needs a .toml file or key=value"),
        (["--run-config", "configs/no-privacy.toml"], "privacy.unit"),
        (["--plot", "/nowhere/plan.svg"], "--plot"),
        (["--plot", "plan.what"], "--plot"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        plan.main(arguments)

    lines = str(stopped.value.code).splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert lines[0].startswith(("ConfigError: ", "ModelError: "))


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

    quiet = plan_json(capsys, *probe, "--noise-multiplier", "1e-9")["noise_probe"]
    loud = [
        plan_json(capsys, *probe, "--noise-multiplier", "1e3")["noise_probe"]
        for _ in range(2)
    ]

    assert quiet["noise_alone"] == pytest.approx(quiet["before"], abs=2e-4)
    # On a random model noise is as good as anything, but it moves the loss; of two draws
    # one may come back to where it was.
    assert max(abs(p["noise_alone"] - p["before"]) for p in loud) > 2e-4
    with pytest.raises(SystemExit, match="data.public-validation"):
        plan.main(["--run-config", typed, "--probe"])


def test_with_rows_it_says_what_each_way_reaches(capsys):
    found = plan_json(capsys, "--clients", "20", "--rows", "243", "--epsilon", "8")

    assert found["ways"]["num_clients"] == 20 and found["ways"]["rows"] == 243
    assert found["ways"]["epsilon"] == pytest.approx(8)
    measured = [one for one in found["ways"]["ways"] if one["test_losses"]]
    assert found["ways"]["best"] == measured[0]["way"]
    plan.main(["--clients", "20", "--rows", "243"])
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("20 clients of 243 rows, epsilon 8.00: test loss")
    assert second.startswith(f"  {measured[0]['way']}: ")


def test_rows_are_the_records_of_record_level(capsys):
    unit = ("--run-config", "configs/record-level.toml")

    by_rows = plan_json(capsys, *unit, "--rows", "486")
    by_records = plan_json(capsys, *unit, "--records", "486")

    assert by_rows.pop("ways")["rows"] == 486
    assert by_rows == by_records
