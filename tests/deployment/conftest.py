"""A node with a fork server, and a config that this machine can run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedllm.deployment import flower_daemon
from tests.helpers.doctor import free_port
from tests.helpers.fork_servers import Node, started
from tests.helpers.rows import write_rows


@pytest.fixture
def typed(tiny_llama, tmp_path, monkeypatch):
    """A config that this machine can run."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(flower_daemon, "FLOWER_PORT", free_port())
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 4,
        "data.name": rows,
    }


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
