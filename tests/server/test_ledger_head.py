"""The ledger's end in each message, signed."""

import json

from fedllm.privacy.chain import Chain, Head
from fedllm.server.ledger_head import HeadSigner
from fedllm.signatures import HEAD_LABEL, is_signed, parse_public
from fedllm.wire.messages import LEDGER_HEAD, LEDGER_KEY, LEDGER_SIGNATURE
from tests.helpers.federations import NO_PRIVACY, federation


def heads(run) -> list[Head]:
    """The end that each message of a run's grid had, each signed."""
    found = []
    for message in run.grid.sent:
        config = message.content.config_records["config"]
        key = parse_public(config[LEDGER_KEY])
        assert is_signed(HEAD_LABEL, config[LEDGER_HEAD], config[LEDGER_SIGNATURE], key)
        found.append(Head.parse(config[LEDGER_HEAD]))
    return found


def test_each_message_has_the_signed_end_of_the_rounds_before_its_own(quick):
    run = federation(quick)
    run.run()

    content = json.loads((run.directory.path / "privacy.json").read_text())
    chain = Chain(content["run"], run.account.ledger.settings, content["chain"])
    assert heads(run) == [chain.head_at(n) for n in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert chain.head.rounds == 3


def test_a_run_without_privacy_has_no_ledger_and_sends_no_end(quick):
    run = federation({**quick, **NO_PRIVACY})
    run.run()

    assert not [
        m for m in run.grid.sent if LEDGER_HEAD in m.content.config_records["config"]
    ]


def test_two_runs_of_a_home_are_signed_by_one_key(tmp_path):
    head = Head("run", 0, "ab")

    first, second = (HeadSigner(tmp_path).entries(head) for _ in range(2))
    assert first == second
    assert HeadSigner(tmp_path / "other").entries(head) != first
