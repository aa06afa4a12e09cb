"""A sealed round yields its whole sum or nothing, even if a party drops out or cheats."""

import json

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedllm.client import message_handler
from fedllm.errors import FederationError, PrivacyError
from fedllm.privacy.accounting import gaussian_epsilons
from fedllm.privacy.pads import integers_of, residues
from fedllm.privacy.sealed_sum import sealed_grid
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, array_record, error_content, short_name
from fedllm.wire.sealed_messages import (
    PACKETS,
    SEALED,
    TALLY,
    read_residues,
    sealed_content,
)
from tests.helpers.sealed import SIZE, C, Z, sealed, silent

__all__ = ["sealed", "silent"]


def is_tally(message):
    return message.metadata.message_type == TALLY


def is_train(message):
    return message.metadata.message_type == "train"


def number(context):
    return context.node_config["partition-id"]


def sealed_by(reply):
    """A client's reply as the server reads it: padded bytes and packets."""
    return reply.content.config_records[SEALED][PACKETS]


@pytest.mark.parametrize("post_quantum", [False, True])
def test_what_is_opened_is_the_mean_of_the_clipped_updates(
    sealed, silent, post_quantum
):
    federation = sealed(**{"privacy.post-quantum": post_quantum})
    # The last is ten times the clipping norm, and the third sends nothing.
    federation.updates = {0: 0.02, 1: -0.01, 2: 0.0, 3: 10 * C}
    federation.begin()

    moved = federation.round()

    whole = 0.02 - 0.01 + C / np.sqrt(SIZE)
    assert moved == pytest.approx(np.full(SIZE, whole / 4), abs=5e-6)
    assert federation.strategy.round.usable == 4


def test_values_keep_their_places(sealed, silent):
    federation = sealed()
    update = np.arange(SIZE) / 1000
    federation.updates = {i: update for i in range(4)}
    federation.begin()

    assert federation.round() == pytest.approx(update, abs=5e-6)


def test_the_released_sum_has_the_noise_of_all_trustees(sealed):
    federation = sealed(**{"num-server-rounds": 40})
    federation.updates = dict.fromkeys(range(4), 0.0)
    federation.begin()

    moved = np.concatenate([federation.round(r) for r in range(1, 41)])

    # 400 values, four standard deviations: without one trustee's noise it is 18 % less.
    expected = Z * np.sqrt(3 / 2) * C / 4
    assert moved.std() / expected == pytest.approx(1, abs=0.14)


def test_the_probes_noise_is_that_of_a_round(sealed):
    strategy = sealed().begin()

    noise = np.concatenate([strategy.noised_update([]) for _ in range(400)])

    expected = Z * np.sqrt(3 / 2) * C / 4
    assert noise.std() / expected == pytest.approx(1, abs=0.05)


def test_a_round_costs_a_message_a_client_and_a_message_a_trustee(sealed):
    federation = sealed()
    federation.begin()
    federation.grid.sent.clear()

    federation.round()

    kinds = [message.metadata.message_type for message in federation.grid.sent]
    assert sorted(kinds) == [TALLY] * 3 + ["train"] * 4


def test_clients_that_vanish_count_as_zero_and_n_stays(sealed, silent):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()

    def answer(message, context):
        if is_train(message) and number(context) in (1, 3):
            return None
        return message_handler.reply_to(message, context)

    federation.answer = answer

    assert federation.round() == pytest.approx(np.full(SIZE, 0.02 * 2 / 4), abs=5e-6)


def test_a_client_has_nothing_to_do_after_its_reply(sealed, silent):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()

    def answer(message, context):
        if is_tally(message):
            # The only client that is no trustee is gone by now.
            federation.grid.contexts.pop(103, None)
        return message_handler.reply_to(message, context)

    federation.answer = answer

    assert federation.round() == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)


def test_a_failed_training_is_an_update_of_zero_like_any_other(sealed, silent):
    federation = sealed()
    federation.updates = {
        0: 0.02,
        1: ValueError("no rows"),
        2: MemoryError(),
        3: np.full(SIZE, np.nan),
    }
    federation.begin()

    moved = federation.round()

    assert moved == pytest.approx(np.full(SIZE, 0.02 / 4), abs=5e-6)
    assert federation.strategy.round.rejected == []
    # Nothing but its values, under three pads, tells one reply from another.
    shapes = [
        (sorted(r.content), len(sealed_by(r)), {len(p) for p in sealed_by(r)})
        for r in federation.replies
    ]
    assert shapes == [shapes[0]] * 4


