"""Advice against noise, with numbers."""

from fedllm.planning.advice import advice


def test_advice_names_the_clients_that_are_needed():
    lines = advice(1.04, 184_320, 20, 3)

    assert "148" in " ".join(lines) or "149" in " ".join(lines)
    assert any("fewer rounds" in line for line in lines)


def test_advice_for_a_quiet_federation_asks_for_no_more_clients():
    assert not any("more clients" in line for line in advice(1.0, 100, 100, 1))
