"""A personal adapter: made on the node of its own rows, chosen by others, kept there."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.adapters.files import read_origin
from fedllm.client import cache, personal
from fedllm.client.cache import client_records, client_rows, personal_rows
from fedllm.client.delivery import deliveries, read_trained
from fedllm.client.log import ClientLog
from fedllm.client.node_config import parse_node_config
from fedllm.client.personal import (
    candidates,
    latest_choice,
    make_personal,
    wanted_deliveries,
)
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError, DataError, NodeError
from fedllm.evaluation.held_out_loss import held_out
from fedllm.wire.messages import DELIVER
from tests.helpers.client_replies import RECORD, WITHOUT_DP
from tests.helpers.rows import write_rows

PERSONAL = {"personal.epochs": 2.0, "personal.learning-rate": 0.02}
UNITS = [{}, RECORD, WITHOUT_DP]
ROWS = 60


@pytest.fixture
def node(tmp_path: Path) -> dict[str, Any]:
    return {"data-path": write_rows(tmp_path / "own.jsonl", ROWS)}


@pytest.fixture
def delivered(answer: Any, node: dict[str, Any]):
    """Bring a node with rows of its own the adapter."""

    def bring(changes: dict[str, Any] | None = None, node_config: Any = node) -> Any:
        changes = {**PERSONAL, **(changes or {})}
        answer(changes, node_config, message_type=DELIVER)
        return deliveries()[-1]

    return bring


def texts(examples: Any) -> set[tuple[int, ...]]:
    return {tuple(one["input_ids"]) for one in examples if one is not None}


def own(delivery: Any) -> tuple[Any, ...]:
    config, node = delivery.config, delivery.node
    return cache.resident_model(config), node, config, ClientLog(0, 1)


@pytest.mark.parametrize("changes", UNITS)
def test_the_adapter_the_card_and_the_choice_are_kept_for_the_owner_alone(
    changes, delivered, arrays
):
    delivery = delivered(changes)

    choice = make_personal(delivery)

    folder = delivery.folder / "personal"
    assert choice.folder == folder
    assert {path.name for path in folder.iterdir()} >= {
        *("adapter_model.safetensors", "adapter_config.json", "README.md"),
        *("choice.json", "trained.safetensors", "fedllm.json"),
    }
    for path in (folder, *folder.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert read_origin(folder)["personal"] is True
    assert set(choice.losses) == {"base", "shared", "personal"}
    assert choice.choice == min(choice.losses, key=lambda name: choice.losses[name])
    # The tiny model learns these rows in two passes.
    assert choice.choice == "personal"
    trained = read_trained(folder)
    assert any(np.any(trained[name] != arrays[name]) for name in arrays)
    assert "Not private" in (folder / "README.md").read_text()


@pytest.mark.parametrize("changes", UNITS)
def test_rows_that_stop_or_choose_train_in_no_round_nor_afterwards(changes, delivered):
    delivery = delivered(changes)
    resident, node, config, log = own(delivery)

    rows = personal_rows(resident, node, config, log)

    read = client_records if config.privacy.unit == "record" else client_rows
    in_rounds = texts(read(resident, node, config, log))
    stopping, choosing = texts(rows.stopping), texts(rows.choosing)
    assert stopping and choosing and not stopping & choosing
    assert in_rounds == texts(rows.training)
    assert not in_rounds & (stopping | choosing)
    assert len(in_rounds) + len(stopping) + len(choosing) == ROWS


def test_under_record_level_there_are_as_many_records_as_rows(delivered):
    resident, node, config, log = own(delivered(RECORD))

    records = client_records(resident, node, config, log)

    assert len(records) == ROWS
    assert 0 < sum(record is None for record in records) < ROWS / 2


def test_the_choice_is_by_the_losses_on_the_rows_that_choose(delivered):
    delivery = delivered()
    choice = make_personal(delivery)
    adapted, values = candidates(delivery)
    rows = personal_rows(*own(delivery))

    for name, loss in choice.losses.items():
        adapted.set(values[name])
        score = held_out(adapted.model, rows.choosing, adapted.pad_token_id)
        assert score.loss == pytest.approx(loss)
    assert choice.rows == {
        "training": len(rows.training),
        "stopping": len(rows.stopping),
        "choosing": len(rows.choosing),
    }


def test_what_was_made_is_not_made_again(delivered, monkeypatch):
    delivery = delivered()
    first = make_personal(delivery)
    monkeypatch.setattr(personal, "resident_model", None)

    assert make_personal(delivery) == first


def test_a_training_that_was_stopped_leaves_nothing_and_is_begun_anew(
    delivered, monkeypatch
):
    delivery = delivered()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(personal, "personal_card", stop)
        with pytest.raises(KeyboardInterrupt):
            make_personal(delivery)
    folders = [path.name for path in delivery.folder.iterdir() if path.is_dir()]
    assert folders == ["shared"]

    assert make_personal(delivery).folder.is_dir()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows_are_one_clear_line(count, unit, delivered, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", count)
    delivery = delivered({**unit, "train.batch-size": 1}, {"data-path": few})

    with pytest.raises(DataError, match="too few rows for a personal") as caught:
        make_personal(delivery)
    assert "\n" not in str(caught.value)
    assert not (delivery.folder / "personal").exists()


def test_a_base_that_changed_since_the_run_is_not_trained(
    delivered, answer, node, arrays
):
    answer(PERSONAL, node, message_type=DELIVER, base_model="another 123")

    with pytest.raises(ConfigError, match="is another model here"):
        make_personal(deliveries()[-1])


def test_without_a_delivery_or_a_training_the_next_step_is_named(delivered):
    with pytest.raises(NodeError, match="no run has delivered an adapter here"):
        wanted_deliveries()
    with pytest.raises(NodeError, match="run 5 has delivered"):
        latest_choice("5")
    delivered()
    with pytest.raises(NodeError, match="fedllm node personal 1"):
        latest_choice()


def test_a_damaged_choice_is_one_line(delivered):
    delivery = delivered()
    make_personal(delivery)
    (delivery.folder / "personal/choice.json").write_text("{}")
    with pytest.raises(NodeError, match=r"choice\.json: cannot be read"):
        latest_choice()


@pytest.mark.parametrize("unit", UNITS)
def test_what_rows_hold_is_written_nowhere_but_in_the_personal_folder(
    unit, answer, tmp_path, arrays, home
):
    marker = "XyzzyMarker"
    rows = [
        {"instruction": f"{marker} {i}?", "response": f"{marker} says {i}."}
        for i in range(ROWS)
    ]
    path = tmp_path / "marked.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    node = {"data-path": str(path)}
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    reply = answer({**PERSONAL, **unit}, node, message_type=DELIVER)
    delivery = deliveries()[-1]

    made = make_personal(delivery)

    values = read_trained(made.folder)
    weights = next(v for n, v in values.items() if np.any(v != arrays[n])).tobytes()
    fresh = {p for p in tmp_path.rglob("*") if p.is_file()} - before
    outside = [p for p in fresh if made.folder not in p.parents]
    assert outside and any(weights in p.read_bytes() for p in fresh)
    for file in outside:
        content = file.read_bytes()
        assert marker.encode() not in content, file
        assert weights not in content, file
    for record in reply.content.values():
        assert marker.encode() not in record.deflate()
        assert weights not in record.deflate()
    assert not [p for p in os.listdir(home) if p.startswith("tmp")]


def test_a_kind_that_the_server_chose_is_kept_with_the_settings(
    answer, node, run_config
):
    changes = {**PERSONAL, "adapter.kind": "auto"}
    answer(changes, node, message_type=DELIVER, adapter_kind="ffa-lora")
    delivery = deliveries()[-1]

    named = {**run_config, **PERSONAL, "adapter.kind": "ffa-lora"}
    assert delivery.config == parse_run_config(named)
    assert delivery.node == parse_node_config(node)
