"""A client's own log, and what no log may hold."""

import logging
import stat

from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import WITHOUT_DP, code_of


def test_a_full_disk_under_the_log_does_not_keep_the_reply_back(answer, home):
    home.write_text("in the way of the folder")

    assert code_of(answer(node={})) == "bad-config"


def test_a_training_that_goes_well_needs_no_log(answer, home):
    home.write_text("in the way of the folder")

    assert ARRAYS in answer().content


def test_in_a_simulation_under_dp_nothing_about_the_client_is_shown(
    answer, capfd, caplog
):
    with caplog.at_level(logging.DEBUG, "fedllm"):
        answer(server_round=5)
    out, err = capfd.readouterr()
    assert "client 0" not in caplog.text
    assert "examples" not in caplog.text + out + err

    with caplog.at_level(logging.INFO, "fedllm"):
        answer(WITHOUT_DP, server_round=6)
    assert "client 0: round 6: 1 steps on 5 examples" in caplog.text


def test_a_partition_shows_nothing_under_dp_although_its_owner_set_a_limit(
    answer, caplog
):
    node = {"partition-id": 0, "num-partitions": 2, "privacy-unit": "client"}
    with caplog.at_level(logging.DEBUG, "fedllm"):
        assert ARRAYS in answer(node=node, server_round=5).content

    assert "client 0" not in caplog.text


def test_a_clients_own_log_has_what_it_did_for_its_owner_only(answer, home):
    answer(server_round=5)

    log = (home / "logs" / "client-0.log").read_text()
    assert "run 1 client 0: round 5: 1 steps on 5 examples" in log
    assert stat.S_IMODE((home / "logs").stat().st_mode) == 0o700
