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
