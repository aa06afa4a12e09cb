"""A personal adapter, made on the node from what a run delivered, and kept there.

    FEDLLM_HOME/personal/RUN/client-NUMBER/personal/
        adapter_model.safetensors, adapter_config.json   PEFT's format
        choice.json    losses of base, shared and personal on the node's held-out rows
        README.md      the card

No part of a message: the owner starts it, when no server waits for this node.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.files import read_base_name
from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import Arrays
from fedllm.atomic_files import create_once, write_synced
from fedllm.client.base_model import require_same_base
from fedllm.client.cache import personal_rows, resident_model
from fedllm.client.delivery import (
    PERSONAL_FOLDER,
    SHARED_FOLDER,
    Delivery,
    deliveries,
    read_trained,
    write_adapter,
)
from fedllm.client.log import ClientLog
from fedllm.client.machine_limits import fitted_to_machine
from fedllm.client.node_limits import trained_rank
from fedllm.config import fedllm_home
from fedllm.errors import NodeError
from fedllm.reporting.personal_card import personal_card

_CHOICE = "choice.json"


@dataclass(frozen=True)
class Choice:
    """What a client's held-out rows said.

    Attributes:
        folder: The personal adapter.
        choice: `base`, `shared` or `personal`.
        losses: Each of these -> loss on the rows that chose.
        rows: `training`, `stopping` and `choosing` -> how many.
    """

    folder: Path
    choice: str
    losses: dict[str, float]
    rows: dict[str, int]

    def __str__(self) -> str:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        return (
            f"chosen by {self.rows['choosing']} held-out rows: {self.choice} "
            f"(loss: {losses}); {self.folder}"
        )


def make_personal(delivery: Delivery) -> Choice:
    """Train the personal adapter of a delivery, unless it is there, and return the choice.

    Raises:
        AdapterError: The shared adapter is damaged, or not of this base.
        ConfigError: The base model is another than the server's.
        DataError: The client has too few rows, or they cannot be read.
        ModelError: The base model cannot be loaded.
        NodeError: What was made before is damaged.
        OSError: The folder cannot be written.
    """
    create_once(
        delivery.folder / PERSONAL_FOLDER,
        lambda folder: _fill(folder, delivery),
        private=True,
    )
    return read_choice(delivery)


def read_choice(delivery: Delivery) -> Choice:
    """Return the choice that `make_personal` wrote.

    Raises:
        NodeError: It is not there, or damaged.
    """
    folder = delivery.folder / PERSONAL_FOLDER
    path = folder / _CHOICE
    try:
        content = json.loads(path.read_text("utf-8"))
        return Choice(folder, content["choice"], content["losses"], content["rows"])
    except FileNotFoundError:
        raise NodeError(
            f"{folder}: there is no personal adapter yet: fedllm node personal "
            f"{delivery.run_id}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NodeError(f"{path}: cannot be read: {error}") from None


def latest_choice(run: str = "") -> tuple[Delivery, Choice]:
    """Return the newest delivery that has a personal adapter, and its choice.

    Args:
        run: As in `deliveries`.

    Raises:
        NodeError: There is none, or a file is damaged.
    """
    found = deliveries(run)
    made = [one for one in found if (one.folder / PERSONAL_FOLDER).is_dir()]
    if not made:
        raise NodeError(_nothing(run, found))
    return made[-1], read_choice(made[-1])


def wanted_deliveries(run: str = "") -> list[Delivery]:
    """Return the deliveries of one run: the named one, or the newest.

    Args:
        run: As in `deliveries`.

    Raises:
        NodeError: There is none, or a file is damaged.
    """
    found = deliveries(run)
    if not found:
        raise NodeError(_nothing(run, found))
    return [one for one in found if one.run_id == found[-1].run_id]


def _nothing(run: str, found: list[Delivery]) -> str:
    """Return why there is no personal adapter, on one line."""
    if found:
        return (
            f"there is no personal adapter yet: fedllm node personal {found[-1].run_id}"
        )
    what = f"run {run} has" if run else "no run has"
    return (
        f"{fedllm_home() / 'personal'}: {what} delivered an adapter here: a run with "
        "personal.epochs above 0.0 does so after its last round"
    )


def candidates(delivery: Delivery) -> tuple[AdaptedModel, dict[str, Arrays]]:
    """Return the resident model, and base, shared and personal by name.

    Raises:
        ConfigError: The base model is another than the server's.
        ModelError: The base model cannot be loaded.
        NodeError: An adapter is damaged.
    """
    config = delivery.config
    require_same_base(config.model.name, delivery.base_digest)
    rank = trained_rank(delivery.node, config.adapter)
    adapted: AdaptedModel = resident_model(config, rank).adapted
    return adapted, {
        "base": initial_arrays(adapted.spec),
        "shared": read_trained(delivery.folder / SHARED_FOLDER),
        "personal": read_trained(delivery.folder / PERSONAL_FOLDER),
    }


def _fill(folder: Path, delivery: Delivery) -> None:
    """Train, and write all that is kept of it."""
    from fedllm.evaluation.held_out_loss import held_out
    from fedllm.training.personal import train_personal

    config, node = delivery.config, delivery.node
    require_same_base(config.model.name, delivery.base_digest)
    log = ClientLog(node.partition_id, delivery.run_id)
    resident = resident_model(config, trained_rank(node, config.adapter))
    adapted: AdaptedModel = resident.adapted
    rows = personal_rows(resident, node, config, log)
    shared_folder = delivery.folder / SHARED_FOLDER
    shared = read_trained(shared_folder)

    def score(examples: Any) -> float:
        return held_out(
            adapted.model, examples, adapted.pad_token_id, config.train
        ).loss

    fitted = fitted_to_machine(config, node)
    made = train_personal(adapted, rows, shared, fitted, score)
    origin = {
        "model": config.model.name,
        "quantization": config.model.quantization,
        "server_round": config.num_server_rounds,
        "run": str(delivery.run_id),
        "personal": True,
    }
    base_name = read_base_name(shared_folder)
    write_adapter(folder, adapted.spec, made.search.arrays, base_name, origin)
    content = {
        "choice": made.choice,
        "losses": made.losses,
        "rows": {
            "training": len(rows.training),
            "stopping": len(rows.stopping),
            "choosing": len(rows.choosing),
        },
        "stopping_losses": made.search.losses,
        "learning_rate": made.search.learning_rate,
    }
    write_synced(folder / _CHOICE, (json.dumps(content, indent=2) + "\n").encode())
    card = personal_card(delivery.run_config, delivery.run_id, content)
    write_synced(folder / "README.md", card.encode())
