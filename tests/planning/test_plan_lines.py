"""The plan as text: what is expected, and what was not measured."""

from tests.helpers.plans import ONE_STEP, plan_text


def test_noise_beyond_what_was_measured_is_not_measured(capsys):
    loud = plan_text(capsys, *ONE_STEP, "--clients", "3", "--epsilon", "1")

    assert "not measured" in loud and "clients 3 (20)" in loud
    assert "not measured" not in plan_text(capsys, *ONE_STEP, "--clients", "20")


def test_noise_that_protects_nobody_is_called_no_protection(capsys):
    text = plan_text(capsys, "--run-config", "configs/openllama-3b.toml")

    assert "epsilon 127,132 zero-out" in text
    assert "protection is none to speak of" in text
    assert "2 in each of 100 rounds" in text


def test_a_measured_run_has_its_interval_and_better_runs_with_their_losses(capsys):
    text = plan_text(capsys, *ONE_STEP, "--epsilon", "4")

    assert "test loss 3.15 (3.07 to 3.24) from 3.76, 55% of the best gain" in text
    assert "300 clients (2.73); epsilon 8 (2.77); 100 clients (2.77)" in text


def test_a_run_that_was_not_measured_has_its_differences_and_no_loss(capsys):
    text = plan_text(capsys, *ONE_STEP, "--rounds", "3")

    assert "expected test loss: not measured" in text
    assert "rounds 3 (5), noise multiplier 1.04 (1.34)" in text
    assert "nearest measured: 20 clients, epsilon 8, 5 rounds" in text
    # The noise alone would promise this, and such runs reach 3.1.
    assert "2.80" not in text
    assert "better" not in text


def test_the_step_by_rule_comes_with_its_expected_loss_if_it_is_measured(capsys):
    rule = "on average over the rounds, at clipping norm 0.6 (a rule for one local SGD step)"

    measured = plan_text(capsys, *ONE_STEP, "--epsilon", "2")
    not_measured = plan_text(capsys, *ONE_STEP, "--rounds", "3")

    assert (
        f"strategy.server-learning-rate 0.18 {rule}: expected test loss 3.36 ("
        in measured
    )
    assert f"strategy.server-learning-rate 1 {rule}\n" in not_measured


def test_the_table_has_the_planned_rounds_among_its_own(capsys):
    text = plan_text(capsys, "--rounds", "7")

    rounds = [line.split()[0] for line in text.splitlines()[-7:]]
    assert rounds == ["1", "3", "5", "7", "10", "30", "100"]


def test_a_delta_that_weakens_the_promise_is_said(capsys):
    clients = plan_text(capsys, "--delta", "1e-3", "--clients", "1000")
    records = plan_text(
        capsys,
        *("--run-config", "configs/record-level.toml"),
        *("--records", "2000", "--delta", "1e-3", "--noise-multiplier", "2"),
    )

    for text, units in ((clients, "1,000"), (records, "2,000")):
        assert "protection is none to speak of" in text
        assert f"caution: delta 0.001 is not below one over {units}: " in text
    assert "caution" not in plan_text(capsys)
