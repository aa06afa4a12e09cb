"""The card of a personal adapter says what it is, and that it is not private."""

from fedllm.config import RunConfig, flat
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.reporting.personal_card import personal_card

CHOICE = {
    "choice": "shared",
    "losses": {"base": 3.5, "shared": 2.25, "personal": 2.5},
    "rows": {"training": 218, "stopping": 13, "choosing": 12},
}


def card(**changes) -> str:
    settings = {**flat(RunConfig()), "personal.epochs": 3.0, **changes}
    return personal_card(settings, 77, CHOICE)


def test_the_card_says_first_that_the_adapter_is_not_private():
    text = card()

    assert text.splitlines()[2].startswith("**Not private. Keep it on this machine.**")
    assert "No epsilon covers it" in text and "it is unchanged" in text


def test_the_card_has_the_run_the_rows_the_losses_and_the_choice():
    text = card()

    assert "run 77" in text and "at most 3 passes over 218" in text
    assert "| base | 3.500 |\n| shared | 2.250 |\n| personal | 2.500 |" in text
    assert "| chosen | shared |" in text
    assert "Loss on the 12 held-out rows" in text and "13 other held-out rows" in text
    assert str(BUILT_IN_MODEL.licence) in text and "ffa-lora, rank 8" in text


def test_what_is_not_known_of_a_foreign_model_is_not_made_up():
    text = card(**{"model.name": "owner/model@" + "a" * 40, "data.name": "own.jsonl"})

    assert "| base model | owner/model |" in text
    assert "not known here" in text
