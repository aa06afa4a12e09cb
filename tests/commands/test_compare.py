"""The comparison: every arm on a small model, and what it adds up to."""

import json
import os

import pytest

from fedllm.commands import compare, comparison_bench
from fedllm.commands.comparison_arms import FEDERATIONS
from tests.helpers.comparisons import config_file
from tests.helpers.listening import listeners

__all__ = ["config_file"]


def test_every_arm_is_trained_once_and_a_second_sitting_trains_nothing(
    config_file, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = [
        "--run-config",
        str(config_file),
        "--clients",
        "2",
        "--out",
        str(out),
    ]
    compare.main(command)
    content = json.loads((out / "compare.json").read_text())
    arms = {row["arm"]: row for row in content["rows"]}
    ledger = json.loads((out / "seed-42/federated-dp/run-1/privacy.json").read_text())

    assert set(arms) == {
        *("base", "federated", "federated-dp", "centralised", "alone-0", "alone-1"),
        *(f"personal-{name}-{i}" for name in FEDERATIONS for i in range(2)),
    }
    assert content["joining"]["federated-dp"]["clients"] == 2
    assert "of 2 clients end better off than alone" in (out / "compare.md").read_text()
    assert len(ledger["releases"]) == 2
    assert arms["federated-dp"]["epsilon"] > 0
    assert arms["federated"]["epsilon"] is None
    losses = arms["federated"]["validation_losses"]
    assert len(losses) == 3 and losses[0] != losses[2]
    assert "<svg" in (out / "compare.svg").read_text()
    page = (out / "compare.html").read_text()
    assert page.count("<figure>") == page.count("<svg") >= 4
    assert "federated-dp" in page and "http://" not in page.replace(
        "http://www.w3.", ""
    )

    monkeypatch.setattr(comparison_bench, "Bench", None)
    compare.main(command)
    assert json.loads((out / "compare.json").read_text()) == content


def test_nothing_listens_while_arms_are_trained(config_file, tmp_path, monkeypatch):
    before, seen = set(listeners(os.getpid())), []
    write = compare.write_atomic

    def written(path, content):
        seen.append(set(listeners(os.getpid())) - before)
        write(path, content)

    monkeypatch.setattr(compare, "write_atomic", written)
    command = ["--run-config", str(config_file), "--clients", "2"]
    compare.main([*command, "--out", str(tmp_path), "--arms", "federated-dp"])

    # The setting, and the arm while its bench is still in memory.
    assert seen == [set(), set()]


def test_only_the_arms_and_clients_that_are_asked_for_are_trained(
    config_file, tmp_path
):
    out = tmp_path / "out"
    command = ["--run-config", str(config_file), "--clients", "4"]
    command += ["--out", str(out), "--arms", "base", "alone", "--alone", "2"]

    compare.main(command)

    made = {path.stem for path in out.glob("seed-42/*.json")}
    assert made == {"base", "alone-0", "alone-2"}
    assert "seed 42: 2 of 4" in (out / "compare.md").read_text()


def test_personal_follows_the_federations_that_are_there(config_file, tmp_path):
    command = ["--run-config", str(config_file), "--clients", "2", "--alone", "1"]
    command += ["--out", str(tmp_path / "out"), "--arms"]

    compare.main([*command, "federated-dp", "personal"])
    compare.main([*command, "personal"])

    made = {path.stem for path in (tmp_path / "out").glob("seed-42/*.json")}
    assert made == {"federated-dp", "personal-federated-dp-0"}


def test_a_folder_of_another_comparison_is_refused(config_file, tmp_path):
    (tmp_path / "setting.json").write_text("{}")
    with pytest.raises(SystemExit, match="another"):
        compare.main(["--run-config", str(config_file), "--out", str(tmp_path)])


@pytest.mark.parametrize("partition", ["natural", "dirichlet"])
def test_a_sitting_that_was_stopped_goes_on_with_what_is_missing(
    partition, config_file, tmp_path, monkeypatch
):
    rows = [
        {"instruction": f"What is {i}?", "response": f"It is {i}.", "site": str(i % 2)}
        for i in range(12)
    ]
    train = tmp_path / "sites.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in rows))
    text = config_file.read_text().replace(str(tmp_path / "0.jsonl"), str(train))
    config_file.write_text(text.replace("[data]", f'[data]\npartition = "{partition}"'))
    out = tmp_path / "out"
    command = ["--run-config", str(config_file), "--clients", "2"]
    command += ["--seed", "1", "2", "--out", str(out)]
    real, measured = comparison_bench.Bench.measure, []

    def measure(bench, arm, folder):
        measured.append((bench.config.seed, arm))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(bench, arm, folder)

    monkeypatch.setattr(comparison_bench.Bench, "measure", measure)
    with pytest.raises(SystemExit, match="stopped: the same command"):
        compare.main(command)
    assert not (out / "compare.json").exists()
    compare.main(command)

    content = json.loads((out / "compare.json").read_text())
    assert measured[3] == measured[4]
    # Ten arms of each seed, and the one that was stopped.
    assert len(measured) == 21
    alone = {
        r["arm"]: r["test_loss"] for r in content["rows"] if r["arm"].startswith("al")
    }
    assert len(set(alone.values())) == 2
    assert content["summary"]["federated"]["test_loss"]["seeds"] == 2
    assert content["equal"] in (out / "compare.md").read_text()


def test_json_is_the_content_of_the_files(config_file, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--run-config", str(config_file), "--num-clients", "2", "--json"]
    compare.main([*command, "--arms", "base", "--out", str(out)])

    streams = capsys.readouterr()
    assert json.loads(streams.out) == json.loads((out / "compare.json").read_text())
    assert "seed 42, base: test loss" in streams.err


def test_pairs_of_the_run_config_win_over_a_file(config_file, tmp_path):
    out = tmp_path / "out"
    command = ["--run-config", str(config_file), "--run-config", "adapter.rank=2"]
    compare.main([*command, "--clients", "2", "--arms", "base", "--out", str(out)])

    setting = json.loads((out / "setting.json").read_text())
    assert setting["run_config"]["adapter.rank"] == 2
    assert setting["run_config"]["train.batch-size"] == 2
    assert setting["num_clients"] == 2
