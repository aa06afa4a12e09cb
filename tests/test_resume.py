"""A run that is cut off anywhere, and what goes on from it."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import Message, MetricRecord, RecordDict

from fedllm import atomic_files
from fedllm.client import cache, message_handler
from fedllm.config import flat, parse_run_config
from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.runs import directory
from fedllm.runs.checkpoint import CHECKPOINT_FILE
from fedllm.server.federation import Federation
from fedllm.wire.messages import ARRAYS, METRICS, array_record, error_content
from tests.in_process_grid import InProcessGrid
from tests.test_federation import NO_PRIVACY, lines_of, partitions, settings

__all__ = ["settings"]

ROUNDS = 3


class Killed(BaseException):
    """Stands for kill -9: no handler of errors takes it."""


def kill(*args: Any) -> Any:
    raise Killed


def learner(message: Message, context: Any) -> Message:
    """A client whose update depends on the round, the adapter and its partition."""
    arrays = message.content.array_records[ARRAYS]
    server_round = int(message.content.config_records["config"]["server-round"])
    partition = context.node_config["partition-id"]
    generator = np.random.default_rng([server_round, partition])
    moved = {
        name: value.numpy() * 0.9
        + generator.normal(0, 0.01, value.numpy().shape).astype(np.float32)
        for name, value in arrays.items()
    }
    content = RecordDict({ARRAYS: array_record(moved)})
    content[METRICS] = MetricRecord({"num-examples": 3 + partition, "train-loss": 1.0})
    return Message(content, reply_to=message)


@pytest.fixture
def quick(settings, monkeypatch):
    """Settings of a run of milliseconds: clients that add noise, and a made-up loss."""

    def loss(self: PublicRows, arrays: Any) -> float:
        total = sum(float(np.abs(value).sum()) for value in arrays.values())
        # Best in the middle of the run: what came later must not count after a crash.
        return abs(total % 7 - 3.5) + 1.0

    monkeypatch.setattr(PublicRows, "validation_loss", loss)
    monkeypatch.setattr(PublicRows, "test_loss", lambda self, arrays: None)
    # The page is drawn from the other files, and a run that lacks it has lost nothing.
    monkeypatch.setattr("fedllm.reporting.monitor.write_report", lambda folder: None)
    return {
        **settings,
        "num-server-rounds": ROUNDS,
        "strategy.server-optimizer": "adam",
        "strategy.server-learning-rate": 0.05,
        "strategy.server-learning-rate-min": 0.01,
        "train.learning-rate-min": 0.5,
    }


def federation(
    given: dict[str, Any],
    answer: Callable[..., Any] = learner,
    first_node: int = 100,
    run_id: int = 7,
    num_clients: int = 3,
) -> Federation:
    run_config = {**flat(parse_run_config({})), **given}
    grid = InProcessGrid(partitions(num_clients), run_config, answer)
    contexts = list(grid.contexts.values())
    grid.contexts = {first_node + index: c for index, c in enumerate(contexts)}
    for context in contexts:
        context.run_id = run_id
    return Federation(parse_run_config(run_config), grid, run_id)


def resumed(where: str = "latest", **more: Any) -> Federation:
    """The run as `flwr run . --run-config 'resume.from="latest"'` goes on with it."""
    return federation({"resume.from": where}, run_id=8, **more)


def read(run: Federation, name: str) -> Any:
    return json.loads((run.directory.path / name).read_text())


def kept(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves but times, by file and name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("peft_*/adapter_model.safetensors")):
        for name, value in safetensors.numpy.load_file(path).items():
            found[f"{path.parent.name} {name}"] = value.tobytes()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    untimed = {"seconds": None, "client_seconds": None}
    found["lines"] = [{**json.loads(line), **untimed} for line in lines]
    result = json.loads((folder / "result.json").read_text())
    found["result"] = {**result, "recommended": Path(result["recommended"]).name}
    return found


class Crashes:
    """Kills the run at the k-th write, before it or in the middle of it.

    Every way in which the server changes a disk is counted: k = 0 counts only.
    """

    def __init__(self, patch: pytest.MonkeyPatch, k: int = 0) -> None:
        self.count = 0
        self.k = k
        for owner, name in (
            (atomic_files, "write_synced"),
            (atomic_files, "sync_folder"),
            (Path, "replace"),
            (directory, "save_adapter"),
            (directory.shutil, "rmtree"),
            (directory.shutil, "copytree"),
            (directory.os, "fsync"),
            (Path, "write_text"),
        ):
            patch.setattr(owner, name, self.counted(name, getattr(owner, name)))

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.k:
                raise Killed(f"before {name}")
            self.count += 1
            if self.count == self.k:
                self.half(name, args)
                raise Killed(f"in the middle of {name}")
            return call(*args, **kwargs)

        return counting

    @staticmethod
    def half(name: str, args: tuple[Any, ...]) -> None:
        """Leave on the disk what a kill in the middle of a call would."""
        if name == "write_synced":
            args[0].write_bytes(args[1][: len(args[1]) // 2])
        elif name == "write_text":
            args[0].write_bytes(args[1].encode()[: len(args[1]) // 2])
        elif name == "copytree":
            args[1].mkdir()
            (args[1] / "adapter_config.json").write_bytes(b"{")
        elif name == "save_adapter":
            args[0].mkdir(exist_ok=True)
            (args[0] / "adapter_model.safetensors").write_bytes(b"half")
        elif name == "rmtree" and args[0].exists():
            for path in list(args[0].iterdir())[:1]:
                path.unlink()
        elif name == "fsync":
            with contextlib.suppress(OSError):
                os.ftruncate(args[0], max(0, os.fstat(args[0]).st_size - 9))


@contextlib.contextmanager
def crashes(k: int = 0) -> Iterator[Crashes]:
    with pytest.MonkeyPatch.context() as patch:
        yield Crashes(patch, k)


def num_writes(given: dict[str, Any]) -> int:
    """Count the writes of a run's whole life after its start."""
    run = federation(given)
    with crashes() as counter:
        run.run()
    return counter.count


