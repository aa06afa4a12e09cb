"""Settings as typed: a file or pairs, over pyproject.toml."""

from tests.helpers.plans import plan_json


def test_the_apps_own_settings_count_where_nothing_is_typed(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nnum-server-rounds = 9\nadapter.rank = 4\n"
    )
    monkeypatch.chdir(tmp_path)

    found = plan_json(capsys)

    assert (found["num_rounds"], found["num_trainable"]) == (9, 92_160)


def test_a_typed_file_comes_before_the_flags(capsys, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("num-server-rounds = 7\n[strategy]\nnum-clients = 33\n")

    found = plan_json(capsys, "--run-config", str(file), "--rounds", "2")

    assert (found["num_clients"], found["num_rounds"]) == (33, 2)
    pairs = plan_json(capsys, "--run-config", "num-server-rounds=9 adapter.rank=4")
    assert (pairs["num_rounds"], pairs["num_trainable"]) == (9, 92_160)