def test_a_trustee_that_is_absent_is_done_without_if_it_may(sealed, silent):
    federation = sealed(**{"privacy.least-trustees": 2})
    federation.updates = dict.fromkeys(range(4), 0.02)
    del federation.nodes[1]["trustee-name"], federation.nodes[1]["trustee-key"]
    federation.context(1).node_config = federation.nodes[1]

    strategy = federation.begin()

    assert [c.name for _, c in strategy.roster.present] == ["a", "c"]
    assert strategy.ledger.settings.trustees == 2
    assert federation.round() == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)


def test_too_few_trustees_begin_no_run(sealed):
    federation = sealed()
    federation.answer = lambda message, context: (
        None if number(context) == 1 else message_handler.reply_to(message, context)
    )

    with pytest.raises(FederationError, match="2 answered \\(absent: b\\)"):
        federation.begin()


def test_two_nodes_of_one_name_begin_no_run(sealed):
    federation = sealed()
    for key in ("trustee-name", "trustee-key"):
        federation.context(3).node_config[key] = federation.nodes[0][key]

    with pytest.raises(FederationError, match="both trustee 'a'"):
        federation.begin()


def test_a_trustee_that_vanishes_costs_the_round_and_the_next_is_without_it(
    sealed, silent
):
    federation = sealed(**{"privacy.least-trustees": 2})
    federation.updates = dict.fromkeys(range(4), 0.02)
    strategy = federation.begin()
    federation.answer = lambda message, context: (
        None
        if is_tally(message) and number(context) == 2
        else message_handler.reply_to(message, context)
    )

    assert federation.round(1) is None
    assert strategy.ledger.releases == [1]
    assert [code for _, code, _ in strategy.round.rejected] == ["not-opened"] * 4
    assert federation.round(2) == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)
    assert [c.name for _, c in strategy.roster.present] == ["a", "b"]


def test_no_round_begins_with_too_few_trustees_left(sealed):
    federation = sealed()
    federation.begin()
    federation.answer = lambda message, context: (
        None
        if is_tally(message) and number(context) == 2
        else message_handler.reply_to(message, context)
    )
    assert federation.round(1) is None

    with pytest.raises(FederationError, match="2 are left"):
        federation.round(2)
    assert federation.strategy.ledger.releases == [1]


def test_a_round_that_was_asked_for_is_spent_and_not_asked_for_again(sealed):
    federation = sealed()
    federation.begin()
    arrays = array_record(federation.strategy.averaging.reference)
    list(
        federation.strategy.configure_train(1, arrays, ConfigRecord(), federation.grid)
    )

    # The server was killed here, and resumes.
    strategy = federation.begin()

    assert strategy.ledger.releases == [1]
    with pytest.raises(PrivacyError, match="released already"):
        strategy.configure_train(1, arrays, ConfigRecord(), federation.grid)
    assert federation.round(2) is not None


def test_a_client_whose_packets_do_not_open_costs_a_round_and_is_left_out(
    sealed, silent, caplog
):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()

    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if is_train(message) and number(context) == 3:
            packets = sealed_by(reply)
            packets[1] = packets[1][:-1] + bytes([packets[1][-1] ^ 1])
            reply.content.config_records[SEALED][PACKETS] = packets
        return reply

    federation.answer = answer

    assert federation.round(1) is None
    assert f"trustee b cannot open what node {short_name(103)} sent" in caplog.text
    moved = federation.round(2)
    assert moved == pytest.approx(np.full(SIZE, 0.02 * 3 / 4), abs=5e-6)
    assert federation.strategy.round.rejected == [(103, "malformed", "")]


def test_a_client_that_sends_another_s_packets_is_left_out_and_the_round_opens(
    sealed, silent
):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()
    packets = []

    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if is_train(message) and number(context) == 0:
            packets.extend(sealed_by(reply))
        if is_train(message) and number(context) == 3:
            reply.content.config_records[SEALED][PACKETS] = packets
        return reply

    federation.answer = answer

    moved = federation.round(1)

    assert moved == pytest.approx(np.full(SIZE, 0.02 * 3 / 4), abs=5e-6)
    assert federation.strategy.round.rejected == [(103, "malformed", "")]