def crash_at(given: dict[str, Any], k: int) -> Federation:
    run = federation(given)
    with crashes(k), pytest.raises(Killed):
        run.run()
    return run


def test_without_privacy_a_run_killed_at_any_write_ends_as_if_it_had_not_been(quick):
    given = {**quick, **NO_PRIVACY}
    whole = federation(given)
    whole.run()
    expected = kept(whole.directory.path)
    resumable = 0

    for k in range(1, num_writes(given) + 1):
        cut = crash_at(given, k)
        folder = cut.directory.path
        if not (folder / CHECKPOINT_FILE).exists():
            with pytest.raises(FederationError, match="nothing spent"):
                resumed()
            continue
        if not (folder / "result.json").exists():
            resumed(first_node=200 + 10 * k).run()
            resumable += 1
        assert kept(folder) == expected, k
        shutil.rmtree(folder)

    assert resumable > 60


def test_with_dp_a_run_killed_at_any_write_never_gets_epsilon_back(quick):
    given = {**quick, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    given["num-server-rounds"] = 2
    lost_once = 0

    for k in range(1, num_writes(given) + 1):
        cut = crash_at(given, k)
        folder = cut.directory.path
        if not (folder / CHECKPOINT_FILE).exists():
            assert read(cut, "privacy.json")["releases"] == []
            continue
        paid = read(cut, "privacy.json")["releases"]
        done = _finished_rounds(folder)
        if not (folder / "result.json").exists():
            run = resumed(first_node=200 + 10 * k)
            assert run.next_round == max([0, *paid]) + 1
            run.run()
        told = read(cut, "privacy.json")
        trained = [line["server_round"] for line in lines_of(cut)]
        assert told["releases"] == [1, 2], k
        assert told["epsilon"] == pytest.approx(gaussian_epsilon(1.0, 2, told["delta"]))
        lost = set(paid) - set(done)
        assert trained == [r for r in range(3) if r not in lost], k
        lost_once += len(lost)
        shutil.rmtree(folder)

    assert lost_once > 20


def _finished_rounds(folder: Path) -> list[int]:
    with safetensors.safe_open(folder / CHECKPOINT_FILE, "np") as file:
        last = json.loads(file.metadata()["fedllm"])["server_round"]
    return list(range(1, last + 1))


def cut_in_round(given: dict[str, Any], server_round: int, **more: Any) -> Federation:
    """A run that was killed while it waited for the clients of a round."""

    def answer(message: Message, context: Any) -> Message:
        config = message.content.config_records["config"]
        if config["server-round"] == server_round:
            raise Killed
        return more.get("answer", learner)(message, context)

    run = federation(given, answer, **{k: more[k] for k in more if k != "answer"})
    with pytest.raises(Killed):
        run.run()
    return run


def test_real_clients_take_a_resumed_run_s_settings_from_the_server(settings):
    given = {
        **settings,
        **NO_PRIVACY,
        **{"train.local-steps": 3, "train.learning-rate": 2.0},
        **{"num-server-rounds": 3, "strategy.server-optimizer": "momentum"},
    }
    whole = federation(given, message_handler.reply_to)
    whole.run()
    expected = kept(whole.directory.path)

    cut = cut_in_round(given, 2, answer=message_handler.reply_to)
    cache._resident.clear()
    resumed(answer=message_handler.reply_to, first_node=500).run()

    assert kept(cut.directory.path) == expected
    assert lines_of(cut)[3]["clients_rejected"] == 0


def test_record_level_clients_go_on_with_the_plan_and_the_ledger_of_the_run(settings):
    given = {**settings, "privacy.unit": "record", "train.batch-size": 2}
    given["num-server-rounds"] = 3
    cut = cut_in_round(given, 3, answer=message_handler.reply_to)
    before = read(cut, "privacy.json")
    resumed(answer=message_handler.reply_to, first_node=500).run()

    told = read(cut, "privacy.json")
    assert before["releases"] == [1, 2]
    assert told["releases"] == [1, 2, 3]
    assert told["num_clients_reported"] == 3
    # Three rounds of a plan for three: a plan made anew would have spent less.
    assert before["epsilon"] < 7.0 < 7.9 < told["epsilon"] <= 8.0


def test_a_resumed_run_never_reports_less_than_its_clients_claimed_before(settings):
    def claims(epsilon: float) -> Callable[..., Any]:
        def answer(message: Message, context: Any) -> Message:
            content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
            partition = context.node_config["partition-id"]
            content[METRICS] = MetricRecord({"epsilon": epsilon + partition})
            return Message(content, reply_to=message)

        return answer

    given = {**settings, "privacy.unit": "record", "num-server-rounds": 3}
    cut = cut_in_round(given, 3, answer=claims(4.0))
    assert read(cut, "privacy.json")["epsilon"] == 6.0
    run = resumed(answer=claims(1.0), first_node=500)
    assert (run.records.worst, run.records.median) == (6.0, 5.0)
    run.run()

    told = read(cut, "privacy.json")
    assert told["epsilon"] == 6.0
    assert told["epsilon_median"] == 2.0
    assert told["num_clients_reported"] == 3


def test_a_client_that_comes_back_under_another_id_is_one_client(settings):
    def answer(message: Message, context: Any) -> Message:
        if message.metadata.dst_node_id == 102:
            run.grid.contexts[900] = run.grid.contexts.pop(102)
        content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
        partition = context.node_config["partition-id"]
        content[METRICS] = MetricRecord({"epsilon": 1.0 + partition})
        return Message(content, reply_to=message)

    run = federation({**settings, "privacy.unit": "record"}, answer)
    run.run()

    told = read(run, "privacy.json")
    assert told["num_clients_reported"] == 3
    assert (told["epsilon"], told["epsilon_median"]) == (3.0, 2.0)


def test_the_learning_rates_and_moments_of_a_resumed_run_are_those_of_its_round(quick):
    cut = cut_in_round({**quick, **NO_PRIVACY}, 3)
    run = resumed(first_node=300)

    assert run.next_round == 3
    # Two steps of Adam were made; a fresh one would start from zero.
    assert float(np.abs(run._averaging.optimizer.second).max()) > 0
    run.run()
    assert lines_of(cut)[3]["learning_rate"] == pytest.approx(0.5)


def test_noise_after_a_crash_is_fresh(quick):
    def zeros(message: Message, context: Any) -> Message:
        arrays = message.content.array_records[ARRAYS]
        return Message(RecordDict({ARRAYS: arrays}), reply_to=message)

    cut = cut_in_round({**quick, "strategy.server-optimizer": "none"}, 2, answer=zeros)
    folder, copies = cut.directory.path, []
    for name in ("one", "two"):
        copy = folder.with_name(name)
        shutil.copytree(folder, copy)
        run = resumed(str(copy), answer=zeros)
        run.run()
        copies.append(run.arrays)

    assert not any((copies[0][k] == copies[1][k]).any() for k in copies[0])


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


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            {"privacy.target-epsilon": 4.0},
            "privacy.target-epsilon was 6.0 and is now 4.0",
        ),
        ({"model.name": "other/model"}, "and is now 'other/model'"),
        ({"adapter.kind": "lora"}, "adapter.kind was 'ffa-lora' and is now 'lora'"),
        ({"num-server-rounds": 9}, "num-server-rounds was 3 and is now 9"),
    ],
)
def test_other_settings_than_the_run_s_are_refused_with_both_values(quick, typed, said):
    given = {**quick, "privacy.target-epsilon": 6.0}
    cut_in_round(given, 2)

    with pytest.raises(ConfigError, match=said):
        federation({"resume.from": "latest", **typed})
    federation({"resume.from": "latest", **given}).run()


