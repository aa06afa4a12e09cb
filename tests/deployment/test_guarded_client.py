"""What stands between Flower and an app that the owner has not chosen."""

import hashlib
import io
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedllm.deployment import guarded_client
from fedllm.deployment.guarded_client import _Guard
from fedllm.errors import NodeError
from fedllm.node import approvals
from fedllm.node.approvals import approve, approve_signed, pending, revoke
from fedllm.node.log import log_path, read_lines
from fedllm.node.reviews import distrust, trust
from tests.helpers.flower_messages import context, instruction
from tests.helpers.reviewers import public_key, signed

ROOT = Path(__file__).parent.parent.parent


def bundle(marker: Path) -> bytes:
    """An app that leaves a marker if it is imported."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("fedllm/client_app.py", f"open({str(marker)!r}, 'w')")
    return stream.getvalue()


class Flower(SimpleNamespace):
    """Flower's module: what it unpacked, and a client in place of a loaded one."""

    def __init__(self) -> None:
        super().__init__()
        self.unpacked: list[str] = []
        self.install_from_fab = lambda app, **_: self.unpacked.append(
            os.environ["FLWR_HOME"]
        )
        self.get_load_client_app_fn = lambda **_: lambda *_: self.client

    @staticmethod
    def client(message: Message, _: object) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord()}), reply_to=message)

    def run(self, app: bytes) -> Message:
        """Do what Flower's command does with an app."""
        self.install_from_fab(app, skip_prompt=True)
        load = self.get_load_client_app_fn(
            default_app_ref="", app_path=None, multi_app=True
        )
        return load("id", "1", "hash")(message=instruction(), context=context({}))


@pytest.fixture
def flower(monkeypatch) -> Flower:
    monkeypatch.setenv(guarded_client.APPROVE, "all")
    monkeypatch.setenv("FLWR_HOME", "/the/usual")
    return Flower()


@pytest.mark.parametrize("choice", ["installed", "0" * 64])
def test_a_refused_app_is_neither_unpacked_nor_loaded_and_the_server_gets_a_code(
    flower, choice, tmp_path
):
    app = bundle(tmp_path / "marker")
    _Guard(choice, "").stand_before(flower)
    reply = flower.run(app)

    assert dict(reply.content.config_records["error"])["code"] == "not-approved"
    assert flower.unpacked == [] and not (tmp_path / "marker").exists()
    asked, answered = read_lines(log_path())
    assert asked["app"] == hashlib.sha256(app).hexdigest() and asked["refused"]
    assert answered["code"] == "not-approved"


def test_a_chosen_app_is_unpacked_into_a_folder_that_no_other_run_has_written(
    flower, monkeypatch, tmp_path
):
    monkeypatch.setattr(guarded_client.sys, "modules", dict(sys.modules))
    app = bundle(tmp_path / "marker")
    for choice in (hashlib.sha256(app).hexdigest(), "any"):
        here = Flower()
        _Guard(choice, "").stand_before(here)
        assert "arrays" in here.run(app).content.array_records
        flower.unpacked += here.unpacked

    first, second = map(Path, flower.unpacked)
    assert first != second and first.stat().st_mode & 0o777 == 0o700
    assert list(first.iterdir()) == []


def test_the_installed_app_is_run_without_unpacking_the_delivered_one(
    flower, monkeypatch
):
    monkeypatch.setattr(guarded_client, "require_chosen", lambda *_: None)
    guard = _Guard("installed", "")
    from fedllm.client_app import app as installed

    assert guard._client(None) is installed
    guard.stand_before(flower)
    flower.install_from_fab(b"", skip_prompt=True)
    assert flower.unpacked == []


def test_the_log_keeps_the_round_and_the_signed_end_of_the_ledger(flower):
    end = {"ledger-head": "run 4 ab", "ledger-key": "k", "ledger-signature": "s"}
    sent = {"server-round": 5, **end}
    guard = _Guard("any", "")
    for config in (sent, {**end, "ledger-head": "x" * 501}, {**end, "ledger-key": 7}):
        message = instruction(RecordDict({"config": ConfigRecord(config)}))
        guard._around(lambda: flower.client)(message, context({}))
    asked = [line for line in read_lines(log_path()) if line["event"] == "asked"]

    kept = [{name: line.get(name) for name in end} for line in asked]
    assert kept == [end, dict.fromkeys(end), dict.fromkeys(end)]
    assert [line.get("round") for line in asked] == [5, None, None]


