"""Make what a federation across machines needs: certificates and the nodes' keys.

    python -m fedllm.commands.keys --out ~/federation/keys --server-name fl.example.org --nodes 3
    python -m fedllm.commands.keys --out ~/federation/keys --add-node clinic-d

The first makes a private certificate authority, the server's certificate and keys of
node-1, node-2 and node-3; the second one more node's key, best on that node's own
machine, so that the private key never travels. docs/deployment.md has the rest.
"""

import argparse
import shlex
import sys
from pathlib import Path

from fedllm.deployment.keys import (
    SUPERLINK_NAME,
    VALID_DAYS,
    add_node_key,
    make_key_folder,
)
from fedllm.errors import FedllmError


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.nodes < 0:
        parser.error(f"--nodes: must be >= 0 (got {args.nodes})")
    folder = Path(args.out).expanduser().absolute()
    try:
        if args.add_node is not None:
            said = _add_node(folder, args.add_node)
        else:
            said = _make_all(folder, args)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.write(said)


def _make_all(folder: Path, args: argparse.Namespace) -> str:
    """Make the folder, and say what lies where and what to type next."""
    nodes = [f"node-{number}" for number in range(1, args.nodes + 1)]
    names = [args.server_name, *args.server_ip]
    make_key_folder(folder, names, nodes, args.control_address)
    keys = "\n".join(f"  {folder / 'nodes' / node}" for node in nodes)
    register = "\n".join(_register(folder, node) for node in nodes)
    typed = {
        name: shlex.quote(str(folder / name))
        for name in ("config.toml", "ca.crt", "server.crt", "server.key")
    }
    return f"""\
keys: {folder} (certificates are valid for {VALID_DAYS // 365} years)
to every machine:
  {folder / "ca.crt"}
to the server:
  {folder / "server.crt"}
  {folder / "server.key"}
to one node each:
{keys}
to nobody; keep it off the network, or delete it:
  {folder / "ca.key"}
next, on the server's machine (docs/deployment.md has every step):
  mkdir -p ~/.flwr && cat {typed["config.toml"]} >> ~/.flwr/config.toml
  flower-superlink --port {args.control_address.rpartition(":")[2]} \
--ssl-ca-certfile {typed["ca.crt"]} --ssl-certfile {typed["server.crt"]} \
--ssl-keyfile {typed["server.key"]} --enable-supernode-auth --database superlink.db
then, while it runs:
{register}
"""


def _add_node(folder: Path, node: str) -> str:
    """Make one more key, and say what to do with it."""
    path = add_node_key(folder, node)
    return f"""\
private key, for that node alone: {path}
public key, for the server: {path}.pub
next, on the server's machine:
{_register(folder, node)}
"""


def _register(folder: Path, node: str) -> str:
    public = shlex.quote(str(folder / "nodes" / f"{node}.pub"))
    return f"  flwr supernode register --name {node} {public} {SUPERLINK_NAME}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the keys"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--server-name", metavar="NAME", help="name or address that nodes connect to"
    )
    what.add_argument(
        "--add-node", metavar="NAME", help="make one more node's key only"
    )
    parser.add_argument(
        "--server-ip",
        action="append",
        default=[],
        metavar="IP",
        help="a further address of the server; may be given more than once",
    )
    parser.add_argument(
        "--nodes", type=int, default=3, metavar="N", help="how many keys (default: 3)"
    )
    parser.add_argument(
        "--control-address",
        default="127.0.0.1:9191",
        metavar="HOST:PORT",
        help="where runs are started (default: the server's own machine, %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
