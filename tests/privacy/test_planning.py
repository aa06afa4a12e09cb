"""R against the published table, and advice with numbers."""

import pytest

from fedllm.privacy.accounting import calibrate
from fedllm.privacy.planning import advice, noise_to_signal


@pytest.mark.parametrize(
    ("d", "clients", "rounds", "expected"),
    [(184_320, 20, 3, 22), (184_320, 100, 5, 5.8), (3_840, 20, 3, 3.2)],
)
def test_r_has_the_published_value(d, clients, rounds, expected):
    z = calibrate(8.0, rounds, 1e-5, "all", 1.0)

    assert noise_to_signal(z, d, clients) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("rounds", "epsilon", "d", "clients"),
    [
        (10, 1.0, 2_662_400, 19_250),
        (10, 8.0, 3_328, 110),
        (100, 8.0, 50_900_000, 43_188),
    ],
)
def test_the_published_number_of_clients_brings_r_to_1(rounds, epsilon, d, clients):
    z = calibrate(epsilon, rounds, 1e-5, "all", 1.0)

    assert noise_to_signal(z, d, clients) == pytest.approx(1.0, rel=0.01)


def test_advice_names_the_clients_that_are_needed():
    lines = advice(1.04, 184_320, 20, 3)

    assert "148" in " ".join(lines) or "149" in " ".join(lines)
    assert any("fewer rounds" in line for line in lines)


def test_advice_for_a_quiet_federation_asks_for_no_more_clients():
    assert not any("more clients" in line for line in advice(1.0, 100, 100, 1))
