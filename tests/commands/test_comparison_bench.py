"""An arm is a run of the real round loop, and is scored once."""

import json

import numpy as np
import pytest
from safetensors.numpy import load

from fedllm.adapters.peft_model import initial_arrays
from fedllm.client.message_handler import reply_to
from fedllm.commands import comparison_bench
from fedllm.commands.comparison_bench import Bench, SharedRows, new_run
from fedllm.commands.options import read_run_config
from fedllm.config import flat
from fedllm.errors import ConfigError, FederationError
from fedllm.evaluation.held_out_loss import HeldOut, held_out
from fedllm.evaluation.public_rows import PublicRows
from fedllm.server.startup import set_up
from fedllm.training.own_best import OwnBestConfig
from fedllm.training.personal import train_personal
from tests.helpers.comparisons import config_file
from tests.helpers.federations import partitions
from tests.helpers.in_process_grid import InProcessGrid
from tests.helpers.rows import write_rows

__all__ = ["config_file"]

OWN_BEST = OwnBestConfig(learning_rates=(0.01, 0.05), passes=2.0, seed=3)


def test_the_federated_arm_is_the_run_that_anybody_can_start(config_file, tmp_path):
    from fedllm.commands.comparison_arms import without_privacy

    config = read_run_config([str(config_file)])
    plain = without_privacy(config)
    run = set_up(plain, InProcessGrid(partitions(2), flat(plain), reply_to), 7)
    result = run.run()
    text = (run.directory.path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]

    row = Bench(config, 2, None, OWN_BEST).measure("federated", tmp_path)

    assert row["test_loss"] == result["test_loss_after"]
    assert row["best_round"] == result["best_round"]
    assert row["validation_losses"] == [line["validation_loss"] for line in lines]
    assert row["megabytes"] == sum(
        line["megabytes_down"] + line["megabytes_up"] for line in lines
    )
    kept = json.loads((tmp_path / "federated/run-1/result.json").read_text())
    assert kept["test_loss_after"] == result["test_loss_after"]


def test_a_sealed_federation_is_an_arm_like_any_other_and_may_be_measured_again(
    config_file, tmp_path
):
    text = config_file.read_text() + "[strategy]\nnum-clients = 20\n"
    text += "[privacy]\ntrust = 'trustees'\ntrustees = 'a,b'\n"
    config_file.write_text(text)
    bench = Bench(read_run_config([str(config_file)]), 3, None, OWN_BEST)

    rows = [bench.measure("federated-dp", tmp_path) for _ in range(2)]

    assert rows[0]["epsilon"] == pytest.approx(8.0, rel=1e-4)
    assert rows[0]["failed_replies"] == rows[1]["failed_replies"] == 0
    # Not the test losses: noise may make each of them the base's.
    assert rows[0]["validation_losses"] != rows[1]["validation_losses"]
    run = tmp_path / "federated-dp" / "run-2"
    privacy = json.loads((run / "privacy.json").read_text())
    assert privacy["trustees"] == 2 and privacy["releases"] == [1, 2]


def test_a_sealed_federation_needs_its_trustees_among_the_clients(
    config_file, tmp_path
):
    text = config_file.read_text()
    text += "[privacy]\ntrust = 'trustees'\ntrustees = 'a,b,c'\n"
    config_file.write_text(text + "[strategy]\nwait-for-clients = 1.0\n")
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)

    with pytest.raises(FederationError, match=r"2 answered \(absent: c\)"):
        bench.measure("federated-dp", tmp_path)


def test_the_counts_of_secret_cohorts_are_in_no_row(config_file, tmp_path):
    text = config_file.read_text() + "[strategy]\nsampling = 'poisson'\n"
    config_file.write_text(text + "fraction-train = 0.5\n")
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)

    secret = bench.measure("federated-dp", tmp_path)

    assert secret["epsilon"] > 0 and len(secret["validation_losses"]) == 3
    for column in ("seconds", "megabytes", "failed_replies"):
        assert secret[column] is None
    assert bench.measure("federated", tmp_path)["failed_replies"] == 0


def test_a_personal_arm_trains_on_from_the_federation_and_alone_from_the_base(
    config_file, tmp_path
):
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)
    federated = bench.measure("federated-dp", tmp_path)

    alone = bench.measure("alone-1", tmp_path)
    personal = bench.measure("personal-federated-dp-1", tmp_path)

    # Six rows: one judges, two passes over five.
    assert 0 < alone["examples"] <= 10
    assert alone["test_loss"] < bench.measure("base", tmp_path)["test_loss"]
    adapted = bench._adapted
    judged = bench._rows("alone-1")
    shared = load((tmp_path / "federated-dp.safetensors").read_bytes())
    adapted.set(shared)
    order = np.random.default_rng(OWN_BEST.seed).permutation(6)
    score = held_out(adapted.model, [judged[order[0]]], adapted.pad_token_id)
    assert personal["validation_losses"][0] == pytest.approx(score.loss)
    assert federated["examples"] == federated["best_round"] * 2


