"""Make what a federation across machines needs: certificates and the nodes' keys.

    fedllm keys --out ~/federation/keys --server-name fl.example.org --nodes 3
    fedllm keys --out ~/federation/keys --add-node clinic-d
    fedllm keys --out ~/federation/keys --add-reviewer alice
    fedllm keys --out ~/federation/keys --add-trustee berlin
    fedllm keys --out ~/federation/keys --write-gate
    fedllm keys --out ~/federation/keys --check
    fedllm keys --out ~/federation/keys --renew-server
    fedllm keys --app-hash

The first makes a private certificate authority, the server's certificate and the keys of
node-1, node-2 and node-3. The second makes one more node's key: run it on that node's own
machine, so that the private key never travels. The third makes the key of a reviewer, who
approves runs for many nodes (`fedllm node sign`). The fourth makes a trustee's, who opens
the rounds of sealed runs: run it on that trustee's own machine. The fifth writes gate.caddy
anew, on the server, after a public key came to nodes/ or left it. The sixth says how long
the certificates are valid, with exit status 1 in the last 30 days; the seventh renews the
server's, where ca.key is. The last prints the SHA-256 of the app that lies here, for
`fedllm supernode --pin-app`. docs/deployment.md has the rest.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fedllm.commands.options import (
    add_json,
    add_out,
    main_of,
    new_parser,
    write_json,
)
from fedllm.deployment.certificates import (
    SERVER_DAYS,
    days_left,
    expiry_warning,
    load_certificate,
)
from fedllm.deployment.gate import GATE_FILE, write_gate
from fedllm.deployment.keys import (
    SUPERLINK_NAME,
    add_node_key,
    add_reviewer_key,
    add_trustee_key,
    make_key_folder,
    renew_server,
)

_RESTART = "start the gate anew, which reads it then"


def run(args: argparse.Namespace) -> int:
    """Make the keys; print where they belong and what to type next."""
    if args.nodes < 0:
        raise argparse.ArgumentError(None, f"--nodes: must be >= 0 (got {args.nodes})")
    if args.app_hash:
        return _print_app_hash(args.json)
    if args.out is None:
        raise argparse.ArgumentError(None, "--out: is needed")
    folder = Path(args.out).expanduser().absolute()
    if args.write_gate:
        return _write_gate(folder, args.json)
    if args.check:
        return _check(folder, args.json)
    if args.renew_server:
        return _renew(folder, args.json)
    if args.add_node is not None:
        path = add_node_key(folder, args.add_node)
        text = _node_text(folder, args.add_node)
        nodes = {args.add_node: _pair(path)}
        report: dict[str, Any] = {"nodes": nodes}
    elif args.add_reviewer is not None:
        path = add_reviewer_key(folder, args.add_reviewer)
        text = _reviewer_text(path)
        report = {"reviewers": {args.add_reviewer: _pair(path)}}
    elif args.add_trustee is not None:
        path, pin = add_trustee_key(folder, args.add_trustee)
        text = _trustee_text(path, pin)
        trustee = {**_pair(path), "pin": f"{args.add_trustee}:{pin}"}
        report = {"trustees": {args.add_trustee: trustee}}
    else:
        names = [f"node-{number}" for number in range(1, args.nodes + 1)]
        server_names = [args.server_name, *args.server_ip]
        make_key_folder(folder, server_names, names, args.control_address)
        text = _folder_text(folder, names, args.control_address)
        nodes = {name: _pair(folder / "nodes" / name) for name in names}
        files = (
            "ca.crt",
            "ca.key",
            "server.crt",
            "server.key",
            "config.toml",
            GATE_FILE,
        )
        report = {name: str(folder / name) for name in files} | {"nodes": nodes}
    if args.json:
        write_json(report)
    else:
        sys.stdout.write(text)
    return 0


def _print_app_hash(is_json: bool) -> int:
    """Print the SHA-256 of the bundle that Flower makes of the app that lies here."""
    import hashlib

    from flwr.cli.build import build_fab_from_disk

    from fedllm.config import fedllm_home
    from fedllm.deployment.simulation import find_app

    folder = find_app(None, fedllm_home())
    digest = hashlib.sha256(build_fab_from_disk(folder)).hexdigest()
    if is_json:
        write_json({"app": str(folder), "sha256": digest})
    else:
        sys.stdout.write(f"{digest}\n")
    return 0


def _write_gate(folder: Path, is_json: bool) -> int:
    """Write the list of nodes that the gate lets through."""
    path = write_gate(folder)
    nodes = sorted(public.stem for public in (folder / "nodes").glob("*.pub"))
    if is_json:
        write_json({"gate": str(path), "nodes": nodes})
    else:
        sys.stdout.write(f"{path}: {', '.join(nodes) or 'no node'}; {_RESTART}\n")
    return 0


def _check(folder: Path, is_json: bool) -> int:
    """Print how long each certificate is valid; return 1 if one needs renewal."""
    paths = [folder / name for name in ("ca.crt", "server.crt")]
    warnings = [line for path in paths if (line := expiry_warning(path))]
    days = {path.name: int(days_left(load_certificate(path))) for path in paths}
    if is_json:
        write_json({"days_left": days, "warnings": warnings})
    else:
        lines = warnings or [f"{name}: valid for {n} days" for name, n in days.items()]
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if warnings else 0


def _renew(folder: Path, is_json: bool) -> int:
    """Renew the server's certificate and key."""
    path = renew_server(folder)
    if is_json:
        write_json({"certificate": str(path), "key": str(path.with_suffix(".key"))})
    else:
        sys.stdout.write(
            f"{path}: valid for {SERVER_DAYS} days; bring it and server.key to the server, "
            "take ca.key away again, and start SuperLink and gate anew\n"
        )
    return 0


