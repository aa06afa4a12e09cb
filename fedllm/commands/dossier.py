"""Write the dossier of a finished run, signed, for those who must sign; or check one.

    fedllm dossier latest
    fedllm dossier latest --verify
    fedllm dossier FOLDER --verify --head NODE.json --key server.pub

It writes dossier.html and dossier.json into the run folder, from the files there: the claim in
the order of NIST SP 800-226, the tests that the EDPB names, the controls of SATRE 3.3.07, each
line with its file and key. `fedllm audit --run` first, if the tests are wanted in it.

--verify checks signature, page, files and the ledger's chain. --head compares with what nodes
hold of the ledger: the file that `fedllm node dossier` wrote at each. Exit status 1 if a check
fails.
"""

import argparse
import sys
from pathlib import Path

from fedllm.commands.options import add_json, main_of, new_parser, write_json
from fedllm.config import fedllm_home
from fedllm.foreign_text import printable
from fedllm.reporting.dossier_check import (
    as_json,
    parse_key_file,
    verify_dossier,
    write_text,
)
from fedllm.reporting.dossier_file import write_dossier
from fedllm.runs.listing import find_run
from fedllm.signatures import fingerprint, server_key


def run(args: argparse.Namespace) -> int:
    """Write or check a dossier, and print what came of it."""
    home = fedllm_home()
    folder = find_run(home / "runs", args.name)
    if args.verify:
        return _verify(args, home, folder)
    if args.head or args.key:
        raise argparse.ArgumentError(None, "--head, --key: are of --verify")
    key = server_key(home)
    page, content = write_dossier(folder, key)
    name = fingerprint(key.public_key())
    if args.json:
        write_json({"page": str(page), "json": str(content), "key": name})
    else:
        sys.stdout.write(f"written: {page}\nwritten: {content}\nsigned by: {name}\n")
    return 0


def _verify(args: argparse.Namespace, home: Path, folder: Path) -> int:
    own = home / "signing" / "server.pub"
    file = Path(args.key).expanduser() if args.key else own
    trusted = parse_key_file(file) if args.key or own.is_file() else None
    nodes = [Path(name).expanduser() for name in args.head]
    findings = list(verify_dossier(folder, nodes, trusted))
    content = as_json(findings)
    if args.json:
        write_json(content)
    else:
        lines = (printable(line, limit=None) for line in write_text(findings))
        sys.stdout.writelines(f"{line}\n" for line in lines)
    return 0 if content["passed"] else 1


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("dossier", __doc__)
    parser.add_argument("name", metavar="RUN", help="a run's name or folder, or latest")
    parser.add_argument("--verify", action="store_true", help="check one, write none")
    parser.add_argument(
        "--head",
        action="append",
        default=[],
        metavar="FILE",
        help="what fedllm node dossier wrote at a node; may be given more than once",
    )
    parser.add_argument(
        "--key",
        metavar="FILE",
        help="the server's public key (default: this home's signing/server.pub, if any)",
    )
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
