"""The rounds of a ledger as a hash chain, so that a deleted or edited round shows.

    "chain": [{"round": 1, "hash": "9f2c..."}, {"round": 2, "hash": "41d0..."}]

The first hash is over the run's name, the settings that it promises and the round; each later
one is over the one before it, its round and what else was noted. Anyone who can write the file can
make a new chain, whole and shorter. So each message has the chain's end, the head, signed by the
server, and the nodes keep it: a new chain does not have the heads that they hold.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

_LABEL = "fedllm ledger 1"


@dataclass(frozen=True)
class Head:
    """The end of a chain.

    Attributes:
        run: Name of the run.
        rounds: How many rounds the chain has.
        hash: Hash of the last one; of the settings alone if there is none.
    """

    run: str
    rounds: int
    hash: str

    def __str__(self) -> str:
        return f"{self.run} {self.rounds} {self.hash}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read what `str` wrote; None if it is something else."""
        words = text.split(" ")
        if len(words) != 3 or not words[1].isdecimal() or len(words[1]) > 9:
            return None
        head = cls(words[0], int(words[1]), words[2])
        return head if str(head) == text else None


class Chain:
    """The rounds of one ledger, in the order in which they were entered.

    Args:
        run: Name of the run.
        settings: A frozen dataclass of JSON values; those that have their default are left
            out, so that a version with more settings computes the same.
        links: The links so far, as `links` returns them.
    """

    def __init__(
        self, run: str, settings: Any, links: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._run = run
        self._start = _digest(
            {"label": _LABEL, "run": run, "settings": _chosen(settings)}
        )
        self._links = [dict(link) for link in links]

    @property
    def links(self) -> list[dict[str, Any]]:
        """A link for each round: `round`, whatever was noted with it, and `hash`."""
        return [dict(link) for link in self._links]

    @property
    def head(self) -> Head:
        """The end of the chain."""
        return self.head_at(len(self._links))

    def head_at(self, rounds: int) -> Head:
        """Return what the end was after a number of rounds, at most those there are."""
        digest = self._links[rounds - 1]["hash"] if rounds else self._start
        return Head(self._run, rounds, digest)

    def append(self, server_round: int, **facts: float | None) -> None:
        """Enter a round.

        Args:
            server_round: The round.
            facts: What else the hash holds fast.
        """
        link = {"round": server_round, **facts}
        self._links.append({**link, "hash": _next(self.head.hash, link)})

    def pop(self) -> None:
        """Take the last round back, which could not be written."""
        self._links.pop()

    def broken_at(self) -> int | None:
        """Return the first link, from 1, that does not follow; None if all do."""
        previous = self._start
        for number, link in enumerate(self._links, 1):
            if link.get("hash") != _next(previous, link):
                return number
            previous = link["hash"]
        return None


def read_chain(run: str, settings: Any, content: Mapping[str, Any]) -> Chain | None:
    """Return the chain of a privacy.json; None if an older version wrote it without one.

    Raises:
        TypeError: It is no list of links.
        ValueError: Likewise.
    """
    links = content.get("chain")
    return None if links is None else Chain(run, settings, links)


def chain_fault(chain: Chain | None, releases: Sequence[int]) -> str | None:
    """Return what is wrong with a ledger's chain; None: nothing, or there is none.

    Args:
        chain: The chain.
        releases: The rounds that the ledger has.
    """
    if chain is None:
        return None
    broken = chain.broken_at()
    if broken is not None:
        return (
            f"chain: its round {broken} does not follow from the settings and the rounds "
            "before: one of them was edited or taken out"
        )
    rounds = [link.get("round") for link in chain.links]
    if sorted(rounds, key=str) != sorted(releases, key=str):
        return f"chain: its rounds are {rounds!r}, and releases are {list(releases)!r}"
    return None


def _next(previous: str, link: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in link.items() if name != "hash"}
    return _digest({"previous": previous, **rest})


def _chosen(settings: Any) -> dict[str, Any]:
    """Return the settings that have no default, or another value."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    return {
        f.name: values[f.name]
        for f in fields(settings)
        if f.default is MISSING or values[f.name] != f.default
    }


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
