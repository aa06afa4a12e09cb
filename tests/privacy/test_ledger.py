"""The ledger: on disk first, never forgetting, never forgiving."""

import json
import os
from dataclasses import replace

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import calibrate, gaussian_epsilon
from fedllm.privacy.ledger import Ledger, PrivacySettings, no_privacy

SETTINGS = PrivacySettings(
    unit="client",
    sampling="all",
    population_size=20,
    num_sampled_clients=20,
    clipping_norm=0.5,
    noise_multiplier=1.5,
    delta=1e-5,
    target_epsilon=0.0,
    max_epsilon=0.0,
    num_trainable=1000,
    planned_rounds=3,
)
KEYS = {
    "trustees",
    "colluding",
    "epsilon_adapters",
    "unit",
    "neighbouring_relation",
    "epsilon",
    "epsilon_replace_one",
    "delta",
    "noise_multiplier",
    "clipping_norm",
    "num_sampled_clients",
    "population_size",
    "sampling",
    "num_rounds",
    "num_trainable",
    "noise_to_signal",
    "noise_probe",
    "accountant",
    "not_covered",
    "strength",
    "statement",
}


def test_the_file_has_every_key_and_the_spent_epsilon(tmp_path):
    ledger = Ledger.create(tmp_path / "privacy.json", SETTINGS)
    ledger.spend(1)
    ledger.spend(2)

    content = json.loads((tmp_path / "privacy.json").read_text())

    assert set(content) >= KEYS
    assert content["epsilon"] == gaussian_epsilon(1.5, 2, 1e-5)
    assert content["epsilon_replace_one"] == gaussian_epsilon(0.75, 2, 1e-5)
    assert content["num_rounds"] == 2
    assert content["noise_to_signal"] == pytest.approx(1.5 * 1000**0.5 / 20)
    assert f"epsilon {content['epsilon']:.2f}" in content["statement"]
    assert f"{content['epsilon_replace_one']:.2f}" in content["statement"]
    assert content["strength"] in content["statement"]
    assert content["statement"].count(". ") == 0, "it is one sentence"
    assert f"e^{content['epsilon_replace_one']:.2f}" in content["statement"]


def test_a_loaded_ledger_goes_on_where_it_was(tmp_path):
    path = tmp_path / "privacy.json"
    first = Ledger.create(path, SETTINGS)
    first.note_probe({"before": 3.6, "noise_alone": 3.7})
    first.spend(1)

    second = Ledger.load(path)
    second.check_same(SETTINGS)

    assert second.as_dict() == first.as_dict()
    with pytest.raises(PrivacyError, match="round 1 was released already"):
        second.spend(1)


def test_a_second_ledger_does_not_overwrite_the_first(tmp_path):
    Ledger.create(tmp_path / "privacy.json", SETTINGS)

    with pytest.raises(PrivacyError, match="already"):
        Ledger.create(tmp_path / "privacy.json", SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.1},
        {"clipping_norm": 1.0},
        {"sampling": "poisson"},
        {"num_sampled_clients": 10},
        {"delta": 1e-3},
        {"population_size": 200},
    ],
)
def test_changed_settings_are_rejected_with_both_values(tmp_path, change):
    ledger = Ledger.create(tmp_path / "privacy.json", SETTINGS)
    ((key, value),) = change.items()

    with pytest.raises(PrivacyError) as caught:
        ledger.check_same(replace(SETTINGS, **change))

    assert f"{key} was {getattr(SETTINGS, key)!r} and is now {value!r}" in str(
        caught.value
    )


@pytest.mark.parametrize("content", ["", "{}", "[]", "{" * 5, '{"unit": "client"}'])
def test_a_damaged_ledger_stops_everything(tmp_path, content):
    path = tmp_path / "privacy.json"
    path.write_text(content)

    with pytest.raises(PrivacyError, match="cannot be read"):
        Ledger.load(path)


def test_a_calibrated_run_never_passes_its_target(tmp_path):
    z = calibrate(8.0, 3, 1e-5, "all", 1.0)
    settings = replace(SETTINGS, noise_multiplier=z, target_epsilon=8.0)
    ledger = Ledger.create(tmp_path / "privacy.json", settings)
    for server_round in (1, 2, 3):
        ledger.spend(server_round)

    assert ledger.epsilons().zero_out <= 8.0
    assert not ledger.may_spend(0.0)
    with pytest.raises(PrivacyError, match="budget"):
        ledger.spend(4)


def test_max_epsilon_stops_before_it_is_passed(tmp_path):
    limit = gaussian_epsilon(1.5, 2, 1e-5)
    settings = replace(SETTINGS, max_epsilon=limit)
    ledger = Ledger.create(tmp_path / "privacy.json", settings)
    ledger.spend(1)
    assert ledger.may_spend(limit)
    ledger.spend(2)

    assert not ledger.may_spend(limit)


def test_a_release_that_cannot_be_written_is_not_made(tmp_path, monkeypatch):
    ledger = Ledger.create(tmp_path / "privacy.json", SETTINGS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PrivacyError, match="No space left on device; nothing is rel"):
        ledger.spend(1)
    monkeypatch.undo()

    assert Ledger.load(tmp_path / "privacy.json").epsilons().zero_out == 0
    assert ledger.epsilons().zero_out == 0


def test_file_and_folder_are_synced_before_spend_returns(tmp_path, monkeypatch):
    ledger = Ledger.create(tmp_path / "privacy.json", SETTINGS)
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: synced.append(os.fstat(fd).st_mode >> 12) or real(fd)
    )

    ledger.spend(1)

    assert synced == [0o10, 0o4]  # a file, then a folder


