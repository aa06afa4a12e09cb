"""The arms of a comparison: their names, settings and clients.

A federation's arm is a run of the config's own rounds. Every other arm is one trainer that
seeks its own best: a client alone, a client that trains on from a federation's adapter, and
all data in one place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.config import PersonalConfig, RunConfig, flat
from fedllm.config_parsing import parse_run_config

FEDERATIONS = ("federated", "federated-dp")
"""Arms of all clients together."""
ARMS = ("base", *FEDERATIONS, "centralised", "alone", "personal")
"""Each kind of arm. There is one of `alone` for each client, and one of `personal` for each
of these clients and each federation."""


def arm_names(
    config: RunConfig, num_clients: int, alone: int | None = None
) -> list[str]:
    """Return the names of the arms, the most expensive last.

    Args:
        config: The run config.
        num_clients: N.
        alone: How many clients are trained alone, evenly spaced; None: all.
    """
    names = ["base", "federated"]
    if config.privacy.unit != "none":
        names.append("federated-dp")
    number = num_clients if alone is None else min(alone, num_clients)
    chosen = [i * num_clients // number for i in range(number)]
    federations = [name for name in names if name in FEDERATIONS]
    personal = [f"personal-{name}-{i}" for name in federations for i in chosen]
    return [*names, "centralised", *(f"alone-{i}" for i in chosen), *personal]


def kind_of(name: str) -> str:
    """Return the kind, one of ARMS, of an arm's name."""
    return name if name in ARMS else name.partition("-")[0]


def start_of(name: str) -> str:
    """Return the arm whose adapter an arm that is no federation starts from."""
    if kind_of(name) != "personal":
        return "base"
    return name.removeprefix("personal-").rpartition("-")[0]


def without_privacy(config: RunConfig) -> RunConfig:
    """Return a config without privacy that differs from the given one in nothing else."""
    mapping = {k: v for k, v in flat(config).items() if not k.startswith("privacy.")}
    mapping |= {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
    if mapping["strategy.sampling"] == "poisson":
        mapping["strategy.sampling"] = "fixed"
    return parse_run_config(mapping)


@dataclass(frozen=True)
class Arm:
    """One trained arm.

    Attributes:
        config: The run config that its clients get.
        nodes: Each client's node config.
    """

    config: RunConfig
    nodes: Sequence[Mapping[str, int]]

    @property
    def server_config(self) -> RunConfig:
        """The run config of its server, without what no table needs.

        The losses do not change: not asked are clients' own losses, the probe of the
        noise, and rounds that validation did not choose. Nothing is delivered: clients
        that train on are arms of their own.
        """
        config, strategy = self.config, self.config.strategy
        strategy = replace(
            strategy,
            fraction_evaluate=0.0,
            # Clients answer one after another, and each may take a round's time.
            round_timeout=strategy.round_timeout * len(self.nodes),
        )
        privacy = replace(config.privacy, noise_probe=False)
        output = replace(
            config.output, save_every=config.num_server_rounds, tracker="none"
        )
        return replace(
            config,
            strategy=strategy,
            privacy=privacy,
            output=output,
            personal=PersonalConfig(),
        )


def make_arm(name: str, config: RunConfig, num_clients: int) -> Arm:
    """Return the settings and clients of a federation's arm.

    Args:
        name: One of FEDERATIONS.
        config: The run config, with an adapter kind that is not `auto`.
        num_clients: N.
    """
    nodes = [_node(index, num_clients) for index in range(num_clients)]
    if name == "federated":
        config = without_privacy(config)
    # A sealed run goes by a hash of its settings, this one too: both sides have to have one.
    strategy = replace(config.strategy, num_clients=0)
    return Arm(replace(config, strategy=strategy), nodes)


def lone_client(
    name: str, config: RunConfig, num_clients: int
) -> tuple[RunConfig, dict[str, int]]:
    """Return the run config and the node config that name the rows of a lone trainer.

    Args:
        name: `centralised`, or one of `alone` or `personal`.
        config: The run config.
        num_clients: N.
    """
    config = without_privacy(config)
    if name == "centralised":
        # One client has all rows under any partition, and `natural` refuses one client.
        return replace(config, data=replace(config.data, partition="iid")), _node(0, 1)
    return config, _node(int(name.rpartition("-")[2]), num_clients)


def _node(partition_id: int, num_partitions: int) -> dict[str, int]:
    return {"partition-id": partition_id, "num-partitions": num_partitions}