def test_another_base_model_under_the_same_name_is_refused(quick, tiny_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    cut_in_round({**quick, "model.name": str(base)}, 2)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)

    with pytest.raises(ConfigError, match="another base model.* was .* and is now"):
        resumed()


def test_another_adapter_than_the_checkpoint_s_is_refused(quick):
    cut = cut_in_round(quick, 2)
    edit(cut, "config.json", lambda c: c["run_config"].update({"adapter.rank": 2}))

    with pytest.raises(ConfigError, match="another adapter: rank was 4 and is now 2"):
        resumed()


def edit(run: Federation, name: str, change: Callable[[Any], Any]) -> None:
    path = run.directory.path / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_multiplier": 9.0}, "edited: epsilon is"),
        ({"releases": [1]}, "edited: num_rounds is 2"),
        ({"run": "of-another-run"}, "is of the run 'of-another-run'"),
        (
            {"clipping_norm": 9.0},
            "privacy settings have changed: clipping_norm was 9.0 and is now 0.6",
        ),
    ],
)
def test_a_ledger_that_was_tampered_with_stops_the_run(quick, change, said):
    cut = cut_in_round(quick, 3)
    edit(cut, "privacy.json", lambda content: content.update(change))

    with pytest.raises(PrivacyError, match=said):
        resumed()


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_run_that_began_with_privacy_never_goes_on_without(quick, unit):
    cut = cut_in_round({**quick, "privacy.unit": unit}, 2)
    edit(cut, "config.json", lambda content: content["run_config"].update(NO_PRIVACY))

    with pytest.raises(ConfigError, match=f"unit was '{unit}' and is now 'none'"):
        resumed()


