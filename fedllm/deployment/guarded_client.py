"""Flower's `flwr-clientapp`, which runs only an app that the node's owner chose.

`fedllm supernode` puts it in the place of Flower's program: in each forked child, and in
`programs/flwr-clientapp` if none can be forked. In this process, and on no disk, two
functions of Flower's module are replaced before its own command runs: those that unpack
and load an app. They ask for the owner's choice first. The programs of other names in
`programs/` come here too, to be refused with an answer: a SuperNode waits for one.
"""

import atexit
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from flwr.app import Context, Message
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
from flwr.supernode.runtime import run_clientapp

from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.deployment.supernode import APPROVE, SUPERLINK
from fedllm.errors import FedllmError, NodeError
from fedllm.logs import show_log
from fedllm.node.approvals import ALL, EACH, Request, take
from fedllm.node.delivered_app import (
    CHOICE,
    CLIENT_APP,
    INSTALLED,
    require_chosen,
)
from fedllm.node.log import append
from fedllm.wire.messages import (
    CONFIG,
    ERROR,
    LEDGER_HEAD,
    LEDGER_KEY,
    LEDGER_SIGNATURE,
    error_content,
)
from fedllm.wire.resumed_run import original_context

logger = logging.getLogger("fedllm.deployment.guarded_client")

# Set by the programs of other names in `programs/`.
_REFUSED_PROGRAM = "FEDLLM_REFUSED"
_LEDGER_ENTRIES = (LEDGER_HEAD, LEDGER_KEY, LEDGER_SIGNATURE)
_MOST_OF_AN_END = 500

_Client = Callable[[Message, Context], Message]


def main() -> None:
    """Run one message's client."""
    guard = _Guard(
        os.environ.get(CHOICE, INSTALLED), os.environ.get(_REFUSED_PROGRAM, "")
    )
    guard.stand_before(run_clientapp)
    flwr_clientapp()


class _Guard:
    """Stands between Flower and the app of one message.

    Args:
        choice: The owner's, as `require_chosen` takes it.
        program: Name of a program that no node runs; empty: a client's.
    """

    def __init__(self, choice: str, program: str) -> None:
        self._choice = choice
        self._program = program
        self._app_hash = ""
        self._refusal: NodeError | None = None

    def stand_before(self, flower: Any) -> None:
        """Replace what unpacks and loads an app in Flower's module."""
        install, get_loader = flower.install_from_fab, flower.get_load_client_app_fn

        def install_chosen(app: bytes, **options: Any) -> None:
            self._judge(app)
            if self._refusal is None and self._choice != INSTALLED:
                _take_a_flower_home()
                install(app, **options)

        def get_guarded_loader(**options: Any) -> Callable[..., _Client]:
            load = get_loader(**options)
            return lambda *app: self._around(lambda: self._client(load, *app))

        flower.install_from_fab = install_chosen
        flower.get_load_client_app_fn = get_guarded_loader

    def _judge(self, app: bytes) -> None:
        """Decide about an app by its own bytes, not by the hash that came with it."""
        self._app_hash = hashlib.sha256(app).hexdigest()
        try:
            if self._program:
                raise NodeError(f"{self._program}: this node runs clients only")
            require_chosen(app, self._choice)
        except NodeError as error:
            show_log()
            logger.warning("not approved: %s", error)
            self._refusal = error

    def _client(self, load: Callable[..., _Client], *app: str) -> _Client:
        """Return the client that may run, or one that refuses."""
        if self._refusal is not None:
            return _refuse
        if self._choice != INSTALLED:
            # Otherwise the app's own modules would be this package's.
            for name in list(sys.modules):
                if name == "fedllm" or name.startswith("fedllm."):
                    del sys.modules[name]
            return load(*app)
        # By its name, as Flower loads it: the two apps lie above this package.
        module, _, name = CLIENT_APP.partition(":")
        installed: _Client = getattr(import_module(module), name)
        return installed

    def _around(self, get_client: Callable[[], _Client]) -> _Client:
        """Return a client whose question and answer are in the node's log.

        The app is imported after the owner's approval of the run was looked up.
        """

        def logged(message: Message, context: Context) -> Message:
            try:
                self._require_approval(message, context)
                append("asked", **self._facts(message, context))
                reply = get_client()(message, context)
                append("answered", run_id=context.run_id, **_answer(reply))
            except FedllmError as error:
                # Flower would send the text to the server.
                show_log()
                logger.error("nothing was answered: %s", error)
                return Message(error_content("failed", None), reply_to=message)
            return reply

        return logged

    def _require_approval(self, message: Message, context: Context) -> None:
        """Count the message against the owner's approval, if the run needs one."""
        policy = os.environ.get(APPROVE, EACH)
        if self._refusal is not None or policy == ALL:
            return
        try:
            # What the client will use: of a resumed run the original settings.
            settings = original_context(message, context).run_config
            if self._choice == INSTALLED:
                settings = flat(parse_run_config(settings))
            request = Request(self._app_hash, settings)
            take(request, message.metadata.message_type, policy)
        except FedllmError as error:
            show_log()
            logger.warning("not approved: %s", error)
            self._refusal = NodeError(str(error))

    def _facts(self, message: Message, context: Context) -> dict[str, Any]:
        """Return who asks what, for the log."""
        settings = json.dumps(dict(context.run_config), sort_keys=True)
        return {
            "superlink": os.environ.get(SUPERLINK, ""),
            "run_id": context.run_id,
            "message_type": message.metadata.message_type,
            "app": self._app_hash,
            "config": hashlib.sha256(settings.encode()).hexdigest(),
            "refused": None if self._refusal is None else str(self._refusal),
            **_ledger_end(message),
        }


def _refuse(message: Message, context: Context) -> Message:
    """Answer in the place of an app that the owner has not chosen."""
    return Message(error_content("not-approved", None), reply_to=message)


def _ledger_end(message: Message) -> dict[str, Any]:
    """Return the round that is asked for, and what the server signs of its ledger, unchecked.

    With it the node's owner can show which rounds a dossier of that run must have.
    """
    record: Mapping[str, Any] = message.content.config_records.get(CONFIG) or {}
    server_round = record.get("server-round")
    known: dict[str, Any] = {}
    if type(server_round) is int:
        known["round"] = server_round
    ends = {name: record.get(name) for name in _LEDGER_ENTRIES}
    if all(isinstance(e, str) and len(e) <= _MOST_OF_AN_END for e in ends.values()):
        known |= ends
    return known


def _answer(reply: Message) -> dict[str, Any]:
    """Return what left the node, for the log: a code, or bytes of arrays."""
    if reply.has_error():
        return {"code": "failed"}
    error = reply.content.config_records.get(ERROR)
    code = None if error is None else error.get("code")
    records = reply.content.array_records.values()
    num_bytes = sum(len(array.data) for record in records for array in record.values())
    return {"code": code, "num_bytes": num_bytes}


def _take_a_flower_home() -> None:
    """Give this process a Flower home of its own, which ends with it.

    Flower names an app's folder by 8 digits of its hash and uses one that is there as it
    is: an earlier run's code, an edited one, or the rest of a killed install.
    """
    folder = tempfile.mkdtemp(prefix="fedllm-app-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["FLWR_HOME"] = folder


if __name__ == "__main__":
    sys.argv[0] = "flwr-clientapp"
    main()
