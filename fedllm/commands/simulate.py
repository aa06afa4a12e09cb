"""Run a simulation in a SuperLink of its own, and stop that afterwards.

`flwr run` alone starts a SuperLink that outlives it on a fixed port, and joins one that
another folder or environment left there, with that one's interpreter and packages. This
command types `flwr run . --stream` for you against a SuperLink on a free port, with the
packages of this environment, and ends with status 1 where the run failed.
"""

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from fedllm.commands.options import positive_int
from fedllm.deployment.superlink import (
    free_port,
    program_path,
    run_status,
    stop_superlink,
    wait_until_up,
)
from fedllm.models.known import BUILT_IN_MODEL

# What a client on the built-in model takes at most, with rows as long as ours.
_CLIENT_BYTES = 2 * 2**30
_FLOWER_CPUS = 2


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    app = Path(args.app).resolve()
    if not (app / "pyproject.toml").is_file():
        sys.exit(f"{app}: no pyproject.toml: run this in fedllm's folder, or name it")
    with tempfile.TemporaryDirectory(prefix="fedllm-flwr-") as home:
        sys.exit(_simulate(app, args, Path(home)))


def _simulate(app: Path, args: argparse.Namespace, home: Path) -> int:
    """Start the SuperLink, run, stop the SuperLink; return the exit status."""
    port = free_port()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "private"\n\n[superlink.private]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    env = os.environ | {
        "FLWR_HOME": str(home),
        # The environment that typed this has everything; a fresh one for each run
        # would be installed by uv otherwise.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        # Seconds between Flower's looks for a run to start; it is 1.0 otherwise.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get(
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.25"
        ),
        # Flower starts programs by name: those of this environment, activated or not.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # Ray announces a change of a default that does not concern us.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_raylet_start_wait_time_s": os.environ.get(
            "RAY_raylet_start_wait_time_s", "120"
        ),
    }
    log = home / "superlink.log"
    command = [
        program_path("flower-superlink"),
        "--insecure",
        "--simulation",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--control-api-address",
        f"127.0.0.1:{free_port()}",
    ]
    with log.open("w", encoding="utf-8") as output:
        superlink = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        if not wait_until_up(superlink, port):
            sys.stderr.write(log.read_text("utf-8")[-4000:])
            sys.stderr.write(
                "error: Flower's SuperLink did not start; its log is above\n"
            )
            return 1
        bundled = _without_environments(app, home / "app")
        run = [program_path("flwr"), "run", str(bundled), "private", "--stream"]
        cpus = args.client_cpus or _fitting_cpus(app, args)
        federation = f"num-supernodes={args.num_supernodes}"
        federation += f" client-resources-num-cpus={cpus}"
        run += ["--federation-config", federation]
        for value in args.run_config or []:
            run += ["--run-config", value]
        status = subprocess.run(run, env=env, check=False).returncode
        return status or run_status(env)
    except KeyboardInterrupt:
        return 130
    finally:
        stop_superlink(superlink)


def _without_environments(app: Path, folder: Path) -> Path:
    """Return a copy of the app's folder, of links, that lacks what is no part of it.

    For each run Flower looks at every file in the folder, and the README has 100,000 put
    there: an environment's, ten seconds long.
    """

    def left_out(where: str, names: list[str]) -> list[str]:
        return [
            name
            for name in names
            if name == ".git" or (Path(where) / name / "pyvenv.cfg").is_file()
        ]

    try:
        shutil.copytree(
            app, folder, symlinks=True, ignore=left_out, copy_function=_link
        )
    except OSError:
        return app
    return folder


def _link(source: str, target: str) -> None:
    """Make a second name for a file, or a copy where another disk holds it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _fitting_cpus(app: Path, args: argparse.Namespace) -> int:
    """Return how many CPUs a client gets, and so how many train at a time.

    Two clients of a thread each do more than one of two. What a client takes is known of
    the built-in model only; with another one the number is Flower's.
    """
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    try:
        told = parse_config_args(args.run_config)
        model = get_fused_config_from_dir(app, told).get("model.name")
    except Exception:  # noqa: BLE001 - flwr run says what is wrong with it
        return _FLOWER_CPUS
    if model != BUILT_IN_MODEL.name:
        return _FLOWER_CPUS
    cores, clients = os.cpu_count() or 1, int(args.num_supernodes)
    room = int(psutil.virtual_memory().available) // _CLIENT_BYTES
    return math.ceil(cores / max(1, min(cores, clients, room)))


def _interrupt(*_: object) -> None:
    """Let a request to end be what Ctrl-C is, so that nothing is left running."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("app", nargs="?", default=".", help="fedllm's folder")
    parser.add_argument(
        "--num-supernodes", type=int, default=20, metavar="N", help="virtual clients"
    )
    parser.add_argument(
        "--client-cpus",
        type=positive_int,
        metavar="N",
        help="CPUs of a client, all CPUs over N train at a time, each with its own copy of"
        " the model: as few as memory allows for smollm2-135m-instruct, else 2",
    )
    parser.add_argument(
        "--run-config",
        action="append",
        metavar="CONFIG",
        help="as of flwr run: a TOML file, or key=value pairs",
    )
    return parser


if __name__ == "__main__":
    main()
