"""Checkpoints: what they hold, and what does not fit them."""

import json
import shutil
from typing import Any

import pytest
import safetensors.numpy
from flwr.app import Message

from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.runs.checkpoint import CHECKPOINT_FILE
from fedllm.wire.messages import error_content
from tests.helpers.federations import (
    Killed,
    cut_in_round,
    edit,
    federation,
    kill,
    read,
    resumed,
)


def test_a_checkpoint_under_dp_holds_no_draw_and_no_cohort(quick):
    coins = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}

    def fail(message: Message, context: Any) -> Message:
        return Message(error_content("no-data", None), reply_to=message)

    given = {**quick, **coins, "num-server-rounds": 1}
    run = federation(given, fail, num_clients=6)
    run.run()

    with safetensors.safe_open(run.directory.path / CHECKPOINT_FILE, "np") as file:
        state = json.loads(file.metadata()["fedllm"])
        parts = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118
    assert parts == {"adapter", "best", "moments"}
    assert state["population"] == list(range(100, 106))
    assert state["failures"] == {}


def test_another_base_model_under_the_same_name_is_rejected(
    quick, tiny_llama, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    cut_in_round({**quick, "model.name": str(base)}, 2)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)

    with pytest.raises(ConfigError, match="another base model.* was .* and is now"):
        resumed()


def test_another_adapter_than_the_checkpoint_s_is_rejected(quick):
    cut = cut_in_round(quick, 2)
    edit(cut, "config.json", lambda c: c["run_config"].update({"adapter.rank": 2}))

    with pytest.raises(ConfigError, match="another adapter: rank was 4 and is now 2"):
        resumed()


@pytest.mark.parametrize("unit", ["client", "record"])
def test_an_older_copy_of_the_ledger_is_rejected(quick, unit, tmp_path):
    given = {**quick, "privacy.unit": unit}
    early = cut_in_round(given, 2)
    old = (early.directory.path / "privacy.json").read_text()
    late = cut_in_round(given, 3)
    ledger = late.directory.path / "privacy.json"
    chain = json.loads(ledger.read_text())["chain"]
    earlier = {"run": late.directory.path.name, "chain": chain[:1]}
    ledger.write_text(json.dumps({**json.loads(old), **earlier}))
    # The released rounds that are kept outside the folder are put back too.
    for path in (tmp_path / "home").glob("released/*.json"):
        path.write_text('{"rounds": [1]}')

    with pytest.raises(PrivacyError, match=r"has the rounds \[1\], but \[1, 2\]"):
        resumed()


def test_a_damaged_ledger_or_checkpoint_is_one_line(quick):
    cut = cut_in_round(quick, 2)
    checkpoint = cut.directory.path / CHECKPOINT_FILE
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-100])
    with pytest.raises(FederationError, match="checkpoint is damaged"):
        resumed()
    checkpoint.write_bytes(whole)
    (cut.directory.path / "privacy.json").write_text("{")
    with pytest.raises(PrivacyError, match="cannot be read"):
        resumed()


def test_if_every_round_was_paid_for_and_lost_nothing_is_claimed(quick, monkeypatch):
    given = {**quick, "num-server-rounds": 1}
    run = federation(given)
    monkeypatch.setattr(run.saver, "save_round", kill)
    with pytest.raises(Killed):
        run.run()

    with pytest.raises(FederationError, match="every round was paid for and lost"):
        resumed()
    assert read(run, "privacy.json")["releases"] == [1]


def test_lost_rounds_are_logged(quick, caplog, monkeypatch):
    caplog.set_level("INFO")
    run = federation(quick)
    monkeypatch.setattr(run, "_validate", lambda r: kill() if r == 2 else 1.0)
    with pytest.raises(Killed):
        run.run()
    resumed()

    assert "1 round(s) were paid for and lost (2)" in caplog.text
    assert "resumed after round 1; next is round 3 of 3" in caplog.text
