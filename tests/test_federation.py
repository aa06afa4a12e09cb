"""The whole round in one process, on a tiny random model of OpenLLaMA's kind."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.client import cache, message_handler
from fedllm.config import flat, parse_run_config
from fedllm.errors import AdapterError, FederationError, PrivacyError
from fedllm.planning.adapter_choice import Choice
from fedllm.server.federation import Federation
from fedllm.wire.messages import ARRAYS, METRICS, array_record, error_content
from tests.flower_messages import RUN_ID
from tests.in_process_grid import InProcessGrid

MARKER = "zyzzyva"


def write_rows(path: Path, count: int, start: int = 0) -> str:
    rows = [
        {
            "instruction": f"What is the term number {i}?",
            "response": f"It is {MARKER} number {i}, a disorder of the lungs.",
        }
        for i in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    cache._resident.clear()
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 0,
        "data.name": write_rows(tmp_path / "train.jsonl", 24),
        "data.public-validation": write_rows(tmp_path / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(tmp_path / "test.jsonl", 5, 200),
        "adapter.rank": 4,
        "num-server-rounds": 2,
        "train.batch-size": 4,
        "strategy.server-learning-rate": 1.0,
        "strategy.server-learning-rate-min": 1.0,
        "strategy.wait-for-clients": 0.1,
        "strategy.round-timeout": 20.0,
    }


NO_PRIVACY = {"privacy.unit": "none", "privacy.target-epsilon": 0.0}


def partitions(count):
    return [{"partition-id": i, "num-partitions": count} for i in range(count)]


def start(settings, answer=message_handler.reply_to, nodes=None, order=list):
    run_config = {**flat(parse_run_config({})), **settings}
    nodes = partitions(3) if nodes is None else nodes
    grid = InProcessGrid(nodes, run_config, answer, order)
    return Federation(parse_run_config(run_config), grid, RUN_ID), grid


def lines_of(federation):
    text = (federation.directory.path / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_a_private_run_leaves_a_whole_run_folder(settings, tmp_path):
    federation, grid = start(settings)
    result = federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    lines = lines_of(federation)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "privacy.json",
        "result.json",
        "peft_1",
        "peft_2",
        "peft_final",
        "report.html",
        "README.md",
    }
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert (tmp_path / "home/runs/latest").resolve() == folder.resolve()
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert privacy["noise_probe"]["before"] == pytest.approx(
        lines[0]["validation_loss"]
    )
    assert [line["server_round"] for line in lines] == [0, 1, 2]
    assert [line["epsilon"] for line in lines][-1] == privacy["epsilon"]
    assert [line["train_loss"] for line in lines] == [None] * 3
    assert [line["client_seconds"] for line in lines] == [None] * 3
    assert lines[1]["clients_asked"] == lines[1]["clients_answered"] == 3
    assert lines[1]["megabytes_up"] > 0
    assert config["run_config"]["model.name"] == settings["model.name"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["test_examples"] == 5
    assert set(grid.pulls) == {1}  # one message id a call


def test_what_a_round_says_can_be_recomputed_from_privacy_json_alone(settings):
    import dp_accounting
    from dp_accounting import pld

    federation, _ = start(settings)
    federation.run()
    told = json.loads((federation.directory.path / "privacy.json").read_text())

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = pld.PLDAccountant(relation)
    event = dp_accounting.GaussianDpEvent(told["noise_multiplier"])
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, told["num_rounds"]))

    assert accountant.get_epsilon(told["delta"]) == pytest.approx(
        told["epsilon"], rel=2e-3
    )


def test_peft_alone_opens_the_final_adapter(settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    federation, _ = start({**settings, **NO_PRIVACY, "train.learning-rate": 5.0})
    federation.run()
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])

    model = PeftModel.from_pretrained(base, federation.directory.path / "peft_final")
    weights = {k: v for k, v in model.state_dict().items() if "lora_B" in k}

    assert max(float(v.abs().max()) for v in weights.values()) > 0


def test_training_without_dp_lowers_the_loss_and_recommends_the_best_round(settings):
    federation, _ = start(
        {**settings, **NO_PRIVACY, "train.local-steps": 6, "train.learning-rate": 5.0}
    )
    result = federation.run()

    lines = lines_of(federation)
    losses = [line["validation_loss"] for line in lines]
    best = int(np.argmin(losses))
    assert min(losses[1:]) < losses[0] - 0.1
    assert result["best_round"] == best > 0
    assert Path(result["recommended"]).name == "peft_best"
    assert result["test_loss_after"] < result["test_loss_before"]
    assert lines[1]["train_loss"] > 0
    told = lines[1]["client_seconds"]
    assert list(told) == ["load", "tokenise", "build", "train", "encode"]
    assert 0 < told["train"] <= lines[1]["seconds"]["train"]
    assert [line["epsilon"] for line in lines] == [None] * 3
    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["epsilon"] is None and told["unit"] == "none"


def test_the_same_seed_gives_the_same_adapter_in_any_order_of_arrival(settings):
    finals = []
    for order in (list, lambda ids: ids[::-1]):
        federation, _ = start({**settings, **NO_PRIVACY}, order=order)
        federation.run()
        finals.append(federation.arrays)

    assert all((finals[0][k] == finals[1][k]).all() for k in finals[0])


def test_with_dp_two_runs_never_make_the_same_adapter(settings):
    finals = []
    for _ in range(2):
        federation, _ = start(settings)
        federation.run()
        finals.append(federation.arrays)

    assert not any((finals[0][k] == finals[1][k]).any() for k in finals[0])


def test_one_client_twice_and_one_round_is_the_trainers_own_adapter(settings, tmp_path):
    # Two nodes that hold the same file and report the same partition: the mean of two
    # equal updates is the update.
    path = settings["data.name"]
    nodes = [{"data-path": path, "partition-id": 5}] * 2
    one_round = {**settings, **NO_PRIVACY, "num-server-rounds": 1}
    federation, grid = start(one_round, nodes=nodes)
    federation.run()

    message = grid.sent[0]
    reply = message_handler.reply_to(message, next(iter(grid.contexts.values())))
    sent = {k: v.numpy() for k, v in reply.content.array_records[ARRAYS].items()}

    for name, value in federation.arrays.items():
        np.testing.assert_allclose(value, sent[name], atol=2e-9)


def fail_with(error):
    def answer(message, context):
        raise error

    return answer


def test_a_run_in_which_all_clients_fail_fails_with_the_cause(settings):
    bad = {**settings, **NO_PRIVACY, "data.name": "/nowhere/rows.jsonl"}
    federation, _ = start(bad)

    with pytest.raises(FederationError, match=r"/nowhere/rows\.jsonl"):
        federation.run()


def test_under_dp_the_cause_is_a_code_and_the_text_stays_with_the_client(
    settings, caplog, tmp_path
):
    caplog.set_level(logging.INFO)
    secret = {**settings, "data.name": f"/nowhere/{MARKER}.jsonl"}
    federation, _ = start(secret)

    with pytest.raises(FederationError, match=r"no-data \(6 times\)"):
        federation.run()

    assert MARKER not in caplog.text
    assert MARKER in (tmp_path / "home/logs/client-0.log").read_text()
    assert "(code no-data); the client failed, and its own log" in caplog.text


def test_nothing_of_a_clients_rows_reaches_the_server(settings, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    nodes = [{"data-path": settings["data.name"]} for _ in range(2)]
    server = {**settings, "data.public-validation": "", "data.public-test": ""}
    federation, grid = start(server, nodes=nodes)
    federation.run()

    files = [p for p in federation.directory.path.rglob("*") if p.is_file()]
    assert len(files) > 8
    assert all(MARKER.encode() not in p.read_bytes() for p in files)
    assert MARKER not in caplog.text
    reply = message_handler.reply_to(grid.sent[0], next(iter(grid.contexts.values())))
    assert set(reply.content) == {ARRAYS}


def test_a_server_without_public_rows_never_loads_the_base(settings, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the base was loaded")

    server = {**settings, "data.public-validation": "", "data.public-test": ""}
    federation, _ = start(server, answer=lambda m, c: None if False else _echo(m))
    monkeypatch.setattr("fedllm.models.loading.load_base", refuse)
    result = federation.run()

    assert result["test_loss_before"] is None
    assert result["recommended"].endswith("peft_final")


def _echo(message):
    """Reply with the global adapter itself: a zero update."""
    arrays = message.content.array_records[ARRAYS]
    return Message(RecordDict({ARRAYS: arrays}), reply_to=message)


def test_a_silent_client_does_not_stop_the_round(settings, caplog):
    caplog.set_level(logging.INFO)

    def answer(message, context):
        if message.metadata.dst_node_id == 101:
            return None
        return message_handler.reply_to(message, context)

    impatient = {**settings, "strategy.round-timeout": 1.0, "num-server-rounds": 1}
    federation, _ = start(impatient, answer)
    federation.run()

    assert lines_of(federation)[1]["clients_answered"] == 2
    assert "1 clients did not answer" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"arrays": ConfigRecord({"x": 1})}),
        RecordDict({"other": ArrayRecord()}),
        error_content("no-such-code", "boo"),
        RecordDict({"error": ConfigRecord({"code": 7})}),
        RecordDict({ARRAYS: array_record({"x": np.full(3, np.nan, np.float32)})}),
    ],
)
def test_a_hostile_reply_does_not_stop_the_round(settings, content):
    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            return Message(content, reply_to=message)
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    line = lines_of(federation)[1]
    assert (line["clients_answered"], line["clients_rejected"]) == (3, 1)


def test_under_dp_a_malformed_reply_sends_nobody_to_the_clients_log(settings, caplog):
    caplog.set_level(logging.INFO)

    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            return Message(RecordDict(), reply_to=message)
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    assert "(code malformed); the server finds so of the reply" in caplog.text
    assert "client-<partition>.log" not in caplog.text


def test_a_reply_that_cannot_be_inflated_counts_as_zero(settings):
    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            raise ValueError("not a record")
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    assert lines_of(federation)[1]["clients_rejected"] == 1
    assert lines_of(federation)[1]["clients_answered"] == 3


def test_destructive_noise_is_refused_where_the_user_says_so(settings, monkeypatch):
    federation, grid = start({**settings, "privacy.on-destructive-noise": "refuse"})
    # The random model's loss cannot rise: stand in for one that knows something.
    losses = iter([3.0, 3.5])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))

    with pytest.raises(PrivacyError, match="more clients"):
        federation.run()

    assert grid.sent == []
    assert lines_of(federation)[-1]["epsilon"] == 0.0


def test_a_model_that_got_worse_is_not_recommended(settings, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    federation, _ = start(settings)
    # The random model's loss moves either way: stand in for one that gets worse.
    losses = iter([3.0, 3.05, 3.2, 3.1])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))
    result = federation.run()

    assert result["recommended"] == "base"
    assert result["test_loss_after"] == result["test_loss_before"]
    assert "no round beat the base" in caplog.text
    assert not (federation.directory.path / "peft_best").exists()


def test_training_stops_before_max_epsilon_and_the_run_ends_well(settings, caplog):
    caplog.set_level(logging.INFO)
    limited = {
        **settings,
        "num-server-rounds": 3,
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 1.0,
        "privacy.max-epsilon": 6.6,
    }
    federation, _ = start(limited)
    result = federation.run()

    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert result["num_rounds"] == told["num_rounds"] == 2
    assert told["epsilon"] <= 6.6
    assert "would pass privacy.max-epsilon 6.6" in caplog.text


def test_an_unprotected_setting_says_what_it_is_worth(settings, caplog):
    caplog.set_level(logging.INFO)
    weak = {
        **settings,
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 0.02,
    }
    federation, _ = start(weak)
    federation.run()

    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["strength"] == "none to speak of"
    assert "no protection to speak of" in caplog.text


def test_poisson_runs_say_nothing_of_who_or_how_many_took_part(settings, caplog):
    caplog.set_level(logging.INFO)
    coins = {
        **settings,
        "num-server-rounds": 3,
        "strategy.sampling": "poisson",
        "strategy.fraction-train": 0.5,
    }
    federation, _ = start(coins, nodes=partitions(6))
    federation.run()

    for line in lines_of(federation)[1:]:
        for key in ("asked", "answered", "rejected"):
            assert line[f"clients_{key}"] is None
        assert line["megabytes_up"] is line["megabytes_down"] is None
        assert line["seconds"]["train"] is line["seconds"]["aggregate"] is None
    assert not re.search(r"client \d+ of", caplog.text)
    assert not re.search(r"round \d/3, .* \d+ s$", caplog.text, re.MULTILINE)
    assert " of 6 clients" not in caplog.text.replace("each of 6 clients", "")
    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["num_sampled_clients"] == 3
    assert told["epsilon"] <= 8 < told["epsilon_replace_one"]


def test_where_cohorts_are_secret_an_unreadable_reply_is_not_told(settings, caplog):
    caplog.set_level(logging.INFO)
    coins = {**settings, "num-server-rounds": 1, "strategy.sampling": "poisson"}
    federation, grid = start(coins)

    def pull_messages(message_ids):
        raise ValueError("hostile bytes")

    grid.pull_messages = pull_messages
    federation.run()

    assert "could not be read" not in caplog.text


def test_an_empty_poisson_cohort_is_a_round_of_noise(settings, monkeypatch):
    from fedllm.privacy.mechanism import SecureGenerator

    monkeypatch.setattr(
        SecureGenerator, "bernoulli", lambda self, q, size: np.zeros(size, bool)
    )
    coins = {**settings, "strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
    federation, grid = start({**coins, "num-server-rounds": 1})
    before = {k: v.copy() for k, v in federation.arrays.items()}
    federation.run()

    assert grid.sent == []
    assert all((federation.arrays[k] != before[k]).all() for k in before)


def test_too_few_clients_are_named_with_the_remedy(settings):
    with pytest.raises(FederationError, match=r"num-supernodes=20"):
        start({**settings, "strategy.num-clients": 20})


def test_no_more_clients_than_were_asked_for_take_part(settings):
    federation, _ = start({**settings, "strategy.num-clients": 3}, nodes=partitions(5))

    assert federation.population == sorted(federation.grid.get_node_ids())[:3]


EVALUATE = {
    **NO_PRIVACY,
    "data.held-out-fraction": 0.4,
    "strategy.fraction-evaluate": 1.0,
}


def test_clients_evaluate_on_their_held_out_rows_without_dp(settings, caplog):
    told = {}

    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if message.metadata.message_type.startswith("evaluate"):
            node = message.metadata.dst_node_id
            told[node] = dict(reply.content.metric_records[METRICS])
        return reply

    with caplog.at_level(logging.INFO):
        federation, _ = start({**settings, **EVALUATE}, answer)
        federation.run()

    before, *_, line = lines_of(federation)
    losses = [m["eval-loss"] for m in told.values()]
    sizes = [m["num-examples"] for m in told.values()]
    assert before["client_loss"] is None
    assert 0 < sum(sizes) < 24
    assert line["client_loss"] == pytest.approx(np.average(losses, weights=sizes))
    assert line["client_loss_best"] == min(losses)
    assert line["client_loss_worst"] == max(losses)
    assert line["clients_evaluated"] == 3
    assert f"worst {max(losses):.3f} of 3)" in caplog.text
    assert "worst client" in (federation.directory.path / "report.html").read_text()


@pytest.mark.parametrize(
    "hostile",
    [
        {"eval-loss": float("nan"), "num-examples": 3},
        {"eval-loss": float("-inf"), "num-examples": 3},
        {"eval-loss": -5.0, "num-examples": 3},
        {"eval-loss": 1e300, "num-examples": 2**62},
        {"eval-loss": [1.0, 2.0], "num-examples": 3},
        {"num-examples": 3},
        {},
        None,
        "error",
        "silent",
    ],
)
def test_a_hostile_evaluation_takes_only_itself_away(settings, hostile):
    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if not message.metadata.message_type.startswith("evaluate"):
            return reply
        if message.metadata.dst_node_id != 100:
            return reply
        if hostile == "silent":
            return None
        content = RecordDict()
        if hostile == "error":
            content = error_content("failed", "no")
        elif hostile is not None:
            content = RecordDict({METRICS: MetricRecord(hostile)})
        forged = Message(content, reply_to=message)
        forged.metadata.__dict__["_src_node_id"] = 101
        return forged

    changes = {"strategy.round-timeout": 2.0} if hostile == "silent" else {}
    federation, _ = start({**settings, **EVALUATE, **changes}, answer)
    federation.run()

    for line in lines_of(federation)[1:]:
        assert line["clients_evaluated"] == 2
        assert line["client_loss_best"] <= line["client_loss"]
        assert line["client_loss"] <= line["client_loss_worst"] < 100


def test_a_client_weighs_no_more_than_the_examples_it_was_asked_to_score(settings):
    def answer(message, context):
        if not message.metadata.message_type.startswith("evaluate"):
            return message_handler.reply_to(message, context)
        liar = message.metadata.dst_node_id == 100
        count, loss = (2**31, 900.0) if liar else (4, 2.0)
        metrics = MetricRecord({"num-examples": count, "eval-loss": loss})
        return Message(RecordDict({METRICS: metrics}), reply_to=message)

    federation, _ = start(
        {**settings, **EVALUATE, "strategy.evaluate-examples": 4}, answer
    )
    federation.run()

    line = lines_of(federation)[1]
    assert line["client_loss"] == pytest.approx((900 + 2 + 2) / 3)
    assert (line["client_loss_best"], line["client_loss_worst"]) == (2.0, 900.0)


def test_only_due_and_best_rounds_are_kept(settings):
    federation, _ = start(
        {**settings, **NO_PRIVACY, "num-server-rounds": 5, "output.save-every": 2}
    )
    result = federation.run()

    kept = {p.name for p in federation.directory.path.glob("peft_[0-9]*")}
    wanted = {"peft_2", "peft_4", "peft_5"}
    if result["best_round"]:
        wanted.add(f"peft_{result['best_round']}")
    assert wanted <= kept | {"peft_best"}
    assert "peft_1" not in kept or result["best_round"] >= 1


@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_a_run_with_peft_s_own_kinds_leaves_adapters_that_evaluate(
    settings, tiny_llama, kind
):
    federation, _ = start({**settings, "adapter.kind": kind})
    federation.run()

    folder = federation.directory.path
    told = json.loads((folder / "peft_final/adapter_config.json").read_text())
    card = (folder / "README.md").read_text()
    assert told["peft_type"].lower() == kind
    assert f"An adapter of kind {kind}" in card
    assert f"differential-privacy, {kind}]" in card
    lines = lines_of(federation)
    assert lines[1]["clients_rejected"] == 0
    assert lines[2]["validation_loss"] is not None


def test_auto_is_resolved_before_round_1_said_and_the_same_on_every_client(
    settings, monkeypatch, caplog
):
    def choose(config, population_size):
        assert population_size == 3
        return Choice("lora-core", "because of a test")

    monkeypatch.setattr("fedllm.server.federation.choose_adapter", choose)
    quiet = EVALUATE
    with caplog.at_level(logging.INFO):
        federation, grid = start({**settings, "adapter.kind": "auto", **quiet})
        federation.run()

    folder = federation.directory.path
    config = json.loads((folder / "config.json").read_text())
    origin = json.loads((folder / "peft_final/fedllm.json").read_text())
    lines = [line for line in caplog.messages if "adapter.kind" in line]
    assert lines == ["adapter.kind auto: lora-core; because of a test"]
    assert config["run_config"]["adapter.kind"] == "lora-core"
    assert origin["adapter"]["kind"] == "lora-core"
    assert [line["clients_rejected"] for line in lines_of(federation)] == [0, 0, 0]
    assert lines_of(federation)[2]["client_loss"] is not None
    assert {m.content["config"]["adapter-kind"] for m in grid.sent} == {"lora-core"}


def test_auto_without_evidence_takes_the_default_and_trains(settings, caplog):
    with caplog.at_level(logging.INFO):
        noisy = {"adapter.kind": "auto", "privacy.target-epsilon": 1.0}
        federation, _ = start({**settings, **noisy})
        federation.run()

    assert federation.spec.kind == "ffa-lora"
    assert "nothing was measured near 3 clients" in caplog.text


def test_a_wrong_adapter_is_refused_before_anybody_is_waited_for(settings, monkeypatch):
    def wait(*args):
        raise AssertionError("waited")

    monkeypatch.setattr("fedllm.server.federation.wait_for_clients", wait)
    with pytest.raises(AdapterError, match="adapter.target-modules"):
        start({**settings, "adapter.target-modules": "nonsense"})


RECORD = {"privacy.unit": "record", "train.batch-size": 2}


def test_a_record_level_run_says_what_its_worst_and_median_client_spent(
    settings, caplog
):
    caplog.set_level(logging.INFO)
    federation, _ = start({**settings, **RECORD})
    federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    lines = lines_of(federation)
    assert privacy["unit"] == "record"
    assert privacy["neighbouring_relation"] == "add-or-remove one record"
    assert 7.9 < privacy["epsilon_median"] <= privacy["epsilon"] <= 8.0
    assert privacy["num_rounds"] == 2 and privacy["num_clients_reported"] == 3
    assert any("cannot check" in line for line in privacy["not_covered"])
    assert [line["epsilon"] for line in lines][-1] == privacy["epsilon"]
    assert 0 < lines[1]["epsilon"] < lines[2]["epsilon"]
    assert [line["train_loss"] for line in lines] == [None] * 3
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert "each client calibrates its own noise" in caplog.text
    assert "for the worst client" in caplog.text
    assert not list((folder / "logs").glob("*"))


def test_every_key_of_a_client_level_privacy_json_is_in_that_of_records(settings):
    client_level, _ = start(settings)
    record_level, _ = start({**settings, **RECORD})

    one, two = (
        json.loads((f.directory.path / "privacy.json").read_text())
        for f in (client_level, record_level)
    )

    assert set(one) <= set(two)
    assert two["epsilon"] is None and "not known" in two["statement"]


def test_a_killed_record_level_run_still_says_what_its_rounds_cost(
    settings, monkeypatch
):
    federation, _ = start({**settings, **RECORD})
    monkeypatch.setattr(
        federation,
        "_evaluate_clients",
        lambda r: (_ for _ in ()).throw(KeyboardInterrupt),
    )

    with pytest.raises(KeyboardInterrupt):
        federation.run()

    privacy = json.loads((federation.directory.path / "privacy.json").read_text())
    assert privacy["releases"] == [1]
    assert 0 < privacy["epsilon"] < 8.0


def test_a_record_level_run_stops_where_every_client_has_spent_its_budget(
    settings, caplog
):
    caplog.set_level(logging.INFO)
    told = {**settings, **RECORD, "num-server-rounds": 5}

    def answer(message, context):
        # Each takes part in one round of a plan for one.
        context.run_config = {**context.run_config, "num-server-rounds": 1}
        return message_handler.reply_to(message, context)

    federation, _ = start(told, answer)
    federation.run()

    assert federation.last_round == 2
    assert "every client has spent its budget" in caplog.text
    assert lines_of(federation)[-1]["clients_rejected"] == 3


def test_under_record_every_client_counts_once_whatever_it_claims(settings):
    def answers(claim):
        def answer(message, context):
            arrays = message.content.array_records[ARRAYS].to_numpy_ndarrays()
            names = list(message.content.array_records[ARRAYS])
            first = message.metadata.dst_node_id == 100
            moved = {
                n: a + (1.0 if first else 0.0)
                for n, a in zip(names, arrays, strict=True)
            }
            metrics = {"epsilon": 1.0, "train-loss": 5.0}
            metrics["num-examples"] = claim if first else 1
            content = RecordDict({ARRAYS: array_record(moved)})
            content[METRICS] = MetricRecord(metrics)
            return Message(content, reply_to=message)

        federation, _ = start({**settings, **RECORD, "num-server-rounds": 1}, answer)
        federation.run()
        assert federation.strategy.round.train_loss is None
        return federation.arrays

    modest, boastful = answers(1), answers(1000)

    for name in modest:
        np.testing.assert_array_equal(modest[name], boastful[name])
        assert float(np.abs(modest[name]).max()) > 0.1


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), -1.0, 3, None])
def test_an_update_whose_epsilon_is_not_a_number_makes_the_runs_unknown(
    settings, claim
):
    def answer(message, context):
        content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
        if claim is not None:
            content[METRICS] = MetricRecord({"epsilon": claim})
        return Message(content, reply_to=message)

    federation, _ = start({**settings, **RECORD, "num-server-rounds": 1}, answer)
    federation.run()

    privacy = json.loads((federation.directory.path / "privacy.json").read_text())
    assert privacy["epsilon"] is None
    assert "not bounded" in privacy["statement"]
    assert privacy["strength"] == "none to speak of"