@pytest.mark.parametrize("unit", ["client", "record"])
def test_an_older_copy_of_the_ledger_is_refused(quick, unit):
    given = {**quick, "privacy.unit": unit}
    early = cut_in_round(given, 2)
    old = (early.directory.path / "privacy.json").read_text()
    late = cut_in_round(given, 3)
    name = late.directory.path.name
    old = json.dumps({**json.loads(old), "run": name})
    (late.directory.path / "privacy.json").write_text(old)

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


def test_what_is_no_run_to_go_on_with_is_refused(quick, tmp_path):
    with pytest.raises(FederationError, match="latest is not a run folder"):
        resumed()
    with pytest.raises(FederationError, match="is not a run folder"):
        resumed(str(tmp_path))
    with pytest.raises(ConfigError, match="absolute path"):
        resumed("runs/mine")
    federation(quick).run()
    with pytest.raises(FederationError, match=r"is finished: result\.json is there"):
        resumed()


def test_two_runs_never_write_one_folder(quick):
    cut_in_round(quick, 2)
    first = resumed()

    with pytest.raises(FederationError, match="another run is at work"):
        resumed()
    first.run()


def test_a_population_of_another_size_is_refused_and_other_ids_are_not(quick):
    cut_in_round(quick, 2)
    with pytest.raises(FederationError, match="3 clients are asked for, but 2"):
        resumed(num_clients=2)

    # A fourth client takes nobody's place.
    run = resumed(num_clients=4, first_node=101)
    assert run.population == [103, 101, 102]


def test_where_every_round_was_paid_for_and_lost_nothing_is_claimed(quick, monkeypatch):
    given = {**quick, "num-server-rounds": 1}
    run = federation(given)
    monkeypatch.setattr(run, "_save_adapter", kill)
    with pytest.raises(Killed):
        run.run()

    with pytest.raises(FederationError, match="every round was paid for and lost"):
        resumed()
    assert read(run, "privacy.json")["releases"] == [1]


def test_what_was_lost_is_said(quick, caplog, monkeypatch):
    caplog.set_level("INFO")
    run = federation(quick)
    monkeypatch.setattr(run, "_validate", lambda r: kill() if r == 2 else 1.0)
    with pytest.raises(Killed):
        run.run()
    resumed()

    assert "1 round(s) were paid for and lost (2)" in caplog.text
    assert "resumed after round 1; next is round 3 of 3" in caplog.text


def test_latest_follows_the_run_that_goes_on(quick, tmp_path):
    cut = cut_in_round(quick, 2)
    federation(quick).run()
    resumed(str(cut.directory.path)).run()

    assert (tmp_path / "home/runs/latest").resolve() == cut.directory.path.resolve()