def test_an_epsilon_without_privacy_is_null_and_never_zero():
    content = no_privacy(20, 1000)

    assert set(content) >= KEYS
    assert content["epsilon"] is None
    assert content["strength"] == "none"
    assert "No differential privacy" in content["statement"]


def test_poisson_names_flowers_own_log_as_trusted(tmp_path):
    settings = replace(SETTINGS, sampling="poisson", num_sampled_clients=4)
    ledger = Ledger.create(tmp_path / "privacy.json", settings)

    content = ledger.as_dict()

    assert any("Flower's own log" in line for line in content["not_covered"])
    assert any(
        line.startswith("the other clients: ") for line in content["not_covered"]
    )
    assert content["sampling_probability"] == pytest.approx(0.2)
    assert "secret coin" in content["statement"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 0.5}, "epsilon is 0.5, but settings and rounds give"),
        ({"epsilon": None}, "epsilon is None"),
        ({"epsilon_replace_one": 0.5}, "epsilon_replace_one is 0.5"),
        ({"num_rounds": 1}, "num_rounds is 1"),
        ({"releases": [1]}, "num_rounds is 2"),
        ({"releases": [2, 1]}, "releases are"),
        ({"releases": [2, 2]}, "releases are"),
        ({"releases": [0, 1]}, "releases are"),
        ({"releases": [1.5, 2]}, "releases are"),
        ({"sampling_probability": 0.1}, "sampling_probability is 0.1"),
        ({"noise_multiplier": 3.0}, "epsilon is"),
        ({"noise_multiplier": -1.5}, "noise_multiplier is -1.5"),
        ({"clipping_norm": 0.0}, "clipping_norm is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
    ],
)
def test_an_edited_ledger_is_rejected(tmp_path, change, words):
    path = tmp_path / "privacy.json"
    ledger = Ledger.create(path, SETTINGS)
    ledger.spend(1)
    ledger.spend(2)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(PrivacyError, match="was edited") as caught:
        Ledger.load(path)

    assert words in str(caught.value)


def test_last_digits_of_another_scipy_are_not_an_edit(tmp_path):
    path = tmp_path / "privacy.json"
    ledger = Ledger.create(path, SETTINGS)
    ledger.spend(1)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "epsilon": content["epsilon"] + 1e-12}))

    assert Ledger.load(path).releases == [1]


def test_a_delta_that_one_whole_client_fits_into_is_no_protection(tmp_path):
    settings = replace(SETTINGS, delta=1e-3, population_size=1000)
    ledger = Ledger.create(tmp_path / "privacy.json", settings)

    content = ledger.as_dict()

    assert content["strength"] == "none to speak of"
    assert (
        "(protection: none to speak of, since delta 0.001 is not below one over 1,000"
        in content["statement"]
    )
    assert "since" not in Ledger.create(tmp_path / "usual", SETTINGS).as_dict()


@pytest.mark.parametrize("sampling", ["all", "fixed", "poisson"])
def test_add_or_remove_is_never_claimed_of_clients_whose_number_is_published(
    tmp_path, sampling
):
    settings = replace(SETTINGS, sampling=sampling, num_sampled_clients=10)
    ledger = Ledger.create(tmp_path / "privacy.json", settings)
    ledger.spend(1)

    text = (tmp_path / "privacy.json").read_text()

    assert "add_or_remove" not in text and "add-or-remove" not in text
    assert any(
        "their number is published" in x for x in json.loads(text)["not_covered"]
    )
    assert "add_or_remove" not in json.dumps(no_privacy(20, 1000))


def test_what_shows_a_secret_cohort_is_named(tmp_path):
    settings = replace(SETTINGS, sampling="poisson", num_sampled_clients=10)
    left_out = " ".join(
        Ledger.create(tmp_path / "privacy.json", settings).as_dict()["not_covered"]
    )

    for shown in ("flwr list --run-id", "tracker's start and end", "times of the run"):
        assert shown in left_out


def test_public_rows_are_named_among_what_is_not_covered(tmp_path):
    content = Ledger.create(tmp_path / "privacy.json", SETTINGS).as_dict()

    assert any("rows declared public" in line for line in content["not_covered"])


def test_a_sealed_ledger_counts_what_the_server_sees_and_what_others_see(tmp_path):
    sealed = replace(SETTINGS, trustees=5, colluding=2)
    ledger = Ledger.create(tmp_path / "privacy.json", sealed)
    ledger.spend(1)
    ledger.spend(2)
    content = json.loads((tmp_path / "privacy.json").read_text())

    z = SETTINGS.noise_multiplier
    exact = gaussian_epsilon(z, 2, 1e-5)
    assert content["epsilon"] == pytest.approx(exact, rel=1e-6)
    of_adapters = gaussian_epsilon(z * (5 / 3) ** 0.5, 2, 1e-5)
    assert content["epsilon_adapters"] == pytest.approx(of_adapters, rel=1e-6)
    assert "at most 2 of the 5 trustees" in content["statement"]
    assert "If all of them join the server there is no protection" in (
        content["statement"]
    )
    assert Ledger.load(tmp_path / "privacy.json").releases == [1, 2]
    content["epsilon_adapters"] /= 2
    (tmp_path / "privacy.json").write_text(json.dumps(content))
    with pytest.raises(PrivacyError, match="epsilon_adapters"):
        Ledger.load(tmp_path / "privacy.json")
