"""Check a run against the limits that the owner of a node sets."""

from fedllm.adapters.kinds import kind_of
from fedllm.client.node_config import DEFAULT_DELTA, NodeConfig
from fedllm.config import AdapterConfig, RunConfig
from fedllm.errors import ConfigError
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.node.delivered_app import is_chosen


def check_node_limits(node: NodeConfig, config: RunConfig) -> None:
    """Check a run against the limits in this node's own config.

    Raises:
        ConfigError: The run promises less than the node's owner demands.
    """
    _check_unit(node, config)
    _check_epsilon(node, config)
    _check_model(node, config)
    _check_persons(node, config)
    _check_plugin(node, config)
    _check_trust(node, config)
    privacy = config.privacy
    if node.delta is not None and not 0 < privacy.delta <= node.delta:
        raise ConfigError(
            f"privacy.delta: this node demands a set value of at most {node.delta} "
            f"(got {privacy.delta})"
        )


def trained_rank(node: NodeConfig, adapter: AdapterConfig) -> int | None:
    """Return how many columns of each factor this node trains; None: the run's whole rank.

    Args:
        node: The node config, of which `adapter-rank` is the most.
        adapter: The run's adapter, with a kind that is not `auto`.

    Raises:
        ConfigError: The run's rank is above that, and its kind has no smaller one inside.
    """
    kind, most = kind_of(adapter.kind), node.adapter_rank
    if most is None or not kind.has_rank or adapter.rank <= most:
        return None
    if kind.why_not_nested:
        raise ConfigError(
            f"adapter.rank: this node trains {most} at most (got {adapter.rank}), and "
            f"adapter.kind={adapter.kind!r} has no smaller rank inside: "
            f"{kind.why_not_nested}; 'ffa-lora' has"
        )
    return most


def rank_line(node: NodeConfig, adapter: AdapterConfig) -> str:
    """Return what the node's `adapter-rank` makes of a run, for its own log; empty: nothing."""
    most, rank = node.adapter_rank, trained_rank(node, adapter)
    if most is None:
        return ""
    if rank is None:
        return f"adapter-rank {most} is not below the run's, which is trained whole"
    return (
        f"adapter-rank: it trains the first {rank} of the run's {adapter.rank} columns, and "
        "its update of the others is zero"
    )


def _check_unit(node: NodeConfig, config: RunConfig) -> None:
    """Check the unit of privacy.

    An epsilon or delta without a guarantee behind it is below every limit, so a limit
    without a unit demands client level.
    """
    if config.is_joint and node.has_limits and node.privacy_noise != "joint":
        others = (
            "sums leave it under pads, and the trustees add the noise"
            if config.is_sealed
            else "sums leave it without noise and the server is trusted to add it"
        )
        raise ConfigError(
            f"privacy.noise: this node adds its noise itself (got 'joint', where {others}): "
            "its privacy-noise is "
            + ("not set" if node.privacy_noise is None else f"{node.privacy_noise!r}")
        )
    unit, got = node.privacy_unit, config.privacy.unit
    if node.max_epsilon is not None or node.delta is not None:
        unit = unit or "client"
    if unit is not None and unit != got:
        raise ConfigError(
            f"privacy.unit: this node demands {unit!r} (got {got!r})"
            + ("; its privacy-unit is not set" if node.privacy_unit is None else "")
        )


def _check_model(node: NodeConfig, config: RunConfig) -> None:
    """Check the base model.

    Its chat template is a program that runs on each row. Under record level a server could
    name one that takes long, or much memory, at a row of its choice.
    """
    wanted = node.model_name
    if wanted is None and node.has_limits and config.privacy.unit == "record":
        wanted = BUILT_IN_MODEL.name
    if wanted is not None and config.model.name != wanted:
        raise ConfigError(
            f"model.name: this node demands {wanted!r} (got {config.model.name!r})"
            + ("; its model-name is not set" if node.model_name is None else "")
        )


def _check_persons(node: NodeConfig, config: RunConfig) -> None:
    """Check that the run counts as persons what the node's owner says are persons.

    Any other column, of the server's choice, would break persons up or put several in one
    record. It is compared with the owner's word and never with the file: whether a column
    is there is something that rows hold.
    """
    if config.privacy.unit != "record" or node.is_simulated or not node.has_data:
        return
    wanted, got = node.person_column or "", config.data.person_column
    if got != wanted:
        raise ConfigError(
            f"data.person-column: this node demands {wanted!r} (got {got!r})"
            + (
                "; its person-column and declared-persons are not set"
                if node.person_column is None
                else ""
            )
        )


def _check_plugin(node: NodeConfig, config: RunConfig) -> None:
    """Check that a run calls no function of an installed package but one the owner named.

    An owner who lets the server choose the whole app has nothing to name.
    """
    plugin = config.train.plugin
    if plugin and plugin != node.train_plugin and is_chosen():
        raise ConfigError(
            "train.plugin: this node's owner allows "
            + ("none" if node.train_plugin is None else repr(node.train_plugin))
            + f" (got {plugin!r}): train-plugin in the node config names one"
        )


def _check_trust(node: NodeConfig, config: RunConfig) -> None:
    """Check who is trusted with this node's updates, and with the noise.

    A sealed run is worth nothing if the server chooses the code that seals, or introduces
    the trustees itself.
    """
    least, colluding = node.least_trustees, node.colluding_trustees
    if not config.is_sealed:
        if least is not None:
            raise ConfigError(
                f"privacy.trust: this node demands 'trustees', {least} at least (got "
                f"{config.privacy.trust!r} under unit {config.privacy.unit!r})"
            )
        return
    if least is not None and config.least_trustees < least:
        raise ConfigError(
            f"privacy.least-trustees: this node demands {least} (got "
            f"{config.least_trustees})"
        )
    if colluding is not None and config.privacy.colluding_trustees < colluding:
        raise ConfigError(
            f"privacy.colluding-trustees: this node demands {colluding} (got "
            f"{config.privacy.colluding_trustees})"
        )
    if node.is_simulated:
        return
    if node.has_data and not node.trusted_trustees:
        raise ConfigError(
            "privacy.trust: 'trustees' needs trusted-trustees in this node's config: keys of "
            "trustees that reached its owner without the server"
        )
    if not is_chosen():
        raise ConfigError(
            "privacy.trust: 'trustees' needs an app that this node's owner chose, and here "
            "the server chooses it: start the node by `fedllm supernode`, without --any-app"
        )


def _check_epsilon(node: NodeConfig, config: RunConfig) -> None:
    """Check the epsilon that the run promises, and the delta that it is meant at."""
    privacy, limit = config.privacy, node.max_epsilon
    if limit is None:
        return
    if node.delta is None and privacy.delta > DEFAULT_DELTA:
        raise ConfigError(
            f"privacy.delta: this node's max-epsilon is meant at {DEFAULT_DELTA:g} "
            f"or less, since it sets no delta (got {privacy.delta})"
        )
    if privacy.unit == "record":
        # This client's own ledger enforces the limit, whatever the run promises.
        return
    promised = [e for e in (privacy.target_epsilon, privacy.max_epsilon) if e > 0]
    if not promised or min(promised) > limit:
        raise ConfigError(
            f"privacy.target-epsilon: this node demands at most {limit} "
            f"(got {min(promised) if promised else 'no bound'})"
        )
