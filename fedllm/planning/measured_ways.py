"""Which way pays: what clients of some rows reach alone and together, as it was measured.

The rows come with the package (measured_ways.json). `benchmarks/ways.py` makes them from
folders of `fedllm compare`. Nothing is interpolated but a lone client's loss over its rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise

from fedllm.planning.frontier import load_frontier

ALONE = "alone"
NO_PRIVACY = "federated without privacy"
CLIENT = "federated, each client protected"
RECORD = "federated, each row protected, every client its own noise"
JOINT = "federated, each row protected, one noise for all"
FEDERATED = (JOINT, RECORD, CLIENT, NO_PRIVACY)
THEN_PERSONAL = ", then each trains on"
"""Ends the name of a federated way that a client's personal training follows."""

TRAINING_ROWS = 4863
"""Of the frontier's federations, shared among their clients."""

_NEAR = 0.1
"""Share by which numbers of clients and rows may differ from those measured."""
_SAME_EPSILON = 1.01


@dataclass(frozen=True, kw_only=True)
class MeasuredWay:
    """One way to a model, as it was measured.

    Attributes:
        way: ALONE, or one of FEDERATED, if need be with THEN_PERSONAL.
        clients: Clients of the federation; of a lone client, those that the rows were shared
            among.
        rows: Rows of a client, in the mean.
        epsilon: What the federation spent; None without privacy.
        test_losses: One for each seed, or for each client that was tried.
        command: Makes them.
    """

    way: str
    clients: int
    rows: float
    epsilon: float | None
    test_losses: tuple[float, ...]
    command: str

    @property
    def loss(self) -> float:
        """Mean test loss."""
        return sum(self.test_losses) / len(self.test_losses)


@dataclass(frozen=True)
class Outlook:
    """What to expect of one way.

    Attributes:
        way: Its name.
        measured: The best that was measured of it near what was asked; None: nothing was.
        interpolated: A lone client's loss between two measured numbers of rows, and the
            largest error of doing so where it was measured; None: there is no such pair.
    """

    way: str
    measured: MeasuredWay | None
    interpolated: tuple[float, float] | None = None

    @property
    def loss(self) -> float | None:
        """The test loss to expect; None if it was not measured."""
        if self.measured is not None:
            return self.measured.loss
        return None if self.interpolated is None else self.interpolated[0]


@cache
def measured_ways() -> tuple[MeasuredWay, ...]:
    """Return all that was measured, the frontier of client level too."""
    text = files("fedllm.planning").joinpath("measured_ways.json").read_text("utf-8")
    compared = (
        MeasuredWay(**{**row, "test_losses": tuple(row["test_losses"])})
        for row in json.loads(text)
    )
    frontier = (
        MeasuredWay(
            way=CLIENT,
            clients=row.clients,
            rows=TRAINING_ROWS / row.clients,
            epsilon=row.epsilon,
            test_losses=row.test_losses,
            command='docs/results.md, "The frontier"',
        )
        for row in load_frontier().private_rows
    )
    return (*compared, *frontier)


def outlooks(
    clients: int,
    rows: float,
    epsilon: float,
    ways: Sequence[MeasuredWay] | None = None,
) -> list[Outlook]:
    """Return what each way reaches, the best first and those not measured last.

    Args:
        clients: Clients of the federation.
        rows: Rows of each.
        epsilon: What a private federation may spend.
        ways: What was measured; None: what comes with the package.
    """
    known = measured_ways() if ways is None else ways
    found = [_alone(rows, known)]
    for way in (n + end for n in FEDERATED for end in ("", THEN_PERSONAL)):
        fitting = [
            one
            for one in known
            if one.way == way
            and _is_near(one.clients, clients)
            and _is_near(one.rows, rows)
            and (one.epsilon or 0.0) <= epsilon * _SAME_EPSILON
        ]
        best = min(fitting, key=lambda one: one.loss, default=None)
        if best is not None or not way.endswith(THEN_PERSONAL):
            found.append(Outlook(way, best))
    return sorted(found, key=lambda one: (one.loss is None, one.loss or 0.0))


def changes(
    clients: int,
    rows: float,
    epsilon: float,
    ways: Sequence[MeasuredWay] | None = None,
) -> list[tuple[str, float, float]]:
    """Return what would change the answer: other numbers at which joining was measured to pay.

    Returns:
        (what, test loss there, test loss of a client alone there), one for each other
        number of clients or epsilon.
    """
    known = measured_ways() if ways is None else ways
    found: dict[str, tuple[str, float, float]] = {}
    for one in known:
        if one.way == ALONE or one.epsilon is None:
            continue
        alone = _alone(one.rows, known).loss
        same = _is_near(one.clients, clients) and _is_near(one.rows, rows)
        if same and one.epsilon <= epsilon * _SAME_EPSILON:
            continue
        if alone is None or one.loss >= alone:
            continue
        what = (
            f"{one.clients} clients of {one.rows:.0f} rows at epsilon "
            f"{one.epsilon:.3g}: {one.way}"
        )
        if what not in found or one.loss < found[what][1]:
            found[what] = (what, one.loss, alone)
    return sorted(found.values(), key=lambda change: change[1] - change[2])


def _alone(rows: float, known: Sequence[MeasuredWay]) -> Outlook:
    """Return what a client of so many rows reaches alone."""
    alone = sorted((one for one in known if one.way == ALONE), key=lambda o: o.rows)
    near = [one for one in alone if _is_near(one.rows, rows)]
    if near:
        closest = min(near, key=lambda one: abs(math.log(one.rows / rows)))
        return Outlook(ALONE, closest)
    loss = _between(rows, alone)
    if loss is None:
        return Outlook(ALONE, None)
    errors = [
        abs(expected - one.loss)
        for i, one in enumerate(alone)
        if (expected := _between(one.rows, [*alone[:i], *alone[i + 1 :]])) is not None
    ]
    # One pair of points has no error that could be measured.
    return Outlook(ALONE, None, (loss, max(errors)) if errors else None)


def _between(rows: float, alone: Sequence[MeasuredWay]) -> float | None:
    """Return the loss on a line in log rows between the two neighbours; None outside."""
    for low, high in pairwise(alone):
        if low.rows <= rows <= high.rows:
            share = math.log(rows / low.rows) / math.log(high.rows / low.rows)
            return low.loss + share * (high.loss - low.loss)
    return None


def _is_near(measured: float, asked: float) -> bool:
    """Return whether a number is that which was measured, but for a tenth."""
    return abs(measured - asked) <= _NEAR * measured
