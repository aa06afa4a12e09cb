"""Noise that would destroy the model stops the run."""

import pytest

from fedllm.errors import PrivacyError
from tests.helpers.federations import lines_of, start


def test_destructive_noise_is_refused_where_the_user_says_so(settings, monkeypatch):
    federation, grid = start({**settings, "privacy.on-destructive-noise": "refuse"})
    # The random model's loss cannot rise: stand in for one that knows something.
    losses = iter([3.0, 3.5])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))

    with pytest.raises(PrivacyError, match="more clients"):
        federation.run()

    assert grid.sent == []
    assert lines_of(federation)[-1]["epsilon"] == 0.0


def test_destructive_noise_stops_a_run_by_default_and_names_what_to_change(
    settings, monkeypatch
):
    without = {k: v for k, v in settings.items() if "destructive" not in k}
    federation, grid = start(without)
    losses = iter([3.0, 3.5])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))

    with pytest.raises(PrivacyError) as stopped:
        federation.run()

    text = str(stopped.value)
    assert "\n" not in text
    assert (
        "which protects single rows and not whole clients (--run-config configs/record-level.toml)"
        in text
    )
    assert "fedllm simulate --num-supernodes 20" in text
    assert "privacy.on-destructive-noise='warn'" in text
    assert grid.sent == []


def test_destructive_noise_is_a_warning_if_the_settings_allow_it(
    settings, monkeypatch, caplog
):
    federation, grid = start({**settings, "num-server-rounds": 1})
    losses = iter([3.0, 3.5, 3.1, 3.1])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))

    federation.run()

    assert "noise alone is destructive. What helps: " in caplog.text
    assert len(grid.sent) == 3
