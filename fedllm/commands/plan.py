"""Plan a private federation: epsilon, noise, the loss to expect, better settings.

    fedllm plan --clients 20
    fedllm plan --clients 20 --rows 243 --epsilon 8
    fedllm plan --run-config configs/private-100.toml --epsilon 2
    fedllm plan --clients 20 --rounds 100 --noise-multiplier 0.02
    fedllm plan --run-config configs/record-level.toml --records 486

With --rows it first lists what clients of so many rows reach alone and by each way together.
No client is asked. A loss is expected only of a run like those that were measured; for any
other the nearest measured run is named. Nothing is loaded, except with `--probe`: it puts the
noise of all rounds into a fresh adapter of the real base model and scores that on the public
validation rows.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedllm.commands.options import (
    add_clients,
    add_json,
    add_run_config,
    main_of,
    new_parser,
    positive_int,
    read_settings,
    write_json,
)
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.planning.joint_noise import joint_plan
from fedllm.planning.noise import privacy_settings
from fedllm.planning.plan import count_trainable, plan_run
from fedllm.planning.plan_lines import plan_lines, record_plan_lines
from fedllm.planning.record_noise import record_plan
from fedllm.planning.way_lines import way_lines, ways_plan
from fedllm.privacy.ledger import Ledger, PrivacySettings

_DEFAULT_CLIENTS = 20


def run(args: argparse.Namespace) -> int:
    """Print the plan, for a person or as JSON."""
    config = _config(args)
    if config.privacy.unit == "record":
        plan = _record_plan(config, args)
        lines = record_plan_lines(config, plan)
    else:
        plan, lines = _client_plan(config, args)
    if args.rows is not None:
        clients = config.strategy.num_clients or _DEFAULT_CLIENTS
        plan["ways"] = ways_plan(clients, args.rows, plan["epsilon"])
        lines = [*way_lines(plan["ways"]), "", *lines]
    if args.json:
        write_json(plan)
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _client_plan(
    config: RunConfig, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Return the plan of client-level privacy, and its lines for a person.

    Raises:
        ConfigError: A flag's value cannot be used.
    """
    clients = config.strategy.num_clients or _DEFAULT_CLIENTS
    choice = choose_adapter(config, clients) if config.adapter.kind == "auto" else None
    if choice is not None:
        config = with_choice(config, choice)
    if args.trainable is not None and args.trainable < 1:
        raise ConfigError(f"--trainable: must be at least 1 (got {args.trainable})")
    d = args.trainable or count_trainable(config)
    settings = privacy_settings(config, clients, d)
    plan = plan_run(config, settings)
    plan["auto"] = choice.reason if choice is not None else None
    if args.plot:
        plan["plot"] = str(_write_plot(Path(args.plot), config.adapter.kind, plan))
    if args.probe:
        plan["noise_probe"] = _probe(config, settings)
    return plan, plan_lines(config, settings, plan)


def _config(args: argparse.Namespace) -> RunConfig:
    """Return the run config with the flags' values in place of its own."""
    settings = read_settings(args.run_config)
    flags = {
        "strategy.num-clients": args.clients,
        "num-server-rounds": args.rounds,
        "strategy.sampling": args.sampling,
        "strategy.fraction-train": args.fraction,
        "privacy.delta": args.delta,
        "adapter.kind": args.kind,
        "adapter.rank": args.rank,
        "adapter.target-modules": args.target_modules,
        "model.name": args.model,
    }
    if args.epsilon is not None:
        flags |= {"privacy.target-epsilon": args.epsilon}
        flags |= {"privacy.noise-multiplier": 0.0}
    if args.noise_multiplier is not None:
        flags |= {"privacy.noise-multiplier": args.noise_multiplier}
        flags |= {"privacy.target-epsilon": 0.0}
    if args.trustees is not None:
        names = ",".join(f"trustee-{number}" for number in range(1, args.trustees + 1))
        flags |= {"privacy.trust": "trustees", "privacy.trustees": names}
        flags |= {"privacy.colluding-trustees": args.colluding}
    settings.update({k: v for k, v in flags.items() if v is not None})
    config = parse_run_config(settings)
    if config.privacy.unit == "none":
        raise ConfigError(
            "privacy.unit: must be 'client' or 'record' to plan a run (got 'none')"
        )
    return config