def test_another_program_is_refused_with_an_answer(flower, tmp_path):
    _Guard("any", "flwr-agentapp").stand_before(flower)
    reply = flower.run(bundle(tmp_path / "marker"))

    assert dict(reply.content.config_records["error"])["code"] == "not-approved"
    assert flower.unpacked == []


def test_what_the_nodes_log_cannot_hold_is_not_answered(flower, tmp_path):
    log_path().parent.mkdir(parents=True)
    log_path().write_text("not a log's line\n")
    _Guard("any", "flwr-agentapp").stand_before(flower)
    reply = flower.run(bundle(tmp_path / "marker"))

    record = dict(reply.content.config_records["error"])
    assert record["code"] == "failed" and "text" not in record


def test_flowers_module_has_what_the_guard_replaces():
    from flwr.supernode.runtime import run_clientapp

    assert callable(run_clientapp.install_from_fab)
    assert callable(run_clientapp.get_load_client_app_fn)


@pytest.mark.parametrize("program", ["flwr-clientapp", "flwr-agentapp"])
def test_the_programs_start_flowers_command_behind_the_guard(program):
    path = ROOT / "fedllm" / "deployment" / "programs" / program
    environment = {**os.environ, "FEDLLM_PYTHON": sys.executable}
    done = subprocess.run(
        [str(path), "--help"], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "usage: flwr-clientapp" in done.stdout


@pytest.fixture
def ask(flower, monkeypatch):
    """Ask a node that runs the installed app, with these settings."""

    def ask(**settings: object) -> Message:
        guard = _Guard("installed", "")
        monkeypatch.setattr(guarded_client, "require_chosen", lambda *_: None)
        monkeypatch.setattr(guard, "_client", lambda *_: _refused_or(guard, flower))
        here = Flower()
        guard.stand_before(here)
        here.install_from_fab(b"app", skip_prompt=True)
        load = here.get_load_client_app_fn()
        return load("id", "1", "hash")(instruction(), context(settings))

    return ask


def code(reply: Message) -> object:
    error = reply.content.config_records.get("error")
    return None if error is None else dict(error)["code"]


def test_a_run_is_answered_by_a_reviewers_signature_and_refused_by_anything_else(
    ask, monkeypatch, tmp_path
):
    monkeypatch.setenv(guarded_client.APPROVE, "each")
    assert code(ask(seed=1, **{"num-server-rounds": 2})) == "not-approved"
    (request,) = pending()
    path = signed(tmp_path, request)
    with pytest.raises(NodeError, match="no reviewer"):
        approve_signed(signed(tmp_path, request, "mallory"))
    trust(public_key(tmp_path))
    approve_signed(path)

    assert code(ask(seed=1, **{"num-server-rounds": 2})) is None
    assert code(ask(seed=2, **{"num-server-rounds": 2})) == "not-approved"
    assert code(ask(seed=1, **{"num-server-rounds": 3})) == "not-approved"
    assert code(ask(seed=1, **{"num-server-rounds": 2})) is None
    # Two rounds were signed.
    assert code(ask(seed=1, **{"num-server-rounds": 2})) == "not-approved"
    later = time.time() + 31 * 86_400
    revoke(request.digest)
    approve_signed(path)
    with monkeypatch.context() as patch:
        patch.setattr(approvals.time, "time", lambda: later)
        assert code(ask(seed=1, **{"num-server-rounds": 2})) == "not-approved"
    distrust("alice")
    trust(public_key(tmp_path, "mallory"))
    assert code(ask(seed=1, **{"num-server-rounds": 2})) == "not-approved"


def test_a_run_that_each_owner_approves_is_answered_after_the_approval_alone(
    ask, monkeypatch
):
    monkeypatch.setenv(guarded_client.APPROVE, "each")
    error = ask(seed=1).content.config_records["error"]
    assert dict(error)["code"] == "not-approved"
    approve(pending()[0].digest, None, 30)
    assert "arrays" in ask(seed=1).content.array_records
    assert "error" in ask(seed=2).content.config_records
    monkeypatch.setenv(guarded_client.APPROVE, "same-settings")
    for _ in range(9):
        assert "arrays" in ask(seed=1).content.array_records
    assert "error" in ask(seed=2).content.config_records
    monkeypatch.delenv(guarded_client.APPROVE)
    assert "error" in ask(seed=3).content.config_records


def _refused_or(guard: _Guard, flower: Flower):
    return flower.client if guard._refusal is None else guarded_client._refuse
