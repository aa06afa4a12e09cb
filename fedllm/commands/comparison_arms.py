"""The arms of a comparison: their names, settings and clients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedllm.config import RunConfig, flat, parse_run_config

ARMS = ("base", "federated", "federated-dp", "centralised", "alone")
"""Each kind of arm; there is one of `alone` for each client."""


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
    if config.privacy.unit == "client":
        names.append("federated-dp")
    number = num_clients if alone is None else min(alone, num_clients)
    chosen = [i * num_clients // number for i in range(number)]
    return [*names, "centralised", *(f"alone-{i}" for i in chosen)]


def without_privacy(config: RunConfig) -> RunConfig:
    """Return a config without privacy that differs from the given one in nothing else."""
    mapping = {k: v for k, v in flat(config).items() if not k.startswith("privacy.")}
    mapping |= {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
    if mapping["strategy.sampling"] == "poisson":
        mapping["strategy.sampling"] = "fixed"
    return parse_run_config(mapping)


def centralised(config: RunConfig, num_clients: int) -> RunConfig:
    """Return a config of one client that sees as many examples as all together.

    With `train.local-epochs` one epoch over all rows is that already if all clients are
    sampled.
    """
    config = without_privacy(config)
    sampled = config.strategy.num_sampled(num_clients)
    train = config.train
    if train.local_steps:
        train = replace(train, local_steps=train.local_steps * sampled)
    else:
        epochs = train.local_epochs * sampled / num_clients
        train = replace(train, local_epochs=epochs)
    # One client has all rows under any partition, and `natural` refuses one client.
    data = replace(config.data, partition="iid")
    return _all_sampled(replace(config, data=data, train=train))


def _all_sampled(config: RunConfig) -> RunConfig:
    """Return a config whose only client takes part in every round."""
    strategy = replace(config.strategy, sampling="all", fraction_train=1.0)
    return replace(config, strategy=strategy)


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
        noise, and rounds that validation did not choose.
        """
        config, strategy = self.config, self.config.strategy
        strategy = replace(
            strategy,
            num_clients=0,
            fraction_evaluate=0.0,
            # Clients answer one after another, and each may take a round's time.
            round_timeout=strategy.round_timeout * len(self.nodes),
        )
        privacy = replace(config.privacy, noise_probe=False)
        output = replace(
            config.output, save_every=config.num_server_rounds, tracker="none"
        )
        return replace(config, strategy=strategy, privacy=privacy, output=output)


def make_arm(name: str, config: RunConfig, num_clients: int) -> Arm:
    """Return the settings and clients of a trained arm.

    Args:
        name: One of `arm_names`, but not the base.
        config: The run config, with an adapter kind that is not `auto`.
        num_clients: N.
    """
    nodes = [_node(index, num_clients) for index in range(num_clients)]
    if name == "federated-dp":
        return Arm(config, nodes)
    if name == "federated":
        return Arm(without_privacy(config), nodes)
    if name == "centralised":
        return Arm(centralised(config, num_clients), [_node(0, 1)])
    index = int(name.removeprefix("alone-"))
    return Arm(_all_sampled(without_privacy(config)), [nodes[index]])


def _node(partition_id: int, num_partitions: int) -> dict[str, int]:
    return {"partition-id": partition_id, "num-partitions": num_partitions}
