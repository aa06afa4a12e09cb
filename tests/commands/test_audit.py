import json
from pathlib import Path

import pytest

from fedllm.commands.audit import main
from tests.helpers.audits import SMALL, audit, quick
from tests.helpers.commands import exit_status

__all__ = ["quick"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_the_defaults_pass_with_a_line_a_check_and_a_verdict(capsys):
    assert audit() == 0

    lines = capsys.readouterr().out.splitlines()
    assert "1 round" in lines[0] and "noise multiplier 0.6002" in lines[0]
    checks = [line.split(":")[0] for line in lines if line.startswith("PASS  ")]
    assert checks == [
        "PASS  sensitivity",
        "PASS  weights",
        "PASS  denominator",
        "PASS  noise scale",
        "PASS  fresh noise",
        "PASS  order",
        "PASS  published values",
        "PASS  checkpoint moments",
        "PASS  ledger",
        "PASS  canaries, one release",
        "PASS  canaries, the run",
    ]
    for words in (
        "accounted epsilon:     8.00",
        "certified lower bound: ",
        "estimate: ",
    ):
        assert sum(line.startswith(words) for line in lines) == 1
    assert any("never acquit" in line for line in lines)
    assert lines[-1] == "PASS"


def test_pyproject_and_then_what_is_typed_set_what_is_audited(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nnum-server-rounds = 2\nprivacy.clipping-norm = 0.25\n"
    )

    assert audit("--run-config", "privacy.clipping-norm=0.75") == 0

    first = capsys.readouterr().out.splitlines()[0]
    assert "2 rounds" in first and "clipping norm 0.75" in first


def test_a_toml_file_is_read_as_flwr_run_reads_it(tmp_path, capsys):
    (tmp_path / "own.toml").write_text(
        "num-server-rounds = 1\n[privacy]\ntarget-epsilon = 2.0\n"
    )

    assert audit("--run-config", "own.toml") == 0

    assert "accounted epsilon:     2.00" in capsys.readouterr().out


def test_json_is_one_object_with_the_checks_and_nothing_else(capsys):
    assert audit("--json") == 0

    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True and report["run"] is None
    assert len(report["checks"]) == 11 and report["settings"]["planned_rounds"] == 1


def test_a_sealed_runs_clients_and_trustees_are_audited(quick, capsys):
    assert audit("--run-config", "privacy.trust='trustees' privacy.trustees='a,b'") == 0

    lines = capsys.readouterr().out.splitlines()
    assert "sealed to 2 trustees, of whom 1 may be the server's" in lines[0]
    checks = [line.split(":")[0] for line in lines if line.startswith("PASS  ")]
    assert len(checks) == 15 and "PASS  trustees' noise" in checks
    assert lines[-1] == "PASS"


def test_a_broken_strategy_ends_with_status_1(monkeypatch, capsys):
    from fedllm.privacy.mechanism import SecureGenerator

    real = SecureGenerator.discrete_gaussian
    monkeypatch.setattr(
        SecureGenerator, "discrete_gaussian", lambda s, n: real(s, n) // 2
    )

    assert audit() == 1

    out = capsys.readouterr().out
    assert "FAIL  noise scale" in out
    assert out.splitlines()[-1] == "FAIL"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ('privacy.unit="none" privacy.target-epsilon=0.0', "nothing to audit"),
        ("privacy.delta=1.0", "privacy.delta: must be less than or"),
        ("privacy.target-epsilon=-1.0", "privacy.target-epsilon: must be"),
        ("nowhere.toml", "No such file"),
        ("privacy.delta", "needs a .toml file or key=value"),
        ("privacy.delta=abc", "--run-config"),
        ("privacy.epsilon=1.0", "unknown key"),
        (
            "privacy.trust='trustees' privacy.trustees='a,b' privacy.unit='record' "
            "privacy.noise='joint' train.local-steps=1 adapter.kind='lora-core'",
            "is not audited",
        ),
    ],
)
def test_bad_settings_are_one_clear_error(typed, words):
    said = str(audit("--run-config", typed))

    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--canaries", "0"], "--canaries: must be at least 1"),
        (["--clients", "-3"], "--clients: must be at least 2"),
        (["--dimension", "10"], "--dimension: must be at least 10 times"),
    ],
)
def test_impossible_sizes_are_one_clear_error(arguments, words):
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, *arguments])

    assert words in str(caught.value.code)


