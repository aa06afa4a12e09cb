"""A client's part of a round whose server is not trusted: its update leaves encrypted.

The order: what the server says of the slot is checked against the node's own config; run and
slot are charged, on disk; only then anything is computed. From there on the reply is the same
for whoever cannot open it: whatever fails is an update of zero, sealed as any other.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from flwr.app import Message, RecordDict

from fedllm.client.failures import code_of
from fedllm.client.node_budget import asked_of, charge_run, promise_of
from fedllm.client.node_config import NodeConfig
from fedllm.client.record_budget import SMALLEST_NOISE
from fedllm.client.record_steps import declared_number
from fedllm.client.run_client import RunClient
from fedllm.client.sealed_roles import client_slots, pins_of, trustee_of
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.agreement import Certificate, SlotSettings, parse_certificates
from fedllm.privacy.mechanism import Integers, checked_update
from fedllm.privacy.pads import add_pad, fresh_seed, public_key_bytes, residues, seal
from fedllm.privacy.sealed_sum import SealedGrid
from fedllm.wire.messages import ARRAYS, CONFIG
from fedllm.wire.resumed_run import run_name
from fedllm.wire.sealed_messages import (
    CERTIFICATES,
    PACKETS,
    RUN_NAME,
    SLOT,
    adapter_digest,
    hello_content,
    sealed_content,
    tally_content,
)

Arrays = Mapping[str, npt.NDArray[np.float32]]
Train = Callable[[], tuple[Arrays, Arrays]]
"""Trains, and returns the trained arrays and those that the server sent."""


def sealed_reply(message: Message, client: RunClient, train: Train) -> RecordDict:
    """Charge the slot, train, and return the update, padded and sealed to the trustees.

    Guarantee:
        A client answers a slot at most once. Whatever `train` does, what leaves is d
        values modulo 2^32 and one packet for each trustee, and the values are uniform for
        who lacks one of the pads. The integers below the pads have a norm of at most A.

    Raises:
        BudgetError: The run would pass the node's limit, or the slot was answered.
        PrivacyError: The slot is not what this node's owner and the run config demand.
    """
    settings = agreed_slot(message, client)
    config, run_id, attempt = client.config, client.run_id, client.attempt
    asked = asked_of(config, run_id, attempt, settings.slot)
    charge_run(config, client.node, asked, client.log)
    spend_slot(client, settings)
    return under_pads(_integers(client, settings, train), settings)


def spend_slot(client: RunClient, settings: SlotSettings) -> None:
    """Enter a slot as answered by this client, on disk.

    Raises:
        BudgetError: It was answered, or a later one was.
        PrivacyError: The ledger cannot be trusted or written.
    """
    client_slots(client).spend(
        f"{settings.run} {client.node.partition_id}", settings.slot
    )


def under_pads(integers: Integers, settings: SlotSettings) -> RecordDict:
    """Return the reply of a slot: integers under a pad of each trustee, and its packet.

    Guarantee:
        Its form and size are functions of the settings. The values are uniform for who lacks
        one of the pads.
    """
    padded, packets = residues(integers), []
    for name, key in settings.trustees:
        seed = fresh_seed()
        add_pad(padded, seed)
        packets.append(seal(seed, bytes.fromhex(key), settings.info(name)))
    return sealed_content(padded, packets)


def say_hello(message: Message, client: RunClient) -> RecordDict:
    """Return what this node is: its certificate of the run if it is a trustee; if it has data.

    The floors of the node's owner were checked: a node that replies will take part. At record
    level a client declares its number of rows beside that.

    Raises:
        ConfigError: Its key cannot be used, or it has data and declares no rows.
        DataError: A virtual client's rows cannot be read.
        PrivacyError: The run has another name, or its ledger cannot be trusted.
    """
    run = message.content.config_records[CONFIG].get(RUN_NAME)
    if run != run_name(client.config, client.run_id):
        raise PrivacyError(f"the server names another run ({run!r})")
    has_data, rows, certificate = client.node.has_data, None, None
    if has_data and client.config.is_joint:
        rows = declared_number(client)
    trustee = trustee_of(client)
    if trustee is not None:
        certificate = trustee.certificate(str(run), client.config.privacy.post_quantum)
    return hello_content(certificate, has_data, rows)


def tally(message: Message, client: RunClient) -> RecordDict:
    """Return what this trustee opens of a slot, with its noise; no row is read.

    Raises:
        BudgetError: The slot was answered.
        ConfigError: The node is no trustee of the run, or its key cannot be used.
        PrivacyError: The slot is not what the owner and the run config demand.
    """
    record = message.content.config_records[CONFIG]
    settings = SlotSettings.parse(record.get(SLOT))
    require_promised(settings, client)
    trustee = trustee_of(client)
    if trustee is None:
        raise ConfigError("trustee-name: this node is no trustee of the run")
    sent = record.get(PACKETS)
    packets = [p for p in sent if type(p) is bytes] if isinstance(sent, list) else []
    if not isinstance(sent, list) or len(packets) != len(sent):
        raise PrivacyError("the packets of the slot cannot be read")
    result = trustee.tally(settings, packets)
    return tally_content(result.vector, result.unopened)


def agreed_slot(message: Message, client: RunClient) -> SlotSettings:
    """Return the settings of the slot.

    Raises:
        PrivacyError: They are not what this node's owner and the run config demand.
    """
    record = message.content.config_records[CONFIG]
    settings = SlotSettings.parse(record.get(SLOT))
    certificates = parse_certificates(record.get(CERTIFICATES))
    require_promised(settings, client)
    server_round = record["server-round"]
    if server_round != settings.slot:
        raise PrivacyError(f"slot {settings.slot}: is not of round {server_round!r}")
    if adapter_digest(message.content.array_records[ARRAYS]) != settings.adapter:
        raise PrivacyError("the adapter of the slot is not the one that was sent")
    _require_trusted(settings, certificates, client)
    return settings


def require_promised(settings: SlotSettings, client: RunClient) -> None:
    """Check a slot's settings against the run config and the node's floors.

    Raises:
        PrivacyError: It is of another run, or promises less.
    """
    config, node = client.config, client.node
    if settings.run != run_name(config, client.run_id):
        raise PrivacyError(f"the slot is of another run ({settings.run!r})")
    if settings.planned_slots != config.num_server_rounds:
        raise PrivacyError(
            f"num-server-rounds: the slot's settings plan {settings.planned_slots} (the run "
            f"config {config.num_server_rounds})"
        )
    promised = _promised_noise(config)
    if not settings.noise_multiplier >= promised * (1 - 1e-9):
        raise PrivacyError(
            f"privacy.noise-multiplier: the run promises {promised:.4g} (the slot's settings "
            f"have {settings.noise_multiplier:.4g})"
        )
    if not 0 < settings.clipping_norm < math.inf:
        raise PrivacyError("privacy.clipping-norm: must be above 0")
    is_by_record = settings.num_records > 0 and settings.total_rows > 0
    if is_by_record != config.is_joint:
        raise PrivacyError(
            f"privacy.unit: is {config.privacy.unit!r}, and the slot's settings are of "
            f"{settings.num_records} records of {settings.total_rows}"
        )
    _require_floors(settings, config, node)


def _promised_noise(config: RunConfig) -> float:
    """Return the least z that the run config promises.

    At record level a target is kept by each client's own ledger, since the noise that it
    needs depends on what all clients declare.
    """
    if config.is_joint:
        return max(config.privacy.noise_multiplier, SMALLEST_NOISE)
    return promise_of(config).noise_multiplier


def _require_floors(
    settings: SlotSettings, config: RunConfig, node: NodeConfig
) -> None:
    """Check the numbers of trustees, and of those that may help the server."""
    least = max(config.least_trustees, node.least_trustees or 0)
    if len(settings.trustees) < least:
        raise PrivacyError(
            f"least-trustees: {least} have to open a round (the slot's settings name "
            f"{len(settings.trustees)})"
        )
    colluding = max(config.privacy.colluding_trustees, node.colluding_trustees or 0)
    if settings.colluding < colluding:
        raise PrivacyError(
            f"colluding-trustees: the noise has to be enough without {colluding} trustees "
            f"(the slot's settings count {settings.colluding})"
        )


def _require_trusted(
    settings: SlotSettings, certificates: Sequence[Certificate], client: RunClient
) -> None:
    """Check that the keys of the slot are those of trustees whom the owner knows."""
    named = tuple((entry.name, entry.key) for entry in certificates)
    if named != settings.trustees:
        raise PrivacyError("the slot's settings name other keys than its certificates")
    pins, now = pins_of(client), time.time()
    length = public_key_bytes(client.config.privacy.post_quantum)
    for certificate in certificates:
        certificate.verify(settings.run, pins, now)
        if len(bytes.fromhex(certificate.key)) != length:
            raise PrivacyError(
                f"trustee {certificate.name}: privacy.post-quantum is "
                f"{str(client.config.privacy.post_quantum).lower()}, and its key of the run "
                "is of the other kind"
            )


def _integers(client: RunClient, settings: SlotSettings, train: Train) -> Integers:
    """Return the clipped update on the slot's grid; zero if anything fails."""
    grid = settings.grid
    try:
        trained, received = train()
        integers = _encoded(trained, received, grid, settings)
    except Exception as error:  # noqa: BLE001 - a failure is an update of zero
        client.log.write_failure(code_of(error), error)
        return np.zeros(settings.size, np.int64)
    return integers


def _encoded(
    trained: Arrays, received: Arrays, grid: SealedGrid, settings: SlotSettings
) -> Integers:
    """Return the clipped update in the order of the sorted names."""
    reference = {name: received[name] for name in sorted(received)}
    checked = checked_update(trained, reference, math.inf)
    if checked.update is None:
        raise PrivacyError(f"the trained adapter cannot be used: {checked.reason}")
    if len(checked.update) != settings.size:
        raise PrivacyError(
            f"the slot has {settings.size} values, and the adapter {len(checked.update)}"
        )
    return grid.encode(checked.update, settings.clipping_norm)
