"""Likely personal identifiers in text: addresses and numbers whose form gives them away.

`phonenumbers` (Google's libphonenumber) knows telephone numbers, `python-stdnum` the check
digits of accounts, cards and national numbers. Both work without a network. No names and no
postal addresses are found: that takes a language model, and the libraries that bring one
(presidio, scrubadub) fetch theirs from a hub.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec

from fedllm.errors import ConfigError

INSTALL = "pip install 'fedllm[identifiers]'"

_LIBRARIES = ("phonenumbers", "stdnum")
_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
# Words with a digit, or a bank's four letters, joined by what people write into numbers.
_NUMBERS = re.compile(r"\w*\d\w*(?:[ ./-](?:\w*\d\w*|[A-Z]{4}))*")
_MOST_WORDS = 8
_FEWEST_CHARACTERS = 8
# Unbroken, or in the groups that are printed on cards.
_CARD = re.compile(
    r"[3-6](?:\d{12,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{4}|\d{3}([ -])\d{6}\2\d{5})"
)
# Modules of stdnum, by country: numbers that belong to one person each.
PERSON_NUMBERS = {
    "AT": ("vnr",),
    "BE": ("nn",),
    "BR": ("cpf",),
    "CA": ("sin",),
    "CH": ("ssn",),
    "DE": ("idnr",),
    "DK": ("cpr",),
    "ES": ("dni", "nie"),
    "FI": ("hetu",),
    "FR": ("nir",),
    "GB": ("nhs",),
    "IE": ("pps",),
    "IN": ("aadhaar",),
    "IT": ("codicefiscale",),
    "NL": ("bsn",),
    "NO": ("fodselsnummer",),
    "PL": ("pesel",),
    "SE": ("personnummer",),
    "US": ("ssn",),
}


class IdentifierFinder:
    """Counts what looks like a personal identifier.

    Args:
        country: Two letters, for telephone numbers without a country code and for national
            numbers; None: only what is the same everywhere.

    Raises:
        ConfigError: The libraries are not installed, or the country is not known.
    """

    def __init__(self, country: str | None = None) -> None:
        if not all(map(find_spec, _LIBRARIES)):
            raise ConfigError(
                f"not looked for, since their libraries are missing: {INSTALL}"
            )
        self._country = country
        self._kinds: dict[str, Callable[[str], bool]] = {
            "IBAN": _is_valid("", "iban"),
            "payment card": _is_card,
        }
        if country is not None:
            if country not in PERSON_NUMBERS:
                known = ", ".join(PERSON_NUMBERS)
                raise ConfigError(f"--country: one of {known} (got {country!r})")
            for name in PERSON_NUMBERS[country]:
                kind = f"{country} {name}"
                self._kinds[kind] = _is_valid(country, name)

    def count(self, text: str) -> Counter[str]:
        """Return how many of each kind a text has; empty if none."""
        found = Counter({"e-mail address": len(_EMAIL.findall(text))})
        # The longest first, so that no part of a number counts beside it.
        rest = text
        for candidate in _candidates(text):
            for kind, is_one in self._kinds.items():
                if candidate in rest and is_one(candidate):
                    found[kind] += 1
                    rest = rest.replace(candidate, " ", 1)
        found["telephone number"] = self._num_telephones(rest)
        return +found

    def _num_telephones(self, text: str) -> int:
        import phonenumbers

        return sum(1 for _ in phonenumbers.PhoneNumberMatcher(text, self._country))


def _candidates(text: str) -> Iterator[str]:
    """Yield parts of a text that may be one number, the longest of a place first."""
    for match in _NUMBERS.finditer(text):
        spans = [word.span() for word in re.finditer(r"\w+", match[0])]
        for length in range(min(len(spans), _MOST_WORDS), 0, -1):
            for first in range(len(spans) - length + 1):
                part = match[0][spans[first][0] : spans[first + length - 1][1]]
                if len(part) >= _FEWEST_CHARACTERS:
                    yield part


def _is_valid(country: str, name: str) -> Callable[[str], bool]:
    """Return stdnum's test of a number; of no country if that is empty."""
    from stdnum import get_cc_module

    module = (
        get_cc_module(country, name) if country else import_module(f"stdnum.{name}")
    )
    is_valid: Callable[[str], bool] = module.is_valid
    return is_valid


def _is_card(text: str) -> bool:
    digits = re.sub("[ -]", "", text)
    return _CARD.fullmatch(text) is not None and _is_valid("", "luhn")(digits)
