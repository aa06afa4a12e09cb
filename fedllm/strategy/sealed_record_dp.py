"""Record level whose server is not trusted: trustees open each step's noised sum."""

from collections.abc import Sequence

from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.joint_sum import largest_batch, most_records
from fedllm.privacy.mechanism import Vector
from fedllm.strategy.sealed_dp import SealedNoise, SlotUnits


class SealedRecordDP(SealedNoise[JointLedger]):
    """DP-SGD over the records of all clients, by trustees: a step is a slot.

    Guarantee:
        As `SealedNoise`. The server never sees a client's sum, so it projects none
        (`JointRecordDP` does): what bounds a record is the client's own clipping, on its own
        machine, and what bounds a hostile client is the length of the opened sum alone.
    """

    @property
    def units(self) -> SlotUnits:
        """The gradient of a record, of norm G, for each coin that falls for one."""
        settings = self.ledger.settings
        return SlotUnits(
            norm=settings.max_grad_norm,
            num_clients=settings.population_size,
            num_records=largest_batch(settings.expected_batch_size),
            total_rows=settings.total_rows,
        )

    def reach(self, senders: Sequence[int]) -> float:
        """Return more records than the coins of these nodes choose, by what they declared."""
        settings = self.ledger.settings
        declared = dict(
            zip(self.strategy.population, settings.declared_rows, strict=True)
        )
        rows = sum(declared.get(node_id, 0) for node_id in senders)
        return most_records(settings.sampling_probability * rows)

    def step(self, opened: Vector) -> Vector:
        """Return a descent: the gradient's sum over B, with its sign turned."""
        return -opened / self.ledger.settings.expected_batch_size