def _record_plan(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Return the plan of one client with record-level privacy, or of all under `joint`.

    Raises:
        ConfigError: The number of its records is missing, or a flag is for client level
            only.
    """
    records = args.records or args.rows
    if records is None:
        raise ConfigError(
            "--records: is missing: under privacy.unit='record' give the number of rows "
            "of the client"
        )
    if args.probe or args.plot:
        raise ConfigError("--probe, --plot: are for privacy.unit='client' only")
    if config.is_joint:
        clients = config.strategy.num_clients or _DEFAULT_CLIENTS
        return joint_plan(config, records, clients)
    return record_plan(config, records)


def _write_plot(path: Path, kind: str, plan: dict[str, Any]) -> Path:
    """Draw the measured losses over the number of clients; return the absolute path.

    Raises:
        ConfigError: The file cannot be written, or is of no known kind.
    """
    from fedllm.planning.plot import draw

    try:
        draw(path, kind, plan)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path}: {error}") from None
    return path.absolute()


def _probe(config: RunConfig, settings: PrivacySettings) -> dict[str, float]:
    """Return the validation loss of a fresh adapter before and after the noise of all rounds.

    Raises:
        ConfigError: There are no public validation rows to score it on.
    """
    from fedllm.adapters.peft_model import initial_arrays
    from fedllm.adapters.resolve import adapter_spec
    from fedllm.config import fedllm_home
    from fedllm.evaluation.public_rows import PublicRows
    from fedllm.models.location import load_config, locate
    from fedllm.strategy.build import make_strategy
    from fedllm.strategy.sealed_dp import Roster
    from fedllm.strategy.server_noise import ServerNoise

    home = fedllm_home()
    location = locate(config.model.name, home)
    spec = adapter_spec(config.adapter, load_config(location), config.seed)
    public = PublicRows(config, home)
    arrays = initial_arrays(spec)
    before = public.validation_loss(arrays)
    if before is None:
        raise ConfigError(
            "--probe: there are no public validation rows; name some by "
            "data.public-validation"
        )
    clients = list(range(settings.population_size))
    with tempfile.TemporaryDirectory(prefix="fedllm-plan-") as folder:
        ledger = Ledger.create(Path(folder) / "privacy.json", settings)
        # Nobody is asked: of a sealed run's trustees the noise alone counts.
        roster = Roster("", [], 0, lambda sent: []) if config.is_sealed else None
        strategy = make_strategy(config, arrays, clients, ledger, roster)
        assert isinstance(strategy, ServerNoise)
        after = public.validation_loss(strategy.noise_alone())
    assert after is not None
    return {"before": before, "noise_alone": after}


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("plan", __doc__)
    add_run_config(parser)
    add_clients(parser, f"clients of the run (default: {_DEFAULT_CLIENTS})")
    parser.add_argument("--rounds", type=int, help="rounds of the run")
    parser.add_argument(
        "--epsilon", type=float, help="calibrate the noise to this epsilon"
    )
    parser.add_argument(
        "--noise-multiplier",
        type=float,
        help="noise multiplier; epsilon follows from it",
    )
    parser.add_argument(
        "--records", type=int, help="records of each client, with privacy.unit='record'"
    )
    parser.add_argument(
        "--rows",
        type=positive_int,
        help="rows of each client: what they reach alone, and by each way together",
    )
    parser.add_argument("--delta", type=float, help="delta of (epsilon, delta)")
    parser.add_argument("--sampling", help="all, fixed or poisson")
    parser.add_argument(
        "--fraction", type=float, help="share of the clients in a round"
    )
    parser.add_argument(
        "--trustees",
        type=int,
        metavar="K",
        help="trustees that open each round, so that the server is not trusted",
    )
    parser.add_argument(
        "--colluding",
        type=int,
        default=1,
        metavar="C",
        help="how many of them may help the server (default: %(default)s)",
    )
    parser.add_argument("--kind", help="kind of adapter")
    parser.add_argument("--rank", type=int, help="rank of the adapter")
    parser.add_argument("--target-modules", help="modules that the adapter changes")
    parser.add_argument("--model", help="base model")
    parser.add_argument("--trainable", type=int, help="trained values, if known")
    parser.add_argument(
        "--probe", action="store_true", help="score the noise on the real base model"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the measured losses over clients"
    )
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
