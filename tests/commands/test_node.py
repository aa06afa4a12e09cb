"""The owner's own command."""

import json
import logging
from pathlib import Path

import pytest

from fedllm.commands import node
from fedllm.deployment.keys import add_reviewer_key
from fedllm.errors import NodeError
from fedllm.node.approvals import Request, pending, take
from fedllm.node.log import append, log_path
from tests.helpers.deliveries import deliver_to
from tests.helpers.rows import write_rows


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, caplog):
    # What the command sets is put back.
    caplog.set_level(logging.WARNING, logger="fedllm")
    caplog.handler.setLevel(logging.NOTSET)
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))


def test_a_run_that_waits_is_listed_approved_and_revoked(capsys):
    node.main(["list"])
    assert "nothing waits" in capsys.readouterr().out
    asked = Request("f" * 64, {"num-server-rounds": 3})
    with pytest.raises(NodeError):
        take(asked, "train")
    node.main(["list"])
    assert "num-server-rounds: null -> 3" in capsys.readouterr().out
    node.main(["list", "--json"])
    assert json.loads(capsys.readouterr().out)["pending"][0]["digest"] == asked.digest
    node.main(["approve", asked.digest[:8]])
    take(asked, "train")
    node.main(["list"])
    assert "1 of 3 rounds used" in capsys.readouterr().out
    node.main(["revoke", asked.digest[:8]])
    with pytest.raises(NodeError):
        take(asked, "train")


def test_the_log_is_printed_and_checked_against_a_head(capsys, tmp_path):
    append("asked", run_id=5, refused="\x1b[2K")
    head = append("answered", code="failed")
    (tmp_path / "head").write_text(f"{head}\n")
    node.main(["log"])
    said = capsys.readouterr().out
    assert "asked 5" in said and "\x1b" not in said
    for noted in (head.hash, str(tmp_path / "head")):
        node.main(["log", "--check", "--head", noted])
        assert capsys.readouterr().out == f"whole: {head}\n"
    log_path().write_text(log_path().read_text().splitlines(True)[0])
    with pytest.raises(SystemExit, match="were taken out"):
        node.main(["log", "--check", "--head", head.hash])


def test_the_nodes_page_is_written_beside_its_log(capsys):
    append("asked", run_id=5, message_type="train", refused=None, superlink="s")
    node.main(["dossier"])

    page, content = (
        line.split(": ")[1] for line in capsys.readouterr().out.splitlines()
    )
    assert page == str(log_path().with_name("dossier.html"))
    assert json.loads(Path(content).read_text())["log"]["number"] == 1


def test_a_reviewer_signs_a_request_and_the_owner_brings_it(
    capsys, tmp_path, monkeypatch
):
    key = add_reviewer_key(tmp_path / "keys", "alice")
    asked = Request("f" * 64, {"num-server-rounds": 3, "x\x1b": "\x1b[2K"})
    with pytest.raises(NodeError):
        take(asked, "train")
    waits = log_path().parent / "requests" / f"{asked.digest}.json"
    with pytest.raises(SystemExit, match="--key: needs"):
        node.main(["sign", str(waits)])
    node.main(["sign", str(waits), "--key", str(key), "--days", "2"])
    said = capsys.readouterr().out
    assert "for 3 rounds until" in said and "num-server-rounds: null -> 3" in said
    assert "\x1b" not in said
    with pytest.raises(SystemExit, match="cannot be written: File exists"):
        node.main(["sign", str(waits), "--key", str(key)])
    # What a reviewer left in the folder of requests waits for nobody.
    assert [r.digest for r in pending()] == [asked.digest]
    bring = ["approve", "--signature", str(waits.with_suffix(".signed"))]
    with pytest.raises(SystemExit, match="fedllm node trust KEY.pub"):
        node.main(bring)
    node.main(["trust", f"{key}.pub"])
    node.main(bring)
    node.main(["list"])
    said = capsys.readouterr().out
    assert "0 of 3 rounds used, signed by alice" in said
    assert "trusted: alice SHA256:" in said and "waits" not in said
    take(asked, "train")
    node.main(["distrust", "alice"])
    node.main(["list"])
    assert "signed by nobody who is trusted" in capsys.readouterr().out
    with pytest.raises(NodeError):
        take(asked, "train")


def own_rows(tmp_path, count):
    return {"data-path": write_rows(tmp_path / f"{count}.jsonl", count)}


def test_personal_trains_what_the_newest_run_delivered_and_names_the_choice(
    tiny_llama, tmp_path, capsys, caplog
):
    delivery = deliver_to(tiny_llama, own_rows(tmp_path, 60))

    node.main(["personal"])

    out = capsys.readouterr().out
    assert f"run 1, client {delivery.node.partition_id}: chosen by " in out
    assert "personal" in out and str(delivery.folder / "personal") in out
    assert "is not private" in out
    assert "held-out loss" in caplog.text and "held-out loss" not in out
    made = (delivery.folder / "personal/trained.safetensors").read_bytes()
    node.main(["personal", "1"])
    assert (delivery.folder / "personal/trained.safetensors").read_bytes() == made


def test_personal_of_a_node_with_too_few_rows_is_one_line(tiny_llama, tmp_path):
    deliver_to(tiny_llama, own_rows(tmp_path, 2))

    with pytest.raises(SystemExit, match="too few rows for a personal") as caught:
        node.main(["personal"])
    assert "\n" not in str(caught.value.code)


def test_a_simulated_client_with_too_few_rows_does_not_stop_the_others(
    tiny_llama, tmp_path, capsys
):
    few, enough = own_rows(tmp_path, 2), own_rows(tmp_path, 60)
    deliver_to(tiny_llama, {**few, "partition-id": 0})
    deliver_to(tiny_llama, {**enough, "partition-id": 1})

    node.main(["personal"])

    out = capsys.readouterr().out
    assert "client 0: has too few rows" in out and "run 1, client 1: chosen by" in out


def test_personal_without_a_delivery_is_one_line():
    with pytest.raises(SystemExit, match="no run has delivered an adapter here"):
        node.main(["personal"])
