"""The audit of a sealed run: its clients, its trustees, the opening, and canaries.

The nodes run their own code (`commands.sealed_parties`), on ledgers in a home of their own.
The canaries' adversary is the one that epsilon is claimed against: it has the noise of c
trustees, and takes it off each release.
"""

from collections.abc import Callable

from fedllm.auditing import (
    sealed_client_checks,
    sealed_opening_checks,
    sealed_trustee_checks,
)
from fedllm.auditing.auditor import Auditor
from fedllm.auditing.harness import Finding
from fedllm.auditing.sealed_bench import MakeParties, SealedSetup
from fedllm.auditing.statistical_checks import order
from fedllm.config import RunConfig
from fedllm.privacy.ledger import PrivacySettings

_ORDER_ROUNDS = 3


class SealedAuditor(Auditor):
    """Audits the parties of one sealed run.

    Args:
        config: The run config, under `privacy.trust="trustees"`.
        settings: The settings that the run promises: z, C, delta, k, c and the rounds.
        num_clients: Honest clients of the rehearsal.
        num_canaries: Canary clients m.
        dimension: d of the toy adapter of noise checks and canaries.
        make_parties: Makes the nodes.

    Raises:
        PrivacyError: The settings leave nothing to audit, or cannot be audited.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: PrivacySettings,
        num_clients: int,
        num_canaries: int,
        dimension: int,
        make_parties: MakeParties,
    ) -> None:
        super().__init__(config, settings, num_clients, num_canaries, dimension)
        self._sealed = SealedSetup(
            config, settings, dimension, make_parties=make_parties
        )
        self._setup = self._sealed.asking_all()

    def checks(self) -> dict[str, Callable[[], Finding]]:
        """Return the checks by name, in their order."""
        setup = self._sealed
        client, trustee = sealed_client_checks, sealed_trustee_checks
        return {
            "grid": lambda: client.grid(setup),
            "clipped integers": lambda: client.clipped_integers(setup),
            "pads": lambda: client.pads(setup),
            "packets": lambda: client.context(setup),
            "clients refuse": lambda: client.client_refusals(setup),
            "failures": lambda: client.failures(setup),
            "trustees' noise": lambda: trustee.trustees_noise(setup),
            "fresh noise": lambda: trustee.fresh_noise(setup),
            "slots": lambda: trustee.slots(setup),
            "opened sum": lambda: sealed_opening_checks.opened_sum(setup),
            "length guard": lambda: sealed_opening_checks.length_guard(setup),
            "order": lambda: order(setup.planning(_ORDER_ROUNDS)),
            "ledger": lambda: sealed_opening_checks.sealed_ledger(setup),
            "canaries, one release": self._one_release,
            "canaries, the run": self._whole_run,
        }
