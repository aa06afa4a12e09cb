"""The ledger of a run: privacy.json, on disk before anything is released."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from fedllm.privacy.accounting import (
    Epsilons,
    Sampling,
    epsilons,
    gaussian_epsilons,
    noise_to_signal,
)
from fedllm.privacy.release_ledger import ReleaseLedger, bounded
from fedllm.privacy.sealed_claims import (
    opened_by_trustees,
    sealed_not_covered,
    whom_sealed,
)
from fedllm.privacy.sealed_sum import deviation
from fedllm.privacy.wording import delta_caution, plain, rounds_text, strength

_NOT_COVERED = [
    "the server, which sees each client's update before it is clipped",
    "whether a client is among those of the run at all: their number is published",
    "rows declared public, if a client trains on them: their losses, and the choice of a "
    "round by them, have no noise",
    "a run's traffic and its clients' seconds so far, which Flower shows to each registered "
    "node that asks",
    "the choice of settings, where it was made on private data",
    "who is connected, when each client answers (timing), and, where cohorts are not "
    "secret, which clients gave no usable update and by which code",
    "earlier and later runs over the same clients, which add up: a node with max-epsilon "
    "counts what they promise and stops (fedllm node budget); no node sees whether a server "
    "adds that noise, but for a run with privacy.trust='trustees'",
    "a client with several nodes: the bound is for one node",
]
_TRUSTED_SERVER = _NOT_COVERED[0]
_SAMPLING_WORDS = {
    "all": "all {size} clients in each",
    "fixed": "{n:g} of {size} clients in each, no amplification claimed",
    "poisson": "each of {size} clients by its own secret coin of probability {q:.3g}",
}


@dataclass(frozen=True)
class PrivacySettings:
    """The privacy settings that a run promises, fixed before round 1.

    Attributes:
        unit: `client`.
        sampling: `all`, `fixed` or `poisson`.
        population_size: Clients N.
        num_sampled_clients: n, the divisor of the sum: q*N under `poisson`.
        clipping_norm: C.
        noise_multiplier: z.
        delta: Delta.
        target_epsilon: The epsilon that z was calibrated to; 0.0: z was given.
        max_epsilon: The epsilon at which training stops; 0.0: no limit.
        num_trainable: d.
        planned_rounds: Rounds that z was calibrated for.
        earlier_mu_squared: Sum of 1 / z^2 over the rounds of earlier runs, from whose
            adapter this one starts; the rounds of this one add to it.
        start_note: What is not known of the adapter that the run starts from; empty:
            nothing is left out.
        trustees: k, the most that open a round; 0: the server adds the noise.
        colluding: c, how many of them may tell the server theirs: z is the noise of the
            others.
    """

    unit: str
    sampling: Sampling
    population_size: int
    num_sampled_clients: float
    clipping_norm: float
    noise_multiplier: float
    delta: float
    target_epsilon: float
    max_epsilon: float
    num_trainable: int
    planned_rounds: int
    earlier_mu_squared: float = 0.0
    start_note: str = ""
    trustees: int = 0
    colluding: int = 0

    @property
    def opened_noise(self) -> float:
        """The noise of a released sum over C: of all trustees together, else z."""
        if not self.trustees:
            return self.noise_multiplier
        return deviation(self.noise_multiplier, self.trustees, self.colluding)


class Ledger(ReleaseLedger[PrivacySettings]):
    """The client-level releases of one run. Make it with `create` or `load`."""

    settings_type = PrivacySettings
    positive = (
        "population_size",
        "num_sampled_clients",
        "clipping_norm",
        "noise_multiplier",
        "num_trainable",
        "planned_rounds",
    )
    derived = (
        "num_rounds",
        "sampling_probability",
        "epsilon",
        "epsilon_replace_one",
        "epsilon_adapters",
    )

    def spent_after(self, num_releases: int) -> float:
        """Return the zero-out epsilon of a number of releases."""
        return self.epsilon_after(num_releases).zero_out

    def epsilons(self) -> Epsilons:
        """Return the epsilons spent so far."""
        return self.epsilon_after(len(self._releases))

    def epsilon_after(self, num_releases: int) -> Epsilons:
        """Return the epsilons of a number of releases; if sealed, against the server."""
        return self._epsilons(self.settings.noise_multiplier, num_releases)

    def epsilons_of_adapters(self) -> Epsilons:
        """Return the epsilons spent so far against an observer of the adapters alone."""
        return self._epsilons(self.settings.opened_noise, len(self._releases))

    def _epsilons(self, noise_multiplier: float, num_releases: int) -> Epsilons:
        settings = self.settings
        if settings.earlier_mu_squared:
            mu_squared = num_releases / noise_multiplier**2
            mu_squared += settings.earlier_mu_squared
            return gaussian_epsilons(mu_squared, settings.delta)
        return epsilons(
            noise_multiplier,
            num_releases,
            settings.delta,
            settings.sampling,
            self.sampling_probability,
        )

    @property
    def sampling_probability(self) -> float:
        """q: each client's probability of being in a round."""
        return self.settings.num_sampled_clients / self.settings.population_size

    @property
    def noise_to_signal(self) -> float:
        """R: the norm of the averaged noise over the clipping norm."""
        settings = self.settings
        return noise_to_signal(
            settings.opened_noise,
            settings.num_trainable,
            settings.num_sampled_clients,
        )

    def strength(self, epsilon: float) -> str:
        """Return the word for an epsilon at this run's delta and number of clients."""
        settings = self.settings
        return strength(epsilon, settings.delta, settings.population_size)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of privacy.json; an unbounded epsilon is None."""
        settings, spent = self.settings, self.epsilons()
        epsilon = bounded(spent.zero_out)
        not_covered = self._not_covered()
        if settings.start_note:
            not_covered.append(settings.start_note)
        if settings.sampling == "poisson":
            not_covered.append(
                "the other clients: by a run's traffic and seconds, which Flower shows them, "
                "the size of a cohort is no secret from them, and for them the epsilon "
                "without amplification holds"
            )
            not_covered.append(
                "Flower's own log and database, which know each cohort and are trusted "
                "with the server (`flwr list --run-id` prints a run's traffic and its "
                "clients' seconds), and the times of the run's files and a tracker's "
                "start and end, which tell how long cohorts took"
            )
        return {
            "run": self.run,
            **asdict(settings),
            "neighbouring_relation": "zero-out",
            "epsilon": epsilon,
            "epsilon_replace_one": bounded(spent.replace_one),
            "epsilon_two_clients": None,
            "epsilon_adapters": (
                bounded(self.epsilons_of_adapters().zero_out)
                if settings.trustees
                else None
            ),
            "sampling_probability": self.sampling_probability,
            "num_rounds": len(self._releases),
            "releases": self._releases,
            "chain": self._links,
            "noise_to_signal": self.noise_to_signal,
            "noise_probe": self._noise_probe,
            "accountant": spent.accountant,
            "not_covered": not_covered,
            "strength": self.strength(spent.zero_out),
            "statement": self._statement(spent),
        }

    def _not_covered(self) -> list[str]:
        """Return what the promise leaves out, but for the run's own sampling and start."""
        settings = self.settings
        if not settings.trustees:
            return list(_NOT_COVERED)
        sealed = sealed_not_covered(settings.colluding)
        if settings.earlier_mu_squared:
            sealed.append(
                "the server of the runs before, whose adapter this one started from: their "
                "epsilon is counted for whoever sees adapters"
            )
        return sealed + [text for text in _NOT_COVERED if text != _TRUSTED_SERVER]

    def _statement(self, spent: Epsilons) -> str:
        """Return the privacy statement, one sentence, or three of a sealed run."""
        settings = self.settings
        words = _SAMPLING_WORDS[settings.sampling].format(
            size=settings.population_size,
            n=settings.num_sampled_clients,
            q=self.sampling_probability,
        )
        zero_out, replace_one = plain(spent.zero_out), plain(spent.replace_one)
        caution = delta_caution(settings.delta, settings.population_size)
        because = f", since {caution}" if caution else ""
        earlier = ""
        if settings.earlier_mu_squared:
            earlier = ", and the runs whose adapter it started from,"
        if settings.trustees:
            parties = (settings.trustees, settings.colluding)
            adapters = plain(self.epsilons_of_adapters().zero_out)
            whom = f"{whom_sealed(*parties)} this run"
            rest = f"; {opened_by_trustees(adapters, *parties)}"
            # That it takes part the server sees.
            took = "one client's updates were its own or zero"
        else:
            took = "one client took part or sent nothing"
            whom = "whoever sees only the adapters that this run"
            rest = (
                "; the server, which receives each client's update, is trusted, and what is "
                "not covered is listed beside this under not_covered."
            )
        return (
            "Client-level differential privacy with epsilon "
            f"{zero_out} at delta {settings.delta:g} (protection: "
            f"{self.strength(spent.zero_out)}{because}): for {whom}{earlier} released in "
            f"{rounds_text(len(self._releases))}, {words}, whether {took} "
            "changes the probability of any conclusion by at "
            f"most a factor of e^{zero_out}, plus {settings.delta:g} (replace-one: "
            f"e^{replace_one}, where that client had other data instead){rest}"
        )


def no_privacy(
    population_size: int, num_trainable: int, run: str = ""
) -> dict[str, Any]:
    """Return privacy.json of a run without privacy: epsilon is None, not 0."""
    empty = dict.fromkeys(f.name for f in fields(PrivacySettings))
    return {
        "run": run,
        **empty,
        "unit": "none",
        "population_size": population_size,
        "num_trainable": num_trainable,
        "neighbouring_relation": None,
        "epsilon": None,
        "epsilon_replace_one": None,
        "epsilon_two_clients": None,
        "epsilon_adapters": None,
        "sampling_probability": None,
        "num_rounds": 0,
        "releases": [],
        "chain": None,
        "noise_to_signal": None,
        "noise_probe": None,
        "accountant": None,
        "not_covered": ["everything: no noise was added"],
        "strength": strength(None),
        "statement": "No differential privacy: no noise was added, and what the adapter "
        "tells about a client's data is not bounded.",
    }