def _pair(path: Path) -> dict[str, str]:
    return {"private": str(path), "public": f"{path}.pub"}


def _folder_text(folder: Path, nodes: list[str], control_address: str) -> str:
    """Return where each file of a new folder belongs, and what to type next."""
    keys = "\n".join(f"  {folder / 'nodes' / node}" for node in nodes)
    register = "\n".join(_register(folder, node) for node in nodes)
    config = shlex.quote(str(folder / "config.toml"))
    port = control_address.rpartition(":")[2]
    return f"""\
keys: {folder} (the server's certificate is valid for {SERVER_DAYS} days)
to every machine:
  {folder / "ca.crt"}
to the server:
  {folder / "server.crt"}
  {folder / "server.key"}
  {folder / GATE_FILE}
to one node each:
{keys}
to nobody; keep it off the network, for the renewal of the server's certificate:
  {folder / "ca.key"}
next, on the server's machine (docs/deployment.md has every step):
  mkdir -p ~/.flwr && cat {config} >> ~/.flwr/config.toml
  fedllm superlink --keys {shlex.quote(str(folder))} --port {port}
then, while it runs:
{register}
"""


def _node_text(folder: Path, node: str) -> str:
    """Return where one more node's key belongs, and what to type next."""
    path = folder / "nodes" / node
    return f"""\
private key, for that node alone: {path}
public key, for the server: {path}.pub
next, on the server's machine, with that file in its folder of keys, under nodes/:
  fedllm keys --out {shlex.quote(str(folder))} --write-gate    ({_RESTART})
{_register(folder, node)}
"""


def _reviewer_text(path: Path) -> str:
    """Return where a reviewer's key belongs, and what to type next."""
    return f"""\
private key, for that reviewer alone: {path}
public key, for each node whose owner trusts the reviewer: {path}.pub
next, on each such node's machine:
  fedllm node trust {shlex.quote(path.name + ".pub")}
"""


def _trustee_text(path: Path, pin: str) -> str:
    """Return where a trustee's key belongs, and what to type next."""
    return f"""\
private key, for that trustee alone: {path}
public key, for each node's owner, by a way that is not the server's: {path.name}:{pin}
next, in the trustee's own node config:
  trustee-name="{path.name}" trustee-key="{path}"
and in every node's, the trustee's own too, with those of all trustees, by commas:
  trusted-trustees="{path.name}:{pin},..."
"""


def _register(folder: Path, node: str) -> str:
    public = shlex.quote(str(folder / "nodes" / f"{node}.pub"))
    return f"  flwr supernode register --name {node} {public} {SUPERLINK_NAME}"


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("keys", __doc__)
    add_out(parser, "folder of the keys; needed but for --app-hash")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--server-name", metavar="NAME", help="name or address that nodes connect to"
    )
    what.add_argument(
        "--add-node", metavar="NAME", help="make one more node's key only"
    )
    what.add_argument(
        "--add-reviewer", metavar="NAME", help="make a reviewer's key only"
    )
    what.add_argument("--add-trustee", metavar="NAME", help="make a trustee's key only")
    what.add_argument(
        "--write-gate",
        action="store_true",
        help="write gate.caddy of the public keys in nodes/, no more",
    )
    what.add_argument(
        "--check",
        action="store_true",
        help="say how long the certificates are valid, no more",
    )
    what.add_argument(
        "--renew-server",
        action="store_true",
        help="renew the server's certificate and key, no more",
    )
    what.add_argument(
        "--app-hash", action="store_true", help="print the SHA-256 of the app, no more"
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
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
