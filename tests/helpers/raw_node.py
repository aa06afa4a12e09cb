"""A node that speaks Flower's Fleet API by itself, as a modified SuperNode would."""

import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.interceptors.http.runtime_version import (
    RuntimeVersionHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor


class RawNode:
    """One registered key and what it can ask of the SuperLink, through the gate.

    Args:
        key: The private key's file, as `fedllm keys` made it.
        address: host:port of the gate.
        ca: The certificate that signed the gate's.
    """

    def __init__(self, key: Path, address: str, ca: Path) -> None:
        private: Any = load_ssh_private_key(key.read_bytes(), None)
        self.public = public_key_to_bytes(private.public_key())
        self.client = FleetHttpClient.from_server_address(
            address,
            False,
            ca.read_bytes(),
            [
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
        )
        self.node = Node()

    def __enter__(self) -> "RawNode":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def activate(self) -> int:
        """Go online, and return the node's id."""
        request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=600)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        return int(self.node.node_id)

    def pull_message(self, seconds: float = 90) -> tuple[Message, ObjectTree]:
        """Wait for an instruction; its content is not fetched."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
            if answer.messages_list:
                message = message_from_proto(answer.messages_list[0])
                return message, answer.message_object_trees[0]
            time.sleep(0.3)
        raise AssertionError("no instruction came")

    def inflate(self, message: Message, tree: ObjectTree) -> Message:
        """Fetch an instruction's content, as a SuperNode does."""
        run_id = message.metadata.run_id
        whole = pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: self._fetch(run_id, object_id),
            lambda object_id: self.confirm(run_id, object_id),
            return_type=Message,
            # A server that is slow is sending its objects while we fetch them.
            max_time=60,
        )
        whole.metadata.__dict__["_message_id"] = message.metadata.message_id
        return whole

    def _fetch(self, run_id: int, object_id: str) -> bytes:
        """Return the bytes of an object that is on its way, or raise as a SuperNode does."""
        if (content := self.content_of(run_id, object_id)) is not None:
            return content
        if self.is_known(run_id, object_id):
            raise ObjectUnavailableError(object_id)
        raise ObjectPullError(object_id, "it is not there")

    def content_of(self, run_id: int, object_id: str) -> bytes | None:
        """Return the bytes of an object of any sender; None if there is no such object."""
        request = PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
        answer = self.client.PullObject(request)
        return answer.object_content if answer.object_available else None

    def is_known(self, run_id: int, object_id: str) -> bool:
        """Return whether the SuperLink has heard of an object."""
        request = PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
        return bool(self.client.PullObject(request).object_found)

    def confirm(self, run_id: int, message_id: str) -> None:
        """Have an object deleted, as after receipt."""
        request = ConfirmMessageReceivedRequest(
            node=self.node, run_id=run_id, message_object_id=message_id
        )
        self.client.ConfirmMessageReceived(request)

    def push(
        self, reply: Message, named: Iterable[RecordDict] = (), sends: bool = True
    ) -> None:
        """Send a reply.

        Args:
            reply: The reply, under whatever name it bears.
            named: Contents whose objects it claims to hold too and does not send.
            sends: Whether to send the objects that it does hold.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree = get_object_tree(reply)
        further = {content.object_id: content for content in named}
        held = {child.object_id for child in tree.children}
        tree.children.extend(
            get_object_tree(further[name]) for name in sorted(further.keys() - held)
        )
        answer = self.client.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[1.0],
            )
        )
        wanted = set(answer.objects_to_push) if sends else set()
        for part in _parts(reply):
            if part.object_id in wanted:
                wanted.discard(part.object_id)
                self.client.PushObject(
                    PushObjectRequest(
                        node=self.node,
                        run_id=reply.metadata.run_id,
                        object_id=part.object_id,
                        object_content=part.deflate(),
                        session_id=answer.session_id,
                    )
                )


def unfinished_request(
    port: int, ca: Path, public_key: bytes, declared: int, sent: int
) -> ssl.SSLSocket:
    """Send a request's head and a part of its body, and return the open connection."""
    context = ssl.create_default_context(cafile=ca)
    connection = context.wrap_socket(
        socket.create_connection(("127.0.0.1", port), 10), server_hostname="localhost"
    )
    head = (
        f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost:{port}\r\n"
        "Content-Type: application/protobuf\r\n"
        f"Flwr-Public-Key: {b64encode(public_key).decode()}\r\n"
        f"Content-Length: {declared}\r\n\r\n"
    )
    try:
        connection.sendall(head.encode() + bytes(sent))
    except OSError:
        connection.close()  # cut off already
    return connection


def _parts(sent: Any) -> Iterable[Any]:
    """Yield an object and all below it."""
    for child in (sent.children or {}).values():
        yield from _parts(child)
    yield sent
