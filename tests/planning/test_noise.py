"""What is fixed before round 1."""

import pytest

from fedllm.config_parsing import parse_run_config
from fedllm.errors import PrivacyError
from fedllm.planning.noise import affordable_rounds, privacy_settings
from fedllm.privacy.accounting import epsilons


def planned(population_size, **keys):
    return privacy_settings(parse_run_config(keys), population_size, 1000)


def test_delta_is_below_one_over_the_clients_unless_it_is_given():
    assert planned(20).delta == 1e-5
    assert planned(100_000).delta == pytest.approx(100_000**-1.1)
    assert planned(20, **{"privacy.delta": 1e-7}).delta == 1e-7


def test_the_sum_is_divided_by_what_is_expected_under_secret_coins():
    coins = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.25}
    coins |= {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 2.0}

    assert planned(10, **coins).num_sampled_clients == 2.5
    # Nothing may round here: q enters the accounting.
    assert planned(3, **coins).num_sampled_clients == 0.75


def test_a_fixed_cohort_is_whole_and_never_empty():
    fixed = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.1}

    assert planned(20, **fixed).num_sampled_clients == 2
    assert planned(3, **fixed).num_sampled_clients == 1
    assert planned(7).num_sampled_clients == 7


def test_a_given_noise_is_taken_and_a_target_is_met_from_below():
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.7}
    assert planned(20, **keys).noise_multiplier == 0.7

    met = planned(20, **{"privacy.target-epsilon": 3.0, "num-server-rounds": 4})
    spent = epsilons(met.noise_multiplier, 4, 1e-5, "all", 1.0).zero_out
    assert 2.999 < spent <= 3.0


@pytest.mark.parametrize("key", ["noise-multiplier", "target-epsilon"])
def test_more_noise_than_the_grid_holds_is_one_clear_error(key):
    value = {"noise-multiplier": 1e9, "target-epsilon": 1e-9}[key]
    keys = {"privacy.target-epsilon": 0.0, f"privacy.{key}": value}
    keys["privacy.delta"] = 1e-12

    with pytest.raises(PrivacyError, match="ask for a larger epsilon"):
        planned(20, **keys)


def test_a_run_stops_before_the_round_that_would_pass_its_own_limit():
    def rounds(**privacy):
        given = {"target-epsilon": 0.0, "noise-multiplier": 1.0, "max-epsilon": 5.0}
        keys = {f"privacy.{key}": value for key, value in (given | privacy).items()}
        config = parse_run_config({"num-server-rounds": 30, **keys})
        return affordable_rounds(config, 1.0, 1e-5)

    def spent(number):
        return epsilons(1.0, number, 1e-5, "all", 1.0).zero_out

    most = rounds()
    assert spent(most) <= 5.0 < spent(most + 1)
    assert rounds(**{"max-epsilon": 0.0}) == rounds(**{"max-epsilon": 1e6}) == 30
    assert rounds(**{"max-epsilon": 0.1}) == 0