@pytest.mark.parametrize(
    "content",
    [
        lambda: error_content("failed", None),
        lambda: masked(RecordDict()),
        lambda: masked(sealed_content(np.zeros(SIZE - 1, np.uint32), [b"x" * 80] * 3)),
        lambda: masked(sealed_content(np.zeros(SIZE, np.uint32), [b"x" * 80] * 2)),
        lambda: masked(sealed_content(np.zeros(SIZE, np.uint32), [b"x" * 79] * 3)),
        lambda: masked(sealed_content(np.zeros(SIZE, np.uint32), [b"x" * 80] * 3)),
        lambda: masked(
            RecordDict(
                {
                    ARRAYS: array_record({SEALED: np.zeros(4 * SIZE, np.uint8)}),
                    SEALED: ConfigRecord({PACKETS: "x"}),
                }
            )
        ),
        lambda: masked(RecordDict({ARRAYS: ArrayRecord()})),
    ],
)
def test_a_reply_of_another_form_counts_as_zero(sealed, silent, content):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()

    def answer(message, context):
        if is_train(message) and number(context) == 3:
            return Message(content(), reply_to=message)
        return message_handler.reply_to(message, context)

    federation.answer = answer
    moved = federation.round(1)

    if moved is None:  # three equal packets of the right size: they do not open
        moved = federation.round(2)
    assert moved == pytest.approx(np.full(SIZE, 0.02 * 3 / 4), abs=5e-6)


def test_a_client_that_is_not_clipped_is_seen_in_the_sums_length(sealed, monkeypatch):
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.0)
    federation.begin()
    from fedllm.client import sealing

    encoded = sealing._encoded

    def cheat(trained, received, grid, settings):
        integers = encoded(trained, received, grid, settings)
        integers[0] += 200 * grid.sensitivity
        return integers

    monkeypatch.setattr(sealing, "_encoded", cheat)

    assert federation.round() is None


@pytest.mark.parametrize(
    "content",
    [
        lambda: error_content("failed", None),
        lambda: masked(RecordDict()),
        lambda: masked(
            RecordDict({ARRAYS: array_record({SEALED: np.zeros(3, np.uint8)})})
        ),
        lambda: masked(RecordDict({SEALED: ConfigRecord({"unopened": [99, -1]})})),
    ],
)
def test_a_trustees_answer_of_another_form_loses_the_round(sealed, content):
    federation = sealed()
    federation.begin()
    federation.answer = lambda message, context: (
        Message(content(), reply_to=message)
        if is_tally(message) and number(context) == 0
        else message_handler.reply_to(message, context)
    )

    assert federation.round() is None
    assert len(federation.strategy.roster.present) == 2


def test_the_ledger_has_both_epsilons_and_says_against_whom(sealed):
    federation = sealed()
    strategy = federation.begin()
    federation.round(1)
    federation.round(2)

    privacy = json.loads((federation.folder / "privacy.json").read_text())
    server = gaussian_epsilons(2 / Z**2, 1e-5).zero_out
    adapters = gaussian_epsilons(2 / (Z**2 * 3 / 2), 1e-5).zero_out
    assert privacy["epsilon"] == pytest.approx(server, rel=1e-6)
    assert privacy["epsilon_adapters"] == pytest.approx(adapters, rel=1e-6)
    assert (privacy["trustees"], privacy["colluding"]) == (3, 1)
    assert "at most 1 of the 3 trustees" in privacy["statement"]
    assert "is trusted" not in privacy["statement"]
    assert not any("before it is clipped" in text for text in privacy["not_covered"])
    assert any("put back to an older" in text for text in privacy["not_covered"])
    assert strategy.ledger.noise_to_signal == pytest.approx(
        Z * np.sqrt(3 / 2) * np.sqrt(SIZE) / 4
    )


def test_no_value_of_an_update_is_in_what_the_server_holds_of_a_client(sealed, silent):
    federation = sealed()
    update = np.linspace(-0.1, 0.1, SIZE)
    federation.updates = dict.fromkeys(range(4), update)
    strategy = federation.begin()
    federation.round()
    plain = residues(sealed_grid(Z, 3, 1, 4, SIZE).encode(update, C))

    held = [read_residues(reply, SIZE)[1] for reply in federation.replies]

    assert len(held) == 4
    # The float32 of the training moves an integer by a few units: so compare with room.
    for values in held:
        assert not np.any(np.abs(integers_of(values - plain)) < 1000)
    # The control: what all of them add up to is the update, once the pads are off.
    assert strategy.averaging.reference["a"] == pytest.approx(
        0.25 + update[:4], abs=1e-5
    )
