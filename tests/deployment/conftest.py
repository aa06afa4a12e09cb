"""A node with a fork server, and a config that this machine can run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.doctor import typed
from tests.helpers.fork_servers import Node, started

__all__ = ["typed"]


@pytest.fixture
def cold(tmp_path) -> Path:
    """A stand-in for Flower's own program."""
    program = tmp_path / "flwr-clientapp"
    program.write_text('#!/bin/sh\necho "{\\"cold\\": \\"$@\\"}"\nexit 5\n')
    program.chmod(0o700)
    return program


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Path:
    """A home of few letters, since the path of a socket may have 107."""
    folder = tmp_path_factory.mktemp("h")
    monkeypatch.setenv("FEDLLM_HOME", str(folder))
    return folder


@pytest.fixture
def node(cold) -> Iterator[Node]:
    with started(cold) as here:
        yield here
