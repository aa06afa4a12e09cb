"""Numbers and addresses of persons are found by their form, and other numbers are not."""

import pytest

from fedllm.data import identifiers
from fedllm.data.identifiers import PERSON_NUMBERS, IdentifierFinder
from fedllm.errors import ConfigError


@pytest.fixture
def finder():
    pytest.importorskip("phonenumbers", reason="needs the extra `identifiers`")
    pytest.importorskip("stdnum", reason="needs the extra `identifiers`")
    return IdentifierFinder


@pytest.mark.parametrize(
    ("text", "country", "kinds"),
    [
        ("Ask anna.b+x@clinic.example.org.", None, {"e-mail address": 1}),
        ("call +49 30 901820 or +44 20 7946 0958", None, {"telephone number": 2}),
        ("call 030 901820 before 12", "DE", {"telephone number": 1}),
        ("DE89 3704 0044 0532 0130 00 since 2020", None, {"IBAN": 1}),
        ("DE89370400440532013000", None, {"IBAN": 1}),
        # Its middle would be a card.
        ("DE77 3704 0044 0532 0008 00", None, {"IBAN": 1}),
        ("GB82 WEST 1234 5698 7654 32", None, {"IBAN": 1}),
        ("paid by 4111 1111 1111 1111.", None, {"payment card": 1}),
        ("3782-822463-10005 or 378282246310005", None, {"payment card": 2}),
        ("NHS 943 476 5919 was seen", "GB", {"GB nhs": 1}),
        ("SSN 536-90-4399", "US", {"US ssn": 1}),
        ("Nr. 36 574 261 809", "DE", {"DE idnr": 1}),
    ],
)
def test_what_belongs_to_a_person_is_found_once_and_as_what_it_is(
    finder, text, country, kinds
):
    assert dict(finder(country).count(text)) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "5 mg at 10:20 on 2021-01-01, 120/80 mmHg, 37.5",
        "ICD-10 E11.9 and M54, 3.5 to 5.0 mmol/l",
        # One digit is wrong in each.
        "GB82 WEST 1234 5698 7654 33",
        "4111 1111 1111 1112",
        "4111 11111111 1111",
        "943 476 5918",
        "an @ sign alone",
        "",
    ],
)
def test_what_belongs_to_nobody_is_not(finder, text):
    assert not finder().count(text) and not finder("GB").count(text)


def test_each_country_of_the_list_has_its_numbers(finder):
    for country in PERSON_NUMBERS:
        assert len(finder(country)._kinds) > 2
    with pytest.raises(ConfigError, match="--country: one of AT, .*got 'XX'"):
        finder("XX")


def test_without_the_libraries_the_error_is_how_to_install_them(monkeypatch):
    monkeypatch.setattr(identifiers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedllm\[identifiers\]'"):
        IdentifierFinder()
