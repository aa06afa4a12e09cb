"""The released adapter as a node keeps it, until its owner trains a personal one from it.

    FEDLLM_HOME/personal/RUN/client-NUMBER/
        delivered.json   the run's settings, the node's config, the base's digest
        shared/          the released adapter, in PEFT's format and as it travelled
        personal/        the personal one, once it is trained (`client.personal`)

The server's last message only leaves the first two. It reads no row and starts no training,
and its reply is the same from every client: how long a training took would tell of its rows.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedllm.adapters.files import save_adapter
from fedllm.adapters.resolve import adapter_spec, with_kind
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.atomic_files import create_once, write_synced
from fedllm.client.node_config import NodeConfig
from fedllm.client.run_client import RunClient
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError, NodeError
from fedllm.strict_modes import make_strict_folder, require_strict_modes
from fedllm.wire.messages import (
    ADAPTER_KIND,
    ARRAYS,
    BASE_MODEL,
    CONFIG,
    read_global,
)

_ABOUT = "delivered.json"
SHARED_FOLDER, PERSONAL_FOLDER = "shared", "personal"
_TRAINED_FILE = "trained.safetensors"


@dataclass(frozen=True)
class Delivery:
    """What a run left with one client.

    Attributes:
        run_id: Flower's id of the run when it began.
        run_config: Every setting, flat, with the adapter's kind resolved.
        node: The client's node config.
        base_digest: Of the server's base model; None: the server named none.
    """

    run_id: int
    run_config: dict[str, bool | int | float | str]
    node: NodeConfig
    base_digest: str | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        name = f"client-{self.node.partition_id}"
        return _home() / str(self.run_id) / name

    @property
    def config(self) -> RunConfig:
        """The run config.

        Raises:
            ConfigError: Another version of fedllm wrote it.
        """
        return parse_run_config(self.run_config)


def keep_delivery(message: Message, client: RunClient) -> RecordDict:
    """Keep the released adapter, and return nothing.

    Of one run the first delivery is kept: a run that is resumed after its end brings the
    same adapter again.

    Raises:
        ConfigError: The run has no personal training, or others may write the folder.
        OSError: The folder cannot be written.
        ValueError: The server's arrays are not those of the adapter.
    """
    from fedllm.models.location import load_config, locate

    if not client.config.is_personal:
        raise ConfigError("personal.epochs: is 0.0, so no adapter is kept here")
    record = message.content.config_records[CONFIG]
    config = with_kind(client.config, record.get(ADAPTER_KIND))
    base_name = locate(config.model.name, fedllm_home())
    spec = adapter_spec(config.adapter, load_config(base_name), config.seed)
    arrays = read_global(
        message.content.array_records[ARRAYS], spec.trained_shapes, config.wire.encoding
    )
    digest = record.get(BASE_MODEL)
    delivery = Delivery(
        client.run_id,
        flat(config),
        _settled(client.node),
        None if digest is None else str(digest),
    )

    def fill(folder: Path) -> None:
        origin = {
            "model": config.model.name,
            "quantization": config.model.quantization,
            "server_round": config.num_server_rounds,
            "run": str(client.run_id),
        }
        write_adapter(folder / SHARED_FOLDER, spec, arrays, base_name, origin)
        about = json.dumps(asdict(delivery), indent=2)
        write_synced(folder / _ABOUT, about.encode())

    make_strict_folder(delivery.folder.parent)
    create_once(delivery.folder, fill, private=True)
    client.log.write(
        f"client {client.node.partition_id}: the released adapter is in {delivery.folder}; "
        f"train on from it by: fedllm node personal {client.run_id}"
    )
    return RecordDict()


def write_adapter(
    folder: Path,
    spec: AdapterSpec,
    arrays: Arrays,
    base_name: str,
    origin: Mapping[str, Any],
) -> None:
    """Write an adapter for PEFT, and beside it the trained values alone.

    The values cannot be had back from PEFT's file for every kind: `lora-core` multiplies its
    core into a factor.

    Args:
        folder: Where to.
        spec: The adapter.
        arrays: The trained values.
        base_name: As in `save_adapter`, like the last one.
        origin: What the adapter says of itself.
    """
    save_adapter(folder, spec, arrays, base_name, origin)
    write_synced(folder / _TRAINED_FILE, save(dict(arrays)))


def read_trained(folder: Path) -> Arrays:
    """Return the trained values of an adapter that `write_adapter` wrote.

    Raises:
        NodeError: They are missing or damaged.
    """
    path = folder / _TRAINED_FILE
    try:
        arrays: Arrays = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise NodeError(f"{path}: cannot be read: {error}") from None
    return arrays


def deliveries(run: str = "") -> list[Delivery]:
    """Return what runs have delivered here, the oldest first.

    Args:
        run: Flower's id of one run, or `RUN/client-NUMBER`; empty: all.

    Raises:
        ConfigError: Others may write the folder.
        NodeError: A file of it was edited or damaged.
    """
    paths = _home().glob(f"*/client-*/{_ABOUT}")
    chosen = [path for path in paths if run in _names(path.parent)]
    return [_read(path) for path in sorted(chosen, key=_age)]


def _names(folder: Path) -> tuple[str, ...]:
    """Return what an owner may call a delivery."""
    run = folder.parent.name
    return "", run, f"{run}/{folder.name}"


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, str(path)


def _read(path: Path) -> Delivery:
    """Read one delivery.

    Raises:
        ConfigError: Others may write it: it names the files that are trained on.
        NodeError: It is not what `keep_delivery` writes.
    """
    require_strict_modes(path)
    try:
        delivery = TypeAdapter(Delivery).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise NodeError(f"{path}: cannot be read as a delivery: {reason}") from None
    if delivery.folder != path.parent:
        raise NodeError(f"{path}: is of {delivery.folder}: was it moved?")
    return delivery


def _home() -> Path:
    return fedllm_home() / "personal"


def _settled(node: NodeConfig) -> NodeConfig:
    """Return a node config that means the same from any working folder."""
    if node.data_path is None:
        return node
    return replace(node, data_path=str(Path(node.data_path).expanduser().absolute()))
