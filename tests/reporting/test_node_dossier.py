"""A node's own page, of its own log."""

import json

import pytest

from fedllm.errors import NodeError
from fedllm.node.log import append, log_path
from fedllm.reporting.node_dossier import write_node_dossier
from fedllm.server.ledger_head import HeadSigner
from tests.helpers.dossiers import chain_of, finished
from tests.helpers.pages import Checker


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ask(server_round, entries, **more):
    facts = {"superlink": "fl.example.org", "app": "ab", "config": "cd"}
    append(
        "asked",
        run_id=5,
        message_type="train",
        round=server_round,
        **{"refused": None, **facts, **entries, **more},
    )
    append("answered", run_id=5, code=None, num_bytes=1000)


def test_the_page_counts_what_was_asked_and_answered_and_keeps_the_last_end(tmp_path):
    chain, signer = chain_of(finished(tmp_path / "run")), HeadSigner(tmp_path / "s")
    for server_round in (1, 2, 3):
        ask(server_round, signer.entries(chain.head_at(server_round - 1)))
    append("answered", run_id=5, code="<b>failed", num_bytes=0)
    budget = {
        "limits": {"max_epsilon": 8.0, "delta": 1e-5},
        "epsilon_of_lifetime": 4.2,
        "runs": [{"run": "r", "run_id": 5, "epsilon": 4.2}],
    }
    page, path = write_node_dossier(budget)
    content, checker = json.loads(path.read_text()), Checker()
    checker.feed(page.read_text())

    assert checker.wrong == [] and checker.open == [] and "b" not in checker.tags
    (end,) = content["ends"]
    assert end["head"] == str(chain.head_at(2)) and end["round"] == 3
    lines = {
        line["name"]: line["value"]
        for section in content["sections"]
        for line in section["lines"]
    }
    assert lines["Messages"] == "train x3" and lines["Rounds asked for"] == "1, 2, 3"
    assert lines["Bytes of arrays that left"] == "3,000"
    assert lines["Answers without an update"] == "<b>failed x1"
    assert lines["Epsilon of run 5"] == "4.20"
    assert path.stat().st_mode & 0o777 == page.stat().st_mode & 0o777 == 0o600


def test_an_edited_log_or_none_has_no_page():
    with pytest.raises(NodeError, match="cannot be read"):
        write_node_dossier({})
    ask(1, {})
    ask(2, {})
    lines = log_path().read_text().splitlines(True)
    log_path().write_text("".join([lines[0], *lines[2:]]))

    with pytest.raises(NodeError, match="line 2: does not follow"):
        write_node_dossier({})