def test_a_run_of_record_level_is_audited_by_canary_examples(
    monkeypatch, capsys, tmp_path
):
    from fedllm.auditing import canary_records, row_questions
    from fedllm.privacy.lower_bounds import CertifiedBound

    asked = []
    found = canary_records.RecordFindings(
        7.9, CertifiedBound(1.5, 50, 20, 17), 3.1, 50, 486, 5, 0.21, 0.04
    )

    def audit_first_client(config, num_clients, num_canaries):
        asked.append((config.privacy.unit, num_clients, num_canaries))
        return found

    same = row_questions.RowFindings("which epsilon", {"arrays []": ["any"]}, True)
    other = row_questions.RowFindings("a word", {"x": ["one"], "y": ["two"]}, False)
    replies = [[same], [same, other]]
    monkeypatch.setattr(canary_records, "audit_first_client", audit_first_client)
    monkeypatch.setattr(row_questions, "ask_about_rows", lambda _: replies.pop(0))
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"run_config": {"privacy.unit": "record", "strategy.num-clients": 7}}
        )
    )

    main(["--run", str(tmp_path), "--canaries", "50"])

    assert asked == [("record", 7, 50)]
    told = capsys.readouterr().out
    assert "17 of 20 guesses right" in told and told.endswith("PASS\n")
    assert "accounted epsilon:     7.90" in told and "1.50 (confidence" in told
    written = json.loads((tmp_path / "audit.json").read_text())
    assert written["passed"] is True and written["certified"]["epsilon"] == 1.5
    assert "PASS  rows, which epsilon: 1 kinds of row, one reply" in told

    assert exit_status(main, ["--run", str(tmp_path), "--canaries", "50"]) == 1

    told = capsys.readouterr().out
    assert "FAIL  rows, a word: x for one; y for two" in told
    assert told.endswith("FAIL\n")
    assert json.loads((tmp_path / "audit.json").read_text())["passed"] is False


def test_a_run_by_person_is_audited_by_a_person_too(monkeypatch, capsys, tmp_path):
    from fedllm.auditing import canary_records, person_checks, row_questions
    from fedllm.privacy.lower_bounds import CertifiedBound

    found = canary_records.RecordFindings(
        7.9, CertifiedBound(1.5, 50, 20, 17), 3.1, 50, 486, 5, 0.21, 0.04
    )
    moved = [{1: 1.0, 20: 1.0}, {1: 1.0, 20: 20.0}]
    monkeypatch.setattr(canary_records, "audit_first_client", lambda *_: found)
    monkeypatch.setattr(row_questions, "ask_about_rows", lambda _: [])
    monkeypatch.setattr(
        person_checks,
        "check_persons",
        lambda: person_checks.PersonFindings(moved.pop(0)),
    )
    settings = {"privacy.unit": "record", "data.person-column": "patient"}
    (tmp_path / "config.json").write_text(json.dumps({"run_config": settings}))

    main(["--run", str(tmp_path)])
    assert "PASS  persons: clips that a person" in capsys.readouterr().out

    assert exit_status(main, ["--run", str(tmp_path)]) == 1
    assert "FAIL  persons: " in capsys.readouterr().out


def test_preferences_of_record_level_are_refused_in_one_line():
    said = str(audit("--run-config", "privacy.unit='record' train.objective='dpo'"))

    assert "train.objective: must be 'sft' in an audit of record level" in said
    assert len(said.splitlines()) == 1