def test_with_personal_settings_an_arm_does_what_a_node_does(
    config_file, tmp_path, monkeypatch
):
    rows = write_rows(tmp_path / "many.jsonl", 80)
    text = config_file.read_text().replace(str(tmp_path / "0.jsonl"), rows)
    text += "[personal]\nepochs = 2.0\nlearning-rate = 0.02\n"
    config_file.write_text(text)
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)
    bench.measure("federated", tmp_path)
    shared = load((tmp_path / "federated.safetensors").read_bytes())

    row = bench.measure("personal-federated-1", tmp_path)
    alone = bench.measure("alone-1", tmp_path)

    held = bench._personal_rows("personal-federated-1")
    made = train_personal(bench._adapted, held, shared, bench.config, bench._loss)
    assert row["choice"] == made.choice
    assert row["validation_losses"] == made.search.losses
    assert row["test_loss"] == pytest.approx(bench._test_score(made.arrays).loss)
    # The rows that stop a client alone are the same, and none is among the rounds' rows.
    bench._adapted.set(bench._base)
    assert alone["validation_losses"][0] == pytest.approx(bench._loss(held.stopping))
    own = [row["input_ids"] for row in bench._rows("alone-1")]
    assert own == [row["input_ids"] for row in held.training]
    assert not any(row["input_ids"] in own for row in (*held.stopping, *held.choosing))
    assert not (tmp_path / "home/personal").exists()


def test_a_personal_arm_without_its_federation_is_an_error(config_file, tmp_path):
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)

    with pytest.raises(ConfigError, match="--arms: personal trains on from federated,"):
        bench.measure("personal-federated-0", tmp_path)


def test_without_public_test_rows_nothing_is_trained(config_file):
    lines = config_file.read_text().splitlines()
    config_file.write_text("\n".join(x for x in lines if "public-test" not in x))

    with pytest.raises(ConfigError, match="data.public-test"):
        Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)


def test_a_run_folder_of_an_arm_that_was_stopped_is_kept(tmp_path):
    first = new_run(tmp_path / "federated-dp")
    (first.path / "privacy.json").write_text("{}")
    second = new_run(tmp_path / "federated-dp")

    assert [first.path.name, second.path.name] == ["run-1", "run-2"]
    assert (first.path / "privacy.json").exists()


def test_the_base_is_scored_once_and_an_adapter_once_in_a_row(config_file, monkeypatch):
    scored = []

    def score(self, arrays):
        scored.append(arrays)
        return HeldOut(float(len(scored)), 1, 1)

    monkeypatch.setattr(PublicRows, "test_loss", score)
    bench = Bench(read_run_config([str(config_file)]), 2, None, OWN_BEST)
    rows, spec = bench._public, bench._adapted.spec
    one = {name: value + 1 for name, value in initial_arrays(spec).items()}
    two = {name: value + 2 for name, value in one.items()}
    copies = {name: np.array(value) for name, value in one.items()}

    asked = [initial_arrays(spec), one, copies, two, initial_arrays(spec), one]
    losses = [rows.test_loss(arrays).loss for arrays in asked]

    assert isinstance(rows, SharedRows)
    assert losses == [1.0, 2.0, 2.0, 3.0, 1.0, 4.0]
    assert comparison_bench.SharedRows.questions(rows, 3) == []


def test_a_federation_at_record_level_is_an_arm_with_ledgers_of_its_own(
    config_file, tmp_path
):
    joint = 'privacy.unit="record" privacy.noise="joint" train.batch-size=1'
    more = 'train.gradient-accumulation=4 privacy.delta=1e-5 adapter.kind="ffa-lora"'
    config = read_run_config([str(config_file), f"{joint} {more}"])
    bench = Bench(config, 2, None, OWN_BEST)

    one = bench.measure("federated-dp", tmp_path)
    # A client that remembered the first would have spent its budget.
    two = bench.measure("federated-dp", tmp_path)

    for row in (one, two):
        assert 7 < row["epsilon"] <= 8 and row["failed_replies"] == 0
        assert row["examples"] == row["best_round"] * 4 / 2
    folders = list((tmp_path / "home" / "ledgers" / "simulated").iterdir())
    assert len(folders) == 2


def test_every_arm_but_the_base_begins_with_the_public_rows(config_file, tmp_path):
    public = write_rows(tmp_path / "public.jsonl", 12, 300)
    more = [str(config_file), f'data.public-train="{public}"']
    bench = Bench(read_run_config(more), 2, None, OWN_BEST)

    alone = bench._start("base", tmp_path)
    bench.measure("federated", tmp_path)

    folder = tmp_path / "federated/run-1/peft_0"
    federated = load((folder / "adapter_model.safetensors").read_bytes())
    assert all(np.array_equal(federated[name], alone[name]) for name in alone)
    untuned = bench.measure("base", tmp_path)["test_loss"]
    assert bench._test_score(alone).loss < untuned - 0.02
