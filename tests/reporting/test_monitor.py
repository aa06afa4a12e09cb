"""What shows of a run while it runs, and that none of it can end the run."""

import json
import logging

import pytest

from fedllm.errors import ConfigError, FederationError
from fedllm.reporting import monitor
from fedllm.reporting.monitor import RunMonitor
from fedllm.reporting.trackers import numbers
from fedllm.runs.state import read_state
from tests.helpers.federations import NO_PRIVACY, SECRET_COHORTS, lines_of, start


@pytest.fixture
def quick(settings):
    return {**settings, "num-server-rounds": 1, "privacy.noise-probe": False}


class Recorder:
    """A tracker that keeps, or fails at, what it is given."""

    def __init__(self, error=None):
        self.rounds, self.closed, self.error = [], False, error

    def log(self, server_round, values):
        if self.error:
            raise self.error
        self.rounds.append((server_round, dict(values)))

    def close(self):
        self.closed = True


def test_the_page_is_there_after_each_round_and_its_time_is_saving(quick, monkeypatch):
    written = []

    def write(folder):
        written.append(folder)
        clock[0] += 3.0

    clock = [0.0]
    monkeypatch.setattr(monitor, "write_report", write)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    federation, _ = start({**quick, **NO_PRIVACY, "num-server-rounds": 3})
    monkeypatch.setattr(monitor, "_LARGEST_SHARE", float("inf"))
    federation.run()

    # After round 0, after each of 3 rounds, and at the end.
    assert len(written) == 5
    saving = [line["seconds"]["save"] for line in lines_of(federation)]
    assert saving[0] == 0.0
    assert all(seconds >= 3.0 for seconds in saving[1:])


def test_drawing_takes_no_large_share_of_a_run_of_quick_rounds(tmp_path, monkeypatch):
    written, clock = [], [0.0]

    def write(folder):
        written.append(clock[0])
        clock[0] += 1.0

    monkeypatch.setattr(monitor, "write_report", write)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock[0])
    watch = RunMonitor(tmp_path, "none")
    for server_round in range(200):
        watch.note({"server_round": server_round})
        clock[0] += 1.0

    assert 5 <= len(written) <= 0.06 * clock[0]
    assert watch.take_seconds() == len(written)
    assert watch.take_seconds() == 0.0


def test_what_cannot_be_drawn_answered_or_tracked_does_not_end_a_run(
    quick, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)

    def refuse(*args, **kwargs):
        raise ValueError("no\nink")

    monkeypatch.setattr("fedllm.reporting.report.page", refuse)
    monkeypatch.setattr("fedllm.evaluation.public_rows.PublicRows.answers", refuse)
    tracker = Recorder(OSError("no network"))
    monkeypatch.setattr(monitor, "make_tracker", lambda name, folder: tracker)
    monkeypatch.setattr(monitor, "_LARGEST_SHARE", float("inf"))
    federation, _ = start({**quick, **NO_PRIVACY})
    result = federation.run()

    assert result["num_rounds"] == 1 and tracker.closed
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    page = "report.html of this run cannot be written: ValueError: no ink"
    assert warnings.count(page) == 3
    assert "no sample answers: ValueError: no ink" in warnings
    assert sum("no network" in text for text in warnings) == 2


def test_a_tracker_gets_the_numbers_of_metrics_jsonl_and_nothing_else(
    quick, monkeypatch
):
    tracker = Recorder()
    monkeypatch.setattr(monitor, "make_tracker", lambda name, folder: tracker)
    federation, _ = start({**quick, **SECRET_COHORTS})
    federation.run()

    lines = lines_of(federation)
    assert tracker.rounds == [(line["server_round"], numbers(line)) for line in lines]
    assert not any("clients" in key or "mega" in key for key in tracker.rounds[1][1])


def test_trackers_cannot_stamp_the_rounds_of_secret_cohorts(quick, monkeypatch):
    found = {}
    fixed = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.7}
    for chosen in (SECRET_COHORTS, fixed):
        tracker, tracked = Recorder(), []
        monkeypatch.setattr(monitor, "make_tracker", lambda *_, to=tracker: to)
        monkeypatch.setattr(
            monitor,
            "write_report",
            lambda _, of=tracker, to=tracked: to.append(len(of.rounds)),
        )
        start({**quick, **chosen, "num-server-rounds": 2})[0].run()
        found[chosen["strategy.sampling"]] = (tracked[0], tracked[-1])

    assert found == {"poisson": (0, 3), "fixed": (1, 3)}


def test_a_tracker_that_is_not_there_stops_before_a_folder_is_made(
    quick, monkeypatch, tmp_path
):
    monkeypatch.setattr("fedllm.reporting.trackers.find_spec", lambda _: None)

    with pytest.raises(ConfigError, match="pip install wandb"):
        start({**quick, "output.tracker": "wandb"})

    assert not (tmp_path / "home" / "runs").exists()


def test_a_run_that_fails_has_its_reason_in_its_folder(quick, tmp_path):
    with pytest.raises(FederationError):
        start({**quick, "strategy.num-clients": 20})

    (folder,) = (p for p in (tmp_path / "home/runs").iterdir() if not p.is_symlink())
    state, reason = read_state(folder, finished=False)
    assert state == "failed" and "strategy.num-clients" in reason
    assert "strategy.num-clients" in (folder / "report.html").read_text()


def test_a_run_that_is_killed_between_rounds_is_interrupted_not_failed(
    quick, monkeypatch
):
    federation, _ = start(quick)

    def interrupt(server_round):
        raise KeyboardInterrupt

    monkeypatch.setattr(federation, "_evaluate_clients", interrupt)
    with pytest.raises(KeyboardInterrupt):
        federation.run()

    folder = federation.directory.path
    assert json.loads((folder / "state.json").read_text())["state"] == "running"
